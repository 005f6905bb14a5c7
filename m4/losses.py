"""Cross-entropy in which each target token pays for its own modality's vocabulary only.

N target tokens, D width, V vocabulary of one modality, K block of tokens

Targets are sorted by modality and each modality's run is cut into blocks of K tokens; a loop whose length is known at
run time multiplies each block by its own [V D] table. No token is dropped whatever the draw, shapes are static, and no
more than K x V logits exist at a time. The gradient is computed in the same sweep (the loss is a scalar, so that the
backward pass only scales it).
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m4.modality import Modalities
from m4.model import Model
from m4.tokens import Targets

Weighting = Literal["modality", "token"]


def cross_entropy(model: Model, hidden: Float[Array, "B M D"], targets: Targets, *, weighting: Weighting = "modality"):
    """The loss in nats, and each modality's own mean (NaN when absent) and number of tokens.

    "modality": the mean over the modalities present in the global batch of their mean over its tokens. "token": the
    mean over all tokens. Both are taken over the whole batch, so that no cut over devices changes them.
    """
    num_modalities = len(model.modalities)
    modality = jnp.where(targets.valid, targets.modality, num_modalities).reshape(-1)
    counts = jnp.bincount(modality, length=num_modalities + 1)[:num_modalities]
    if weighting == "modality":
        per_token = 1 / (jnp.maximum(counts, 1) * jnp.maximum((counts > 0).sum(), 1))
    else:
        per_token = jnp.full(num_modalities, 1 / jnp.maximum(counts.sum(), 1))
    sums = summed_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), model.token_embedding[...], targets.ids.reshape(-1), modality,
        per_token.astype(jnp.float32), model.modalities,
    )  # fmt: skip
    means = jax.lax.stop_gradient(sums) / (jnp.maximum(counts, 1) * per_token)
    detail = {
        m.name: jnp.where(counts[i] > 0, means[i], jnp.nan) for i, m in enumerate(model.modalities) if m.vocab_size
    }
    return sums.sum(), {"loss": detail, "count": {m.name: counts[i] for i, m in enumerate(model.modalities)}}


def _sweep(hidden, table, ids, modality, weight, modalities: Modalities, block: int, with_gradient: bool):
    order = jnp.argsort(modality)
    counts = jnp.bincount(modality, length=len(modalities) + 1)
    starts = jnp.cumsum(counts) - counts
    sums, d_hidden, d_table = [], jnp.zeros_like(hidden, jnp.float32), []
    for i, m in enumerate(modalities):
        vocabulary = table[modalities.offsets[i] : modalities.offsets[i + 1]]
        if not m.vocab_size:
            sums.append(jnp.zeros((), jnp.float32))
            continue

        def body(k, carry, i=i, vocabulary=vocabulary):
            total, d_hidden, d_vocabulary = carry
            place = k * block + jnp.arange(block)
            inside = place < counts[i]
            rows = order[jnp.where(inside, starts[i] + place, 0)]
            x = hidden[rows]
            logits = jnp.einsum("kd,vd->kv", x, vocabulary, preferred_element_type=jnp.float32)
            target = jnp.clip(ids[rows], 0, vocabulary.shape[0] - 1)
            shifted = logits - logits.max(-1, keepdims=True)
            exp = jnp.exp(shifted)
            norm = exp.sum(-1, keepdims=True)
            scale = jnp.where(inside, weight[i], 0.0)
            nll = jnp.log(norm[:, 0]) - jnp.take_along_axis(shifted, target[:, None], axis=1)[:, 0]
            total = total + (scale * nll).sum()
            if with_gradient:
                g = exp * (scale[:, None] / norm)
                g = g.at[jnp.arange(block), target].add(-scale).astype(x.dtype)
                d_vocabulary = d_vocabulary + jnp.einsum("kv,kd->vd", g, x, preferred_element_type=jnp.float32)
                d_x = jnp.einsum("kv,vd->kd", g, vocabulary, preferred_element_type=jnp.float32)
                d_hidden = d_hidden.at[jnp.where(inside, rows, hidden.shape[0])].set(d_x, mode="drop")
            return total, d_hidden, d_vocabulary

        start = (jnp.zeros((), jnp.float32), d_hidden, jnp.zeros_like(vocabulary, jnp.float32))
        num_blocks = (counts[i] + block - 1) // block
        total, d_hidden, d_vocabulary = jax.lax.fori_loop(0, num_blocks, body, start)
        sums.append(total)
        d_table.append(d_vocabulary)
    return jnp.stack(sums), d_hidden, d_table


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def summed_cross_entropy(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    ids: Int[Array, " N"],
    modality: Int[Array, " N"],
    weight: Float[Array, " modalities"],
    modalities: Modalities,
    block: int = 512,
) -> Float[Array, " modalities"]:
    """weight x summed negative log-likelihood, for each modality; only their sum is differentiable."""
    return _sweep(hidden, table, ids, modality, weight, modalities, min(block, len(ids)), False)[0]


def _forward(hidden, table, ids, modality, weight, modalities, block):
    sums, d_hidden, d_table = _sweep(hidden, table, ids, modality, weight, modalities, min(block, len(ids)), True)
    return sums, (d_hidden.astype(hidden.dtype), jnp.concatenate(d_table).astype(table.dtype), modality)


def _backward(modalities, block, residuals, g):
    # Each modality's own cotangent scales its tokens and its rows of the table.
    d_hidden, d_table, modality = residuals
    of_token = jnp.append(g, 0.0)[modality]
    rows = jnp.asarray([i for i, m in enumerate(modalities) for _ in range(m.vocab_size)])
    return d_hidden * of_token[:, None], d_table * g[rows][:, None], None, None, None


summed_cross_entropy.defvjp(_forward, _backward)
