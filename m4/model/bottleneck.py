"""Bottleneck adapters (Houlsby et al. 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m4.model.layers import BlockConfig, LayerNorm


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
