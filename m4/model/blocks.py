"""Feed-forward layers and the blocks of encoder and decoder."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m4.model.attention import Attention
from m4.model.bottleneck import Adapter
from m4.model.layers import BlockConfig, LayerNorm, Linear
from m4.model.visibility import Visible
from m4.model.xla import computed_after


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
    a, b = jnp.split(
        computed_after(x.astype(jnp.float32), g), 2, axis=-1
    )  # else the sigmoid is kept from the way there
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
        x = residual(x, self.attention.self_attention(x, self.attention_norm, visible, route), keep[0])
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
        x = residual(x, self.self_attention.self_attention(x, self.self_norm, visible, route), keep[0])
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
        x = x + self.self_attention.attend_and_project(q, keys, values, visible, route=route)
        q = self.cross_attention.queries(x, self.query_norm, route)
        x = x + self.cross_attention.attend_and_project(q, *context_keys_values, context_visible, match, route)
        x = x + self.mlp(x, self.mlp_norm, route)
        return x if self.adapter is None else self.adapter(x), (keys, values)
