"""Cross-entropy in which each target token pays for its own modality's vocabulary only.

N target tokens, D width, V vocabulary of one modality, K block of tokens

Targets are sorted by modality and each modality's run is cut into blocks of K tokens; a loop whose length is known at
run time multiplies each block by its own [V D] table. No token is dropped whatever the draw, shapes are static, and no
more than K x V logits exist at a time. The gradient is computed in the same sweep (the loss is a scalar, so that the
backward pass only scales it).
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m4.model import Model
from m4.tokens import Targets

Weighting = Literal["modality", "token", "4m_modality", "4m_token"]


def cross_entropy(model: Model, hidden: Float[Array, "B M D"], targets: Targets, *, weighting: Weighting = "modality"):
    """The loss in nats, and each modality's own mean (NaN when absent) and number of tokens.

    "modality": the mean over the modalities present in the global batch of their mean over its tokens. "token": the
    mean over all tokens. Both are taken over the whole batch, so that no cut over devices changes them.

    The original's formulas, for parity: "4m_modality" divides by all modalities that the model predicts, so that absent
    ones count as zero; "4m_token" weighs each modality's mean by its number of logits, tokens times vocabulary.
    """
    num_modalities, rows = len(model.modalities), model.output_rows
    modality = jnp.where(targets.valid, targets.modality, num_modalities).reshape(-1)
    counts = jnp.bincount(modality, length=num_modalities + 1)[:num_modalities]
    num_present = {
        "modality": jnp.maximum((counts > 0).sum(), 1), "4m_modality": sum(m.is_target for m in model.modalities)
    }  # fmt: skip
    if weighting in num_present:
        per_token = 1 / (jnp.maximum(counts, 1) * num_present[weighting])
    else:
        share = jnp.ones(num_modalities) if weighting == "token" else jnp.asarray(np.diff(rows), jnp.float32)
        per_token = share / jnp.maximum((counts * share).sum(), 1)
    total, sums = summed_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), model.output_table, targets.ids.reshape(-1), modality,
        per_token.astype(jnp.float32), rows,
    )  # fmt: skip
    means = sums / (jnp.maximum(counts, 1) * per_token)
    detail = {
        m.name: jnp.where(counts[i] > 0, means[i], jnp.nan) for i, m in enumerate(model.modalities) if m.is_target
    }
    return total, {"loss": detail, "count": {m.name: counts[i] for i, m in enumerate(model.modalities)}}


def _sweep(hidden, table, ids, modality, weight, table_rows: tuple[int, ...], block: int, with_gradient: bool):
    order = jnp.argsort(modality)
    counts = jnp.bincount(modality, length=len(table_rows))
    starts = jnp.cumsum(counts) - counts
    sums, d_hidden, d_table = [], jnp.zeros_like(hidden, jnp.float32), jnp.zeros_like(table, jnp.float32)
    for i, (first, last) in enumerate(itertools.pairwise(table_rows)):
        if first == last:
            sums.append(jnp.zeros((), jnp.float32))
            continue

        def body(k, carry, i=i, first=first, last=last):
            total, d_hidden, d_table = carry
            # The start depends on k in form only: copies of all modalities' rows before the first loop would be held.
            vocabulary = jax.lax.dynamic_slice_in_dim(table, first + jnp.minimum(k, 0), last - first).astype(
                hidden.dtype
            )
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
                is_target = jnp.arange(len(vocabulary))[None] == target[:, None]
                g = (exp * (scale[:, None] / norm) - jnp.where(is_target, scale[:, None], 0)).astype(x.dtype)
                d_vocabulary = jnp.einsum("kv,kd->vd", g, x, preferred_element_type=jnp.float32)
                d_table = d_table.at[first : first + len(d_vocabulary)].add(d_vocabulary)
                d_x = jnp.einsum("kv,vd->kd", g, vocabulary, preferred_element_type=jnp.float32)
                d_hidden = d_hidden.at[jnp.where(inside, rows, hidden.shape[0])].set(d_x, mode="drop")
            return total, d_hidden, d_table

        num_blocks = (counts[i] + block - 1) // block
        start = (jnp.zeros((), jnp.float32), d_hidden, d_table)
        total, d_hidden, d_table = jax.lax.fori_loop(0, num_blocks, body, start)
        sums.append(total)
    sums = jnp.stack(sums)
    return (sums.sum(), sums), d_hidden, d_table


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def summed_cross_entropy(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    ids: Int[Array, " N"],
    modality: Int[Array, " N"],
    weight: Float[Array, " modalities"],
    table_rows: tuple[int, ...],
    block: int = 128,
):
    """Sum of weight x negative log-likelihood, and its part of each modality, whose rows begin at table_rows[i].

    Only the sum is differentiable.
    """
    return _sweep(hidden, table, ids, modality, weight, table_rows, min(block, len(ids)), False)[0]


def _forward(hidden, table, ids, modality, weight, table_rows, block):
    out, d_hidden, d_table = _sweep(hidden, table, ids, modality, weight, table_rows, min(block, len(ids)), True)
    return out, (d_hidden.astype(hidden.dtype), d_table.astype(table.dtype))


def _backward(table_rows, block, residuals, g):
    d_hidden, d_table = residuals
    return d_hidden * g[0].astype(d_hidden.dtype), d_table * g[0], None, None, None


summed_cross_entropy.defvjp(_forward, _backward)
