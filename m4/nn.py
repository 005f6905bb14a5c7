"""Layers of the encoder-decoder: linear maps, norms, attention, gated MLP, blocks.

B batch, T query tokens, S key tokens, D width, N heads, H head width, F hidden width
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from m4 import kernels

BATCH = ("data", "fsdp")  # axes of a mesh over which examples are cut; "tensor" cuts within a layer


def cut(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """x with its leading axes cut over these axes of the mesh that is set (`jax.set_mesh`); x as it is without one.

    `P.UNCONSTRAINED` leaves an axis to the compiler.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def lookup(table: Float[Array, "V D"], index: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Rows of a table whose columns are cut over fsdp and tensor: each device reads its columns for its neighbours too,
    and numbers of activations are exchanged, never the table."""
    rows = cut(table, None, ("fsdp", "tensor"))[cut(index, "data")]
    return cut(cut(rows, "data", None, ("fsdp", "tensor")), BATCH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """A change of low rank to each linear map of the blocks: kernel + alpha / rank x A B (Hu et al. 2022, section 4.1).

    A is drawn and B zero: nothing changes at first. `routed`: each modality has its own A and B, and each token is
    changed by those of its modality.
    """

    rank: int = 8
    alpha: float = 16.0
    routed: bool = False

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"{self}: rank must be at least 1 and alpha above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What the blocks are made of. The defaults, with `hidden` = 2/3 x 4 x width, are the released 4M-7 and 4M-21.

    `hidden` is the inner width of the MLPs: "swiglu" (Shazeer 2020) or "gelu" (the exact one, not the tanh formula).
    `qk_norm` normalises queries and keys of each head. `mimetic_init` starts query and key kernels equal, so that a
    token first attends to its own address (Trockman & Kolter 2023, section 3); 4M draws them apart. `dtype` is that of
    matrix products: parameters, norms, softmax and the sum that runs through the blocks are float32 always. `lora`, and
    `adapter_size` (numbers in a bottleneck behind each MLP, Houlsby et al. 2019; 0: none), are for fine-tuning.
    """

    width: int = 192
    num_heads: int = 3
    hidden: int = 512
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    qk_norm: bool = False
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    mimetic_init: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRA | None = None
    adapter_size: int = 0

    def __post_init__(self):
        if self.num_heads < 1 or self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads} and of 4")


class Linear(nnx.Module):
    """x @ kernel, Glorot-uniform as in 4M, with an optional bias from zero."""

    def __init__(
        self, num_in: int, num_out: int, *, rngs: nnx.Rngs, fan_out: int = 0, bias: bool = False,
        lora: LoRA | None = None, num_routes: int = 1,
    ):  # fmt: skip
        # A fused map (q, k and v in one kernel) is initialised as its parts would be: fan_out of one part.
        limit = (6 / (num_in + (fan_out or num_out))) ** 0.5
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (num_in, num_out), minval=-limit, maxval=limit))
        self.bias = nnx.Param(jnp.zeros(num_out)) if bias else None
        self.lora = LowRank(num_in, num_out, lora, num_routes if lora.routed else 1, rngs=rngs) if lora else None

    @property
    def weight(self) -> Float[Array, "D F"]:
        """The kernel, with what a pair for all tokens adds."""
        return self.kernel[...] if self.lora is None or self.lora.routed else self.kernel[...] + self.lora.change()

    @property
    def routed(self) -> LowRank | None:
        return self.lora if self.lora is not None and self.lora.routed else None

    def __call__(
        self, x: Float[Array, "*B D"], dtype: str | None = None, norm: LayerNorm | None = None,
        route: Float[Array, "*B R"] | None = None,
    ):  # fmt: skip
        """[*B F], multiplied in the dtype of x; summed, and given back, in `dtype`."""
        return project((self,), x, dtype, norm, route)[0]


class LowRank(nnx.Module):
    """The pairs A, B of a linear map: one for all tokens, or one for each of R routes."""

    def __init__(self, num_in: int, num_out: int, c: LoRA, num_routes: int, *, rngs: nnx.Rngs):
        self.routed, self.scale = c.routed, c.alpha / c.rank
        self.a = nnx.Param(jax.random.normal(rngs.lora(), (num_routes, num_in, c.rank)) * num_in**-0.5)
        self.b = nnx.Param(jnp.zeros((num_routes, c.rank, num_out)))

    def change(self) -> Float[Array, "D F"]:
        return jnp.matmul(self.a[0], self.b[0]) * self.scale

    def __call__(self, x: Float[Array, "T D"], route: Float[Array, "T R"]) -> Float[Array, "T F"]:
        inner = jnp.einsum("td,rdk->trk", x, self.a[...].astype(x.dtype)) * route[..., None].astype(x.dtype)
        return jnp.einsum("trk,rkf->tf", inner, self.b[...].astype(x.dtype)) * self.scale


def project(
    maps: tuple[Linear, ...], x: Float[Array, "*B D"], dtype: str | None = None, norm: LayerNorm | None = None,
    route: Float[Array, "*B R"] | None = None,
):  # fmt: skip
    """Each map's [*B F] of x, multiplied in the dtype of x; summed, and given back, in `dtype`.

    `norm` is applied to x first: the backward pass computes its result again, so that only x is kept. `route`: how much
    of each route's pair a token takes, of maps with LoRA(routed=True).
    """

    def products(x, kernels):
        x = norm(x) if norm else x
        # Two axes: XLA's CPU weight gradients of [batch, tokens, width] operands are 1.7 times slower.
        x = x.reshape(-1, x.shape[-1])
        if len(kernels) > 1 and not _cut_over_tensor():  # one product is a third faster on CPU
            ends = list(itertools.accumulate(k.shape[1] for k in kernels))[:-1]
            return jnp.split(product(x, jnp.concatenate(kernels, axis=1)), ends, axis=1)
        return [product(x, k) for k in kernels]

    def product(x, kernel):
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype or x.dtype)

    ys = (jax.checkpoint(products) if norm else products)(x, [m.weight for m in maps])
    if route is not None and maps[0].routed is not None:
        flat, rows = (norm(x) if norm else x).reshape(-1, x.shape[-1]), route.reshape(-1, route.shape[-1])
        ys = [y + m.routed(flat, rows).astype(y.dtype) for m, y in zip(maps, ys, strict=True)]
    ys = [y if m.bias is None else y + m.bias[...].astype(y.dtype)[None] for m, y in zip(maps, ys, strict=True)]
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def _cut_over_tensor() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["tensor"] > 1


def _as_row(vector: Float[Array, " D"], like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


@jax.custom_vjp
def layer_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"]) -> Float[Array, "*B D"]:
    """Layer normalisation over the last axis in float32; the backward pass keeps mean and deviation only."""
    return _layer_norm_forward(x, scale)[0]


def _layer_norm_forward(x, scale):
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + 1e-6)
    return ((y - mean) * inverse * _as_row(scale, y)).astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(residuals, g):
    x, mean, inverse, scale = residuals
    normal = (x.astype(jnp.float32) - mean) * inverse
    g = g.astype(jnp.float32)
    d = g * _as_row(scale, g)
    d = inverse * (d - d.mean(-1, keepdims=True) - normal * (d * normal).mean(-1, keepdims=True))
    return d.astype(x.dtype), (g * normal).reshape(-1, x.shape[-1]).sum(0)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """Layer normalisation with a scale, and a bias if the config asks for one; the result in c.dtype."""

    def __init__(self, c: BlockConfig, width: int = 0):
        self.dtype = c.dtype
        self.scale = nnx.Param(jnp.ones(width or c.width))
        self.bias = nnx.Param(jnp.zeros(width or c.width)) if c.norm_bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = layer_norm(x, self.scale[...])
        return (y if self.bias is None else y + _as_row(self.bias[...], y)).astype(self.dtype)


def extended(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    queries: Float[Array, "B T R"],
    keys: Float[Array, "B S R"],
    weight: Float[Array, "N R"],
):
    """Queries and keys of H + R numbers (and zeros: kernels want multiples of 8), whose product after scaling is
    q k / sqrt(H) + (weight queries) keys."""
    none = -queries.shape[-1] % 8
    queries, keys = (jnp.pad(x, ((0, 0), (0, 0), (0, none))) for x in (queries, keys))
    weight = jnp.pad(weight, ((0, 0), (0, none)))
    width, longer = q.shape[-1], q.shape[-1] + queries.shape[-1]
    more = queries[:, :, None] * (weight * longer**0.5)[None, None]
    keys = jnp.broadcast_to(keys[:, :, None], (*k.shape[:3], keys.shape[-1]))
    join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=-1)  # noqa: E731
    return join(q * (longer / width) ** 0.5, more), join(k, keys)


class Visible(NamedTuple):
    """Which keys each query sees, as a rule: those of its own segment whose rank is not above its own.

    A key of segment -1 is seen by none. Axes of one element stand for all. Within a segment, keys stand in order of
    rank: kernels rely on it (`m4.kernels.splash`).
    """

    query_segment: Int[Array, "_ _"]  # [B T]
    query_rank: Int[Array, "_ _"]
    key_segment: Int[Array, "_ S"]  # [B S]
    key_rank: Int[Array, "_ S"]

    @classmethod
    def keys(cls, valid: Bool[Array, "B S"]) -> Visible:
        """All queries see the keys that are valid."""
        zero = jnp.zeros((1, 1), jnp.int32)
        return cls(zero, zero, jnp.where(valid, 0, -1), jnp.zeros_like(valid, jnp.int32))

    def mask(self) -> Bool[Array, "_ _ S"]:
        same = self.query_segment[:, :, None] == self.key_segment[:, None]
        return same & (self.key_rank[:, None] <= self.query_rank[:, :, None])


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"], visible: Visible
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention, softmax in float32; a query that sees no key at all gets zeros.

    The backward pass computes the weights [B N T S] again (Dao et al. 2022, section 3.1): they are never kept.
    TPUs and GPUs have kernels that equal what stands here within rounding.
    """
    if (kernel := kernels.kernel_for(q)) is not None:
        return kernels.on_mesh(kernel, BATCH, "tensor")(q, k, v, visible)
    # XLA on CPU multiplies [.. T H] blocks twice as fast as strided ones, and undoes plain transposes.
    q, k, v = (jax.lax.optimization_barrier(rearrange(x, "b t n h -> b n t h")) for x in (q, k, v))
    return rearrange(jax.lax.optimization_barrier(_attend(q, k, v, visible)), "b n t h -> b t n h")


@jax.custom_vjp
def _attend(q, k, v, visible):
    return _attend_forward(q, k, v, visible)[0]


def _attend_forward(q, k, v, visible):
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = visible.mask()[:, None]
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    largest = scores.max(-1, keepdims=True)
    exp = jnp.where(mask, jnp.exp(scores - largest), 0)
    total = jnp.maximum(exp.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("bnts,bnsh->bnth", exp.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.astype(v.dtype), (q, k, v, visible, (largest + jnp.log(total))[..., 0])


def _attend_backward(residuals, g):
    q, k, v, visible, log_total = residuals
    # Keys before queries: two products that contract the last axis, and none that XLA would keep from the forward pass.
    scores = jnp.einsum("bnsh,bnth->bnst", k, q, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = visible.mask().swapaxes(1, 2)[:, None]
    weights = jnp.where(mask, jnp.exp(scores - log_total[:, :, None]), 0)
    d_v = jnp.einsum("bnst,bnth->bnsh", weights.astype(g.dtype), g)
    d = jnp.einsum("bnsh,bnth->bnst", v, g, preferred_element_type=jnp.float32) * weights
    d = ((d - weights * d.sum(-2, keepdims=True)) * q.shape[-1] ** -0.5).astype(q.dtype)
    return jnp.einsum("bnst,bnsh->bnth", d, k), jnp.einsum("bnst,bnth->bnsh", d, q), d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


class Attention(nnx.Module):
    """Multi-head attention of x to `context`, each normalised by the `norm` given with it."""

    def __init__(self, c: BlockConfig, num_routes: int = 1, *, rngs: nnx.Rngs):
        self.num_heads = c.num_heads
        linear = functools.partial(Linear, rngs=rngs, lora=c.lora, num_routes=num_routes)
        self.query = linear(c.width, c.width, bias=c.qkv_bias)
        self.key_value = linear(c.width, 2 * c.width, fan_out=c.width, bias=c.qkv_bias)
        if c.mimetic_init:
            self.key_value.kernel[...] = self.key_value.kernel[...].at[:, : c.width].set(self.query.kernel[...])
        self.out = linear(c.width, c.width, bias=c.proj_bias)
        self.query_norm = LayerNorm(c, c.width // c.num_heads) if c.qk_norm else None
        self.key_norm = LayerNorm(c, c.width // c.num_heads) if c.qk_norm else None

    def queries(self, x: Float[Array, "B T D"], norm: LayerNorm, route=None) -> Float[Array, "B T N H"]:
        return self._queries(self.query(x, norm=norm, route=route))

    def keys_values(self, context: Float[Array, "B S D"], norm: LayerNorm, route=None) -> tuple[Array, Array]:
        return self._keys_values(self.key_value(context, norm=norm, route=route))

    def _queries(self, q: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        q = rearrange(q, "b t (n h) -> b t n h", n=self.num_heads)
        return self.query_norm(q) if self.query_norm else q

    def _keys_values(self, kv: Float[Array, "B S F"]) -> tuple[Array, Array]:
        k, v = rearrange(kv, "b s (two n h) -> two b s n h", two=2, n=self.num_heads)
        return (self.key_norm(k) if self.key_norm else k), v

    def to_itself(self, x: Float[Array, "B T D"], norm: LayerNorm, visible: Visible, route=None):
        q, kv = project((self.query, self.key_value), x, norm=norm, route=route)
        return self.finish(self._queries(q), *self._keys_values(kv), visible, route=route)

    def __call__(
        self, x: Array, norm: LayerNorm, context: Array, context_norm: LayerNorm, visible: Visible, match=None,
        route=None, context_route=None,
    ):  # fmt: skip
        """`visible`: all queries see the same keys (`Visible.keys`). `match`: see `finish`."""
        (_, num_queries, width), num_keys = x.shape, context.shape[1]
        plain = self.key_value.bias is None and self.key_norm is None and self.key_value.routed is None
        if plain and match is None and num_queries * (width + self.num_heads * num_keys) < num_keys * width / 2:
            return self._few(self.queries(x, norm), context_norm(context), visible)
        q, (k, v) = self.queries(x, norm, route), self.keys_values(context, context_norm, context_route)
        return self.finish(q, k, v, visible, match, route)

    def _few(self, q: Float[Array, "B T N H"], context: Float[Array, "B S D"], visible: Visible):
        """For few queries it is less work to map these to the context's width than all of the context to keys and
        values: q (W c) = (q W) c, and the same for the mean of values."""
        num_heads, head_width = q.shape[2:]
        kernel = self.key_value.weight.astype(q.dtype)
        w_k, w_v = rearrange(kernel, "d (two n h) -> two d n h", two=2, n=num_heads)
        # `attend` divides by the root of the width, which is now D.
        scale = (context.shape[-1] / head_width) ** 0.5
        q = rearrange(jnp.einsum("btnh,dnh->btnd", q * scale, w_k), "b t n d -> b (t n) 1 d")
        mean = attend(q, context[:, :, None], context[:, :, None], visible)
        values = jnp.einsum("btnd,dnh->btnh", rearrange(mean, "b (t n) 1 d -> b t n d", n=num_heads), w_v)
        return self.out(rearrange(values, "b t n h -> b t (n h)"), "float32")

    def finish(self, q: Array, k: Array, v: Array, visible: Visible, match=None, route=None) -> Float[Array, "B T D"]:
        """`match`: vectors of queries [B T R] and keys [B S R], whose products add to the logits by each head's
        weights [N R]."""
        width = q.shape[-1]
        if match is not None:
            q, k = extended(q, k, *match)
            v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - width)))  # kernels want one width
        mixed = rearrange(attend(q, k, v, visible)[..., :width], "b t n h -> b t (n h)")
        return self.out(mixed, "float32", route=route)


@jax.custom_vjp
def silu_gate_matmul(x: Float[Array, "M G"], kernel: Float[Array, "F D"]) -> Float[Array, "M D"]:
    """(silu(a) * b) @ kernel of x = [a b], in float32. Of the widest activations only x is kept for the way back."""
    return _silu_gate_forward(x, kernel)[0]


def _silu_gate_forward(x, kernel):
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    wide = (a * jax.nn.sigmoid(a) * b).astype(x.dtype)
    return jnp.matmul(wide, kernel, preferred_element_type=jnp.float32), (x, kernel)


def _silu_gate_backward(residuals, g):
    x, kernel = residuals
    # A term in g that is zero: else XLA would compute the sigmoid in the forward pass and keep it.
    a, b = jnp.split(x.astype(jnp.float32) + 0 * g[0, 0], 2, axis=-1)
    s = jax.nn.sigmoid(a)
    g = g.astype(x.dtype)
    d_kernel = jnp.matmul((a * s * b).astype(x.dtype).T, g, preferred_element_type=jnp.float32)
    d = jnp.matmul(g, kernel.T, preferred_element_type=jnp.float32)
    d_x = jnp.concatenate([d * b * s * (1 + a * (1 - s)), d * a * s], axis=-1)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


silu_gate_matmul.defvjp(_silu_gate_forward, _silu_gate_backward)


class MLP(nnx.Module):
    """(silu(x A) * x B) C with A and B side by side in one kernel, or gelu(x B) C."""

    def __init__(self, c: BlockConfig, num_routes: int = 1, *, rngs: nnx.Rngs):
        self.gated = c.mlp == "swiglu"
        linear = functools.partial(Linear, rngs=rngs, bias=c.mlp_bias, lora=c.lora, num_routes=num_routes)
        self.up = linear(c.width, c.hidden * (1 + self.gated), fan_out=c.hidden)
        self.down = linear(c.hidden, c.width)

    def __call__(self, x: Float[Array, "*B D"], norm: LayerNorm | None = None, route=None) -> Float[Array, "*B D"]:
        wide = self.up(x, norm=norm, route=route)
        if not self.gated:
            wide = jax.nn.gelu(wide.astype(jnp.float32), approximate=False).astype(wide.dtype)
        elif self.down.routed is not None:
            a, b = jnp.split(wide.astype(jnp.float32), 2, axis=-1)
            wide = (jax.nn.silu(a) * b).astype(wide.dtype)
        else:
            y = silu_gate_matmul(wide.reshape(-1, wide.shape[-1]), self.down.weight.astype(wide.dtype))
            return (y if self.down.bias is None else y + self.down.bias[...][None]).reshape(*x.shape[:-1], -1)
        return self.down(wide, "float32", route=route)


class Adapter(nnx.Module):
    """A bottleneck that is added behind a block's MLP; nothing at first (Houlsby et al. 2019, section 2.1)."""

    def __init__(self, c: BlockConfig, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(c)
        self.down = nnx.Param(jax.random.normal(rngs.lora(), (c.width, c.adapter_size)) * c.width**-0.5)
        self.up = nnx.Param(jnp.zeros((c.adapter_size, c.width)))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = self.norm(x)
        y = jax.nn.gelu(y @ self.down[...].astype(y.dtype)) @ self.up[...].astype(y.dtype)
        return x + y.astype(jnp.float32)


def residual(x: Float[Array, "B T D"], y: Float[Array, "B T D"], keep: Float[Array, " B"] | None):
    """x + y, where stochastic depth (Huang et al. 2016) gives each example's y the factor `keep`: 0, or 1 / (1 - p)."""
    return x + (y if keep is None else y * keep[:, None, None])


class EncoderBlock(nnx.Module):
    """Self-attention, then the MLP, each normalised before and added."""

    num_branches = 2

    def __init__(self, c: BlockConfig, num_routes: int = 1, *, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(c)
        self.attention = Attention(c, num_routes, rngs=rngs)
        self.mlp_norm = LayerNorm(c)
        self.mlp = MLP(c, num_routes, rngs=rngs)
        self.adapter = Adapter(c, rngs=rngs) if c.adapter_size else None

    def __call__(self, x: Float[Array, "B T D"], visible: Visible, route=None, keep=(None, None)):
        x = residual(x, self.attention.to_itself(x, self.attention_norm, visible, route), keep[0])
        x = residual(x, self.mlp(x, self.mlp_norm, route), keep[1])
        return x if self.adapter is None else self.adapter(x)


class DecoderBlock(nnx.Module):
    """Self-attention, cross-attention to the encoder's context, then the MLP."""

    num_branches = 3

    def __init__(self, c: BlockConfig, num_routes: int = 1, *, rngs: nnx.Rngs):
        self.self_norm = LayerNorm(c)
        self.self_attention = Attention(c, num_routes, rngs=rngs)
        self.query_norm = LayerNorm(c)
        self.context_norm = LayerNorm(c)
        self.cross_attention = Attention(c, num_routes, rngs=rngs)
        self.mlp_norm = LayerNorm(c)
        self.mlp = MLP(c, num_routes, rngs=rngs)
        self.adapter = Adapter(c, rngs=rngs) if c.adapter_size else None

    def __call__(
        self, x, visible, context, context_visible, match=None, route=None, context_route=None,
        keep=(None, None, None),
    ) -> Float[Array, "B T D"]:  # fmt: skip
        x = residual(x, self.self_attention.to_itself(x, self.self_norm, visible, route), keep[0])
        norms, routes = (self.query_norm, self.context_norm), (route, context_route)
        y = self.cross_attention(x, norms[0], context, norms[1], context_visible, match, *routes)
        x = residual(x, y, keep[1])
        x = residual(x, self.mlp(x, self.mlp_norm, route), keep[2])
        return x if self.adapter is None else self.adapter(x)

    def step(
        self, x: Float[Array, "B 1 D"], cache, context_keys_values, index, visible, context_visible, match=None,
        route=None,
    ):  # fmt: skip
        """One position of autoregressive decoding: writes its key and value at `index` of the cache and reads all."""
        new = self.self_attention.keys_values(x, self.self_norm, route)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(c, n, index, axis=1) for c, n in zip(cache, new, strict=True)
        )
        q = self.self_attention.queries(x, self.self_norm, route)
        x = x + self.self_attention.finish(q, keys, values, visible, route=route)
        q = self.cross_attention.queries(x, self.query_norm, route)
        x = x + self.cross_attention.finish(q, *context_keys_values, context_visible, match, route)
        x = x + self.mlp(x, self.mlp_norm, route)
        return x if self.adapter is None else self.adapter(x), (keys, values)
