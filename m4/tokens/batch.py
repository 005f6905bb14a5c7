"""Tokens with addresses: what masking produces, the model reads and sampling writes.

B batch, L tokens, K feature vectors, F values in one feature vector

    ids       3   7   0   1   9   0        id in the modality's own vocabulary (Features: row of features[name])
    modality  0   0   2   2   2   0        index in Modalities
    position  5   6  17   3  60   0        position within the modality
    item      0   0   0   0   0   0        image, text or frame of the prompt: 0 = the query's first
    example   0   0   0   0   0   0        0 = the query, 1.. = the labelled examples, from the newest on
    valid     T   T   T   T   T   F        False = padding
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Num

from m4.tokens.modality import Features, Modalities

Array = jax.Array | np.ndarray


class Tokens(NamedTuple):
    """Addressed tokens that the encoder reads. The order of slots carries no meaning."""

    ids: Int[Array, "*B L"]
    modality: Int[Array, "*B L"]
    position: Int[Array, "*B L"]
    item: Int[Array, "*B L"]
    example: Int[Array, "*B L"]
    valid: Bool[Array, "*B L"]


class Targets(NamedTuple):
    """Addressed tokens that the decoder predicts, and what it reads in their place.

    `previous` is the token before the target in a sequence, and -1 (the mask token) in a grid.
    """

    ids: Int[Array, "*B L"]
    previous: Int[Array, "*B L"]
    modality: Int[Array, "*B L"]
    position: Int[Array, "*B L"]
    item: Int[Array, "*B L"]
    example: Int[Array, "*B L"]
    valid: Bool[Array, "*B L"]


class MaskedBatch(NamedTuple):
    """One training batch. Masking gives features as stored (uint8 pixels); models read them `normalized`."""

    inputs: Tokens
    targets: Targets
    features: Mapping[str, Num[Array, "*B K F"]]


def token_counts(targets: Targets, num_modalities: int) -> Int[jax.Array, " modalities"]:
    """How many targets each modality has."""
    modality = jnp.where(targets.valid, targets.modality, -1).reshape(-1, 1)
    return (modality == jnp.arange(num_modalities)[None]).sum(0)


def normalized(batch: MaskedBatch, modalities: Modalities) -> MaskedBatch:
    """Stored features -> float32; call it under jit, so that a quarter of the bytes are sent to the device."""
    kinds = {m.name: m for m in modalities if isinstance(m, Features)}
    return batch._replace(features={name: kinds[name].normalize(x) for name, x in batch.features.items()})


def pad(rows: list[np.ndarray], length: int) -> np.ndarray:
    """Concatenates 1-D int arrays and pads with zeros to int32 [length]; AssertionError if they do not fit."""
    out = np.zeros(length, np.int32)
    ids = np.concatenate([np.zeros(0, np.int32), *rows])
    assert len(ids) <= length, f"{len(ids)} tokens do not fit into {length} slots"
    out[: len(ids)] = ids
    return out


def interleave(parts: list[tuple[list[int], MaskedBatch]], num_vectors: int = 0) -> MaskedBatch:
    """One batch of parts, each with the indices of its rows in it. `num_vectors`: slots of features (0: as needed)."""
    (_, first), size = parts[0], sum(len(rows) for rows, _ in parts)

    def join(arrays, length: int):
        """Rows of arrays, where a part that lacks them has zeros."""
        known = next(x for x in arrays if x is not None)
        out = np.zeros((size, length, *known.shape[2:]), known.dtype)
        for (rows, _), x in zip(parts, arrays, strict=True):
            if x is not None:
                out[rows, : x.shape[1]] = x
        return out

    if len(parts) == 1 and all(x.shape[1] == (num_vectors or x.shape[1]) for x in first.features.values()):
        return first
    columns = lambda kind: [join(xs, xs[0].shape[1]) for xs in zip(*(getattr(b, kind) for _, b in parts), strict=True)]  # noqa: E731
    features = {}
    for name in dict.fromkeys(name for _, b in parts for name in b.features):
        own = [b.features[name] if name in b.features else None for _, b in parts]
        features[name] = join(own, num_vectors or max(x.shape[1] for x in own if x is not None))
    return MaskedBatch(Tokens(*columns("inputs")), Targets(*columns("targets")), features)
