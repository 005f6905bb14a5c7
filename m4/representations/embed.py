"""The encoder by itself: embeddings of any subset of signals, without anything being generated.

    from m4 import Sampler, features

    embeddings = features(Sampler.load("scenes"), {"rgb": images})
    embeddings.pooled     [B D]     one vector for each sample
    embeddings.tokens     [B N D]   one for each input token, zeros where there is none (embeddings.inputs.valid)

B samples, N input slots, D width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from m4.inference.prompts import in_buckets
from m4.inference.sampler import Sampler
from m4.model.pooling import encoder_outputs
from m4.tokens.batch import Tokens
from m4.tokens.packing import Packed, pack


class Embeddings(NamedTuple):
    """Normalised outputs of the encoder, float32. `inputs`: their tokens; `pooled`: mean over valid ones."""

    inputs: Tokens
    tokens: Float[np.ndarray, "B N D"]
    pooled: Float[np.ndarray, "B D"]


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph, params, inputs, features):
    return encoder_outputs(nnx.merge(graph, params), inputs, features)


def embed(
    sampler: Sampler, rows: Seq[Packed], progress: Callable[[range], Any] = lambda batches: batches
) -> Embeddings:
    """Embeddings of encoded samples, in batches of the sampler's size."""
    inputs, tokens, pooled = [], [], []
    for first in progress(range(0, len(rows), sampler.batch_size)):
        part = list(rows[first : first + sampler.batch_size])
        count = len(part)
        # Padding with the last row: one compilation serves every batch.
        part += part[-1:] * (min(sampler.batch_size, len(rows)) - count)
        read, features = in_buckets(part, sampler.modalities)
        for outputs, x in zip((tokens, pooled), _encode(sampler.graph, sampler.params, read, features), strict=True):
            outputs.append(np.asarray(x)[:count])
        inputs.append(Tokens(*(x[:count] for x in read)))
    length = max(x.shape[1] for x in tokens)
    padded = lambda x: np.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    all_inputs = Tokens(
        *(np.concatenate([padded(np.asarray(x)) for x in column]) for column in zip(*inputs, strict=True))
    )
    return Embeddings(all_inputs, np.concatenate([padded(x) for x in tokens]), np.concatenate(pooled))


def features(
    sampler: Sampler, inputs: Mapping[str, Any], *, progress: Callable[[range], Any] = lambda batches: batches
) -> Embeddings:
    """Embeddings of raw signals: a list by name, all of one length (None: this sample lacks it), or single ones.

    Names are of signals or modalities, in any combination; a signal is what its tokenizer takes, or the path of a file.
    ValueError for inputs that `Sampler` would not read.
    """
    lists = {name: v if isinstance(v, list) else [v] for name, v in inputs.items()}
    lengths = {name: len(v) for name, v in lists.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"inputs must be non-empty lists of one length; got {lengths}")
    read = sampler.read_all(lists)
    records = sampler.encode(read)
    for i, record in enumerate(records):
        if not record:
            raise ValueError(f"sample {i} has no input at all")
    return embed(sampler, [pack([record], [0], sampler.modalities) for record in records], progress)
