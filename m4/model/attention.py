"""Multi-head attention with the decoder's rule of visibility."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from m4.distributed.constraints import BATCH
from m4.model import kernels
from m4.model.block_inputs import AttentionBias, BlockInputs, TokenInfo
from m4.model.layers import BlockConfig, LayerNorm, Linear, project
from m4.model.visibility import Visible
from m4.model.xla import heads_first, tokens_first


def append_bias_features(
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


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"], visible: Visible
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention, softmax in float32; a query that sees no key at all gets zeros.

    The backward pass computes the weights [B N T S] again (Dao et al. 2022, section 3.1): they are never kept.
    TPUs and GPUs have kernels that equal what stands here within rounding.
    """
    if (kernel := kernels.kernel_for(q)) is not None:
        return kernels.on_mesh(kernel, BATCH, "tensor")(q, k, v, visible)
    return tokens_first(_attend(heads_first(q), heads_first(k), heads_first(v), visible))


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

    def __init__(self, c: BlockConfig, *, rngs: nnx.Rngs):
        self.num_heads = c.num_heads
        linear = functools.partial(Linear, rngs=rngs)
        self.query = linear(c.width, c.width, bias="qkv" in c.biases)
        self.key_value = linear(c.width, 2 * c.width, fan_out=c.width, bias="qkv" in c.biases)
        if c.mimetic_init:
            self.key_value.kernel[...] = self.key_value.kernel[...].at[:, : c.width].set(self.query.kernel[...])
        self.out = linear(c.width, c.width, bias="proj" in c.biases)
        self.query_norm = LayerNorm(c, c.width // c.num_heads) if c.qk_norm else None
        self.key_norm = LayerNorm(c, c.width // c.num_heads) if c.qk_norm else None

    def queries(self, x: Float[Array, "B T D"], norm: LayerNorm, info: TokenInfo | None = None):
        return self._queries(self.query(x, norm=norm, info=info))

    def keys_values(self, context: Float[Array, "B S D"], norm: LayerNorm, info: TokenInfo | None = None):
        return self._keys_values(self.key_value(context, norm=norm, info=info))

    def _queries(self, q: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        q = rearrange(q, "b t (n h) -> b t n h", n=self.num_heads)
        return self.query_norm(q) if self.query_norm else q

    def _keys_values(self, kv: Float[Array, "B S F"]) -> tuple[Array, Array]:
        k, v = rearrange(kv, "b s (two n h) -> two b s n h", two=2, n=self.num_heads)
        return (self.key_norm(k) if self.key_norm else k), v

    def self_attention(self, x: Float[Array, "B T D"], norm: LayerNorm, inputs: BlockInputs) -> Float[Array, "B T D"]:
        q, kv = project((self.query, self.key_value), x, norm=norm, info=inputs.info)
        return self.attend_and_project(self._queries(q), *self._keys_values(kv), inputs.visible, info=inputs.info)

    def __call__(
        self, x: Float[Array, "B T D"], norm: LayerNorm, context_norm: LayerNorm, inputs: BlockInputs
    ) -> Float[Array, "B T D"]:
        """Cross-attention, in which all queries see the same keys (`Visible.keys`)."""
        context, visible, bias = inputs.context, inputs.context_visible, inputs.bias
        assert context is not None and visible is not None, "cross-attention reads a context"
        (_, num_queries, width), num_keys = x.shape, context.shape[1]
        plain = self.key_value.bias is None and self.key_norm is None and not self.key_value.per_token
        if plain and bias is None and num_queries * (width + self.num_heads * num_keys) < num_keys * width / 2:
            return self.few_queries(self.queries(x, norm), context_norm(context), visible)
        q, (k, v) = self.queries(x, norm, inputs.info), self.keys_values(context, context_norm, inputs.context_info)
        return self.attend_and_project(q, k, v, visible, bias, inputs.info)

    def few_queries(self, q: Float[Array, "B T N H"], context: Float[Array, "B S D"], visible: Visible):
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

    def attend_and_project(
        self, q: Array, k: Array, v: Array, visible: Visible, bias: AttentionBias | None = None,
        info: TokenInfo | None = None,
    ) -> Float[Array, "B T D"]:  # fmt: skip
        width = q.shape[-1]
        if bias is not None:
            q, k = append_bias_features(q, k, *bias)
            v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - width)))  # kernels want one width
        mixed = rearrange(attend(q, k, v, visible)[..., :width], "b t n h -> b t (n h)")
        return self.out(mixed, "float32", info=info)
