"""Cross-entropy in which each target token pays for its own modality's vocabulary only.

N target tokens, D width, V vocabulary of one modality, K block of tokens

Targets are sorted by modality and each modality's run is cut into blocks of K tokens; a loop whose length is known at
run time multiplies each block by its own [V D] table. No token is dropped whatever the draw, shapes are static, and no
more than K x V logits exist at a time. The gradient is computed in the same sweep (the loss is a scalar, so that the
backward pass only scales it).

On a mesh each device does so with its own tokens, cut over all devices. It gathers the rows of one modality at a time,
and their gradient is summed over the devices before it comes to the next.
"""

from __future__ import annotations

import collections
import functools
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from m4.distributed.constraints import BATCH
from m4.model.encoder_decoder import Model
from m4.tokens.batch import Targets, token_counts

NUM_SIZES = 4  # of the block for what is left
TABLE = ("fsdp", "tensor")  # axes of a mesh over which the columns of tables are cut
Weighting = Literal["modality", "token", "4m_modality", "4m_token"]


class TeacherOutputs(NamedTuple):
    """What a teacher makes of the same targets: hidden vectors, and the rows of the table that turn them into logits.

    share: of each token's loss that is cross-entropy against the teacher's distribution.
    """

    hidden: Float[Array, "B M T"]
    table: Float[Array, "V T"]
    share: Float[Array, ""]


def cross_entropy(
    model: Model,
    hidden: Float[Array, "B M D"],
    targets: Targets,
    *,
    weighting: Weighting = "modality",
    counts: Int[Array, " modalities"] | None = None,
    z_loss: float = 0.0,
    taught: TeacherOutputs | None = None,
):
    """The loss in nats, and each modality's own mean (NaN when absent) and number of tokens.

    "modality": the mean over the modalities present in the global batch of their mean over its tokens. "token": the
    mean over all tokens. Both are taken over the whole batch, so that no cut over devices changes them. `counts`: the
    whole batch's `token_counts` when `targets` are a part of it, for the parts' losses and gradients to add up to the
    whole batch's. z_loss: weight of log(sum(exp(logits)))^2 of each token, which holds logits near zero (PaLM,
    Chowdhery et al. 2022, section 5). `taught`: part of the loss is against a teacher's distribution (Hinton et al.
    2015, section 2). Neither changes the modalities' means, which are those of the data alone.

    4M's formulas, for parity: "4m_modality" divides by all modalities that the model predicts, so that absent
    ones count as zero; "4m_token" weighs each modality's mean by its number of logits, tokens times vocabulary.
    """
    num_modalities, rows = len(model.modalities), model.output_rows
    modality = jnp.where(targets.valid, targets.modality, num_modalities)
    counts = token_counts(targets, num_modalities) if counts is None else counts
    num_present = {
        "modality": jnp.maximum((counts > 0).sum(), 1), "4m_modality": sum(m.is_target for m in model.modalities)
    }  # fmt: skip
    if weighting in num_present:
        per_token = 1 / (jnp.maximum(counts, 1) * num_present[weighting])
    else:
        share = jnp.ones(num_modalities) if weighting == "token" else jnp.asarray(np.diff(rows), jnp.float32)
        per_token = share / jnp.maximum((counts * share).sum(), 1)
    total, sums = summed_cross_entropy(
        hidden, model.output_table, targets.ids, modality, per_token.astype(jnp.float32), rows, z_loss, taught
    )
    means = sums / (jnp.maximum(counts, 1) * per_token)
    detail = {
        m.name: jnp.where(counts[i] > 0, means[i], jnp.nan) for i, m in enumerate(model.modalities) if m.is_target
    }
    return total, {"loss": detail, "count": {m.name: counts[i] for i, m in enumerate(model.modalities)}}


def blockwise_cross_entropy(
    hidden, table, ids, modality, weight, taught=None, *, table_rows, z_loss, block, with_gradient, mesh_axes
):
    """One device's tokens and its columns of the table -> loss, its parts, and the gradients of both."""
    shape, hidden = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
    ids, modality = ids.reshape(-1), modality.reshape(-1)
    if taught is not None:
        taught = taught._replace(hidden=taught.hidden.reshape(-1, taught.hidden.shape[-1]))
    columns = tuple(a for a in mesh_axes if a in TABLE)
    groups = collections.defaultdict(list)  # modalities by size of vocabulary: one compiled loop for each size
    for i, (first, last) in enumerate(itertools.pairwise(table_rows)):
        groups[last - first].append(i)
    groups.pop(0, None)
    if not block:  # about what a modality has
        block = 2 ** int(np.clip(np.log2(len(ids) / sum(map(len, groups.values()))), 7, 12))
    order = jnp.argsort(modality)
    counts = jnp.bincount(modality, length=len(table_rows))
    starts = jnp.cumsum(counts) - counts
    sweep = _Sweep(hidden, ids, weight, taught, order, counts, starts, block, z_loss, with_gradient)

    def rows_of(table, first, size, dtype):
        rows = jax.lax.dynamic_slice_in_dim(table, first, size).astype(dtype)
        return jax.lax.all_gather(rows, columns, axis=1, tiled=True) if columns else rows

    carry = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(len(weight), jnp.float32),
        jnp.zeros_like(hidden, jnp.float32),
        jnp.full_like(table, jnp.minimum(counts[0], 0), jnp.float32),  # zeros; XLA would share those of all tables
    )
    for size, members in groups.items():

        def of_group(n, carry, size=size, members=members):
            # The barrier: else the rows of all modalities would be gathered, and held, before the first loop.
            first, carry = jax.lax.optimization_barrier((jnp.asarray([table_rows[i] for i in members])[n], carry))
            i = jnp.asarray(members)[n]
            vocabulary = rows_of(table, first, size, hidden.dtype)
            teachers = None if taught is None else rows_of(taught.table, first, size, taught.hidden.dtype)
            if not (columns and with_gradient):
                return sweep.modality(i, 0 if columns else first, vocabulary, teachers, carry)
            # The gradient of one modality's rows, which are whole here, is summed over devices before the next.
            *rest, d_table = carry
            *rest, d_rows = sweep.modality(
                i, 0, vocabulary, teachers, (*rest, jnp.zeros(vocabulary.shape, jnp.float32))
            )
            d_rows = jax.lax.psum_scatter(d_rows, columns, scatter_dimension=1, tiled=True)
            d_rows = jax.lax.psum(d_rows, tuple(a for a in mesh_axes if a not in TABLE))
            return *rest, _add_rows(d_table, d_rows, first)

        carry = jax.lax.fori_loop(0, len(members), of_group, carry)
    loss, sums, d_hidden, d_table = carry
    if with_gradient and not columns:  # every device holds the whole table
        d_table = jax.lax.psum(d_table, mesh_axes)
    return jax.lax.psum((loss, sums), mesh_axes), d_hidden.reshape(shape), d_table


class _Sweep(NamedTuple):
    """One device's N tokens, sorted by modality, which is cut into blocks.

    What is carried from block to block: loss, its part of each modality, gradient of the hidden vectors [N D] and of
    the table's rows, float32.
    """

    hidden: Array  # [N D]
    ids: Array  # [N]
    weight: Array  # of a token, by modality
    taught: TeacherOutputs | None
    order: Array  # [N] of the tokens, sorted by modality
    counts: Array  # by modality
    starts: Array  # of each modality in `order`
    block: int  # tokens
    z_loss: float
    with_gradient: bool

    def modality(self, i, first, vocabulary, teachers, carry):
        """Adds one modality's part: one block of a size that fits what full blocks leave, then those.

        The first writes the rows of the table's gradient, from row `first` on, if only with zeros.
        """
        part = functools.partial(self._block, i, first, vocabulary, teachers)
        sizes = sorted({-(-self.block * k // NUM_SIZES) for k in range(1, NUM_SIZES + 1)})
        num_full = jnp.maximum(-(-self.counts[i] // self.block) - 1, 0)
        rest = self.counts[i] - num_full * self.block
        for size, smaller in zip(sizes, [-1, *sizes], strict=False):
            # A loop of no turn or one: XLA would copy all that a switch carries. Its number is used: else XLA would
            # compute the blocks of all sizes before their loops.
            turns = ((smaller < rest) & (rest <= size)).astype(jnp.int32)
            write = functools.partial(part, end=rest, size=size, write=_write_rows)
            carry = jax.lax.fori_loop(0, turns, lambda k, carry, of=write, size=size: of(k * size, carry=carry), carry)
        add = functools.partial(part, end=self.counts[i], size=self.block, write=_add_rows)
        return jax.lax.fori_loop(0, num_full, lambda k, carry: add(rest + k * self.block, carry=carry), carry)

    def _block(self, i, first, vocabulary, teachers, begin, *, end, size, write, carry):
        loss, sums, d_hidden, d_table = carry
        place = begin + jnp.arange(size)
        inside = place < end
        rows = self.order[jnp.where(inside, self.starts[i] + place, 0)]
        x = self.hidden[rows]
        logits = jnp.einsum("kd,vd->kv", x, vocabulary, preferred_element_type=jnp.float32)
        target = jnp.clip(self.ids[rows], 0, len(vocabulary) - 1)
        largest = logits.max(-1)
        log_z = largest + jnp.log(jnp.exp(logits - largest[:, None]).sum(-1))
        nll = log_z - jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        scale = jnp.where(inside, self.weight[i], 0.0)
        sums = sums.at[i].add((scale * nll).sum())
        if self.taught is not None:
            theirs = jnp.einsum("kd,vd->kv", self.taught.hidden[rows], teachers, preferred_element_type=jnp.float32)
            theirs = jax.nn.softmax(theirs)
            # Of any distribution the cross-entropy is log Z less the expected logit.
            nll += self.taught.share * (log_z - (theirs * logits).sum(-1) - nll)
        loss = loss + (scale * (nll + self.z_loss * log_z**2 if self.z_loss else nll)).sum()
        if self.with_gradient:
            is_target = jnp.arange(len(vocabulary))[None] == target[:, None]
            up = scale * (1 + 2 * self.z_loss * log_z) if self.z_loss else scale
            p = jnp.exp(logits - log_z[:, None])
            g = p * up[:, None] - jnp.where(is_target, scale[:, None], 0)
            if self.taught is not None:
                g += (scale * self.taught.share)[:, None] * (is_target - theirs)
            g = g.astype(x.dtype)
            d_rows = jnp.einsum("kv,kd->vd", g, x, preferred_element_type=jnp.float32)
            d_x = jnp.einsum("kv,vd->kd", g, vocabulary, preferred_element_type=jnp.float32)
            d_table = write(d_table, d_rows, first)
            d_hidden = d_hidden.at[jnp.where(inside, rows, len(self.hidden))].set(d_x, mode="drop")
        return loss, sums, d_hidden, d_table


def _write_rows(table, rows, first):
    return jax.lax.dynamic_update_slice_in_dim(table, rows, first, axis=0)


def _add_rows(table, rows, first):
    old = jax.lax.dynamic_slice_in_dim(table, first, len(rows))
    return _write_rows(table, old + rows, first)


def _blockwise_on_mesh(hidden, table, ids, modality, weight, table_rows, z_loss, taught, block, with_gradient):
    mesh = jax.sharding.get_abstract_mesh()
    sweep = functools.partial(
        blockwise_cross_entropy,
        table_rows=table_rows,
        z_loss=z_loss,
        block=block,
        with_gradient=with_gradient,
        mesh_axes=tuple(a for a in mesh.axis_names if mesh.shape[a] > 1),
    )
    tokens, columns = P(BATCH, "tensor"), P(None, TABLE)
    arrays, specs = [hidden, table, ids, modality, weight], [tokens, columns, tokens, tokens, P()]
    if taught is not None:
        arrays, specs = [*arrays, taught], [*specs, TeacherOutputs(tokens, columns, P())]  # ty: ignore[invalid-argument-type]  specs in place of arrays
    if mesh.empty or mesh.size == 1:
        return sweep(*arrays)
    return jax.shard_map(
        sweep,
        in_specs=tuple(specs),
        out_specs=((P(), P()), tokens, columns),
        check_vma=False,  # what the loop carries becomes different on each device in its first turn
    )(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 8))
def summed_cross_entropy(
    hidden: Float[Array, "B M D"],
    table: Float[Array, "V D"],
    ids: Int[Array, "B M"],
    modality: Int[Array, "B M"],
    weight: Float[Array, " modalities"],
    table_rows: tuple[int, ...],
    z_loss: float = 0.0,
    taught: TeacherOutputs | None = None,
    block: int = 0,
):
    """Sum of weight x (negative log-likelihood + z-loss); and the likelihood's part of each modality, whose rows of the
    table begin at table_rows[i]. A modality past the last marks padding.

    Only the sum is differentiable, and not by what is taught.
    """
    return _blockwise_on_mesh(hidden, table, ids, modality, weight, table_rows, z_loss, taught, block, False)[0]


def _forward(hidden, table, ids, modality, weight, table_rows, z_loss, taught, block):
    out, d_hidden, d_table = _blockwise_on_mesh(
        hidden, table, ids, modality, weight, table_rows, z_loss, taught, block, True
    )
    return out, (d_hidden.astype(hidden.dtype), d_table.astype(table.dtype))


def _backward(table_rows, z_loss, block, residuals, g):
    d_hidden, d_table = residuals
    return d_hidden * g[0].astype(d_hidden.dtype), d_table * g[0], None, None, None, None


summed_cross_entropy.defvjp(_forward, _backward)
