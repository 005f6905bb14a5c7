"""Texts with gaps: sentinels and the spans that they stand for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from m4.tokens.batch import Tokens
from m4.tokens.modality import Modalities, Sequence


def is_sentinel(inputs: Tokens, modalities: Modalities) -> Bool[Array, "B C"]:
    first, count = (
        jnp.asarray([getattr(m, name) if isinstance(m, Sequence) else 0 for m in modalities])[inputs.modality]
        for name in ("first_sentinel", "num_sentinels")
    )
    ids = jnp.asarray(inputs.ids)
    return (ids >= first) & (ids < first + count)


def show_spans(ids: Int[np.ndarray, " n"], modality: Sequence) -> tuple[Int[np.ndarray, " m"], int, bool]:
    """A sequence with -1 for each run of tokens to generate -> the input as in training (a sentinel for each run), the
    number of runs, and whether the last run reaches the end.

    ValueError if there are more runs than sentinels, or none.
    """
    masked = ids < 0
    starts = masked & ~np.append(False, masked[:-1])
    num_spans = int(starts.sum())
    if not 1 <= num_spans < modality.num_sentinels:
        raise ValueError(
            f"{num_spans} spans to generate in {modality.name}; allowed: 1 to {modality.num_sentinels - 1}"
        )
    shown = np.where(starts, modality.first_sentinel + np.cumsum(starts) - 1, ids)[starts | ~masked]
    return shown.astype(np.int32), num_spans, bool(masked[-1])


def fill_spans(shown: Int[np.ndarray, " m"], generated: Int[np.ndarray, " k"], modality: Sequence):
    """The inverse: `shown` with each sentinel replaced by the span generated for it, int32 [n]."""
    spans, current = {modality.first_sentinel: []}, modality.first_sentinel
    for i in generated.tolist():
        if i == current + 1:
            current = i
            spans[current] = []
        else:
            spans[current].append(i)
    last = modality.first_sentinel + modality.num_sentinels
    # Where the model ran out of slots, the last spans are empty.
    filled = [spans.get(i, []) if modality.first_sentinel <= i < last else [i] for i in shown.tolist()]
    return np.array([i for span in filled for i in span], np.int32)


def trim(ids: Int[np.ndarray, " n"], modality: Sequence, limit: int = 0) -> np.ndarray:
    """A sequence up to its end token, which is added if the model closed the span without one or ran out of slots.

    At most `limit` ids (0: as many as the modality may have).
    """
    limit = limit or modality.max_length
    stop = np.flatnonzero((ids == modality.end_id) | (ids == modality.first_sentinel + 1))
    kept = ids[: stop[0] if len(stop) else limit - 1]
    return np.append(kept[: limit - 1], modality.end_id)
