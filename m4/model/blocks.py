"""Feed-forward layers and the blocks of encoder and decoder."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m4.model.attention import Attention
from m4.model.block_inputs import BlockInputs, TokenInfo
from m4.model.layers import BlockConfig, LayerNorm, Linear
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

    def __init__(self, c: BlockConfig, *, rngs: nnx.Rngs):
        self.gated = c.mlp == "swiglu"
        linear = functools.partial(Linear, rngs=rngs, bias="mlp" in c.biases)
        self.up = linear(c.width, c.hidden * (1 + self.gated), fan_out=c.hidden)
        self.down = linear(c.hidden, c.width)

    def __call__(self, x: Float[Array, "*B D"], norm: LayerNorm | None = None, info: TokenInfo | None = None):
        wide = self.up(x, norm=norm, info=info)
        if not self.gated:
            wide = jax.nn.gelu(wide.astype(jnp.float32), approximate=False).astype(wide.dtype)
        elif self.down.per_token:
            a, b = jnp.split(wide.astype(jnp.float32), 2, axis=-1)
            wide = (jax.nn.silu(a) * b).astype(wide.dtype)
        else:
            y = silu_gate_matmul(wide.reshape(-1, wide.shape[-1]), self.down.weight.astype(wide.dtype))
            return (y if self.down.bias is None else y + self.down.bias[...][None]).reshape(*x.shape[:-1], -1)
        return self.down(wide, "float32", info=info)


def residual(x: Float[Array, "B T D"], y: Float[Array, "B T D"], inputs: BlockInputs, branch: int):
    """x + y, where stochastic depth gives each example's y a factor."""
    return x + (y if inputs.branch_scale is None else y * inputs.branch_scale[branch][:, None, None])


class Block(nnx.Module):
    """x [B T D] -> x, and auxiliary values by name, such as a loss of experts."""

    num_branches: int

    def __init__(self):
        self.added: tuple[str, ...] = ()

    def add(self, name: str, part: nnx.Module) -> None:
        """A part of an extension: part(x, inputs) takes the block's result and returns another, or that and auxiliary
        values by name."""
        setattr(self, name, part)
        self.added += (name,)

    def _after(self, x: Float[Array, "B T D"], inputs: BlockInputs) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        auxiliary: dict[str, Array] = {}
        for name in self.added:
            out = getattr(self, name)(x, inputs)
            x, more = out if isinstance(out, tuple) else (out, {})
            auxiliary |= more
        return x, auxiliary


class EncoderBlock(Block):
    """Self-attention, then the MLP, each normalised before and added."""

    num_branches = 2

    def __init__(self, c: BlockConfig, *, rngs: nnx.Rngs):
        super().__init__()
        self.attention_norm = LayerNorm(c)
        self.attention = Attention(c, rngs=rngs)
        self.mlp_norm = LayerNorm(c)
        self.mlp = MLP(c, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], inputs: BlockInputs) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        x = residual(x, self.attention.self_attention(x, self.attention_norm, inputs), inputs, 0)
        x = residual(x, self.mlp(x, self.mlp_norm, inputs.info), inputs, 1)
        return self._after(x, inputs)


class DecoderBlock(Block):
    """Self-attention, cross-attention to the encoder's context, then the MLP."""

    num_branches = 3

    def __init__(self, c: BlockConfig, *, rngs: nnx.Rngs):
        super().__init__()
        self.self_norm = LayerNorm(c)
        self.self_attention = Attention(c, rngs=rngs)
        self.query_norm = LayerNorm(c)
        self.context_norm = LayerNorm(c)
        self.cross_attention = Attention(c, rngs=rngs)
        self.mlp_norm = LayerNorm(c)
        self.mlp = MLP(c, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], inputs: BlockInputs) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        x = residual(x, self.self_attention.self_attention(x, self.self_norm, inputs), inputs, 0)
        x = residual(x, self.cross_attention(x, self.query_norm, self.context_norm, inputs), inputs, 1)
        x = residual(x, self.mlp(x, self.mlp_norm, inputs.info), inputs, 2)
        return self._after(x, inputs)

    def step(self, x: Float[Array, "B 1 D"], cache, context_keys_values, index, inputs: BlockInputs):
        """One position of autoregressive decoding: writes its key and value at `index` of the cache and reads all."""
        new = self.self_attention.keys_values(x, self.self_norm, inputs.info)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(c, n, index, axis=1) for c, n in zip(cache, new, strict=True)
        )
        q = self.self_attention.queries(x, self.self_norm, inputs.info)
        x = x + self.self_attention.attend_and_project(q, keys, values, inputs.visible, info=inputs.info)
        assert inputs.context_visible is not None, "cross-attention reads a context"
        q = self.cross_attention.queries(x, self.query_norm, inputs.info)
        x = x + self.cross_attention.attend_and_project(
            q, *context_keys_values, inputs.context_visible, inputs.bias, inputs.info
        )
        x = x + self.mlp(x, self.mlp_norm, inputs.info)
        return self._after(x, inputs)[0], (keys, values)
