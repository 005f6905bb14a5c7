"""Bottleneck adapters (Houlsby et al. 2019).

ModelConfig(extensions=(Bottleneck(size=32),))     and    OptimizerConfig(train=("*.adapter.*",))
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m4.model.block_inputs import BlockInputs
from m4.model.blocks import Block
from m4.model.extensions import Extension
from m4.model.layers import BlockConfig, LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Extension):
    """A bottleneck behind each block's MLP, whose result is added; nothing at first (Houlsby et al. 2019, section
    2.1)."""

    size: int = 32
    """Values in the bottleneck, at least 1."""

    parameters = ("*.adapter.*",)

    def sizes(self) -> dict[str, int]:
        return {"bottleneck.size": self.size}

    def wrap(self, module: nnx.Module, config: Any, num_modalities: int, rngs: nnx.Rngs) -> None:
        if isinstance(module, Block):
            module.add("adapter", Adapter(config, self.size, rngs=rngs))


class Adapter(nnx.Module):
    def __init__(self, c: BlockConfig, size: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(c)
        self.down = nnx.Param(jax.random.normal(rngs.extensions(), (c.width, size)) * c.width**-0.5)
        self.up = nnx.Param(jnp.zeros((size, c.width)))

    def __call__(self, x: Float[Array, "*B D"], inputs: BlockInputs) -> Float[Array, "*B D"]:
        y = self.norm(x)
        y = jax.nn.gelu(y @ self.down[...].astype(y.dtype)) @ self.up[...].astype(y.dtype)
        return x + y.astype(jnp.float32)
