"""A light module that reads the in-context examples before a frozen encoder does (M2IXT, Chen et al. 2023, section 3).

ModelConfig(extensions=(ExampleEncoder(depth=1),))     and    OptimizerConfig(train=("shot_encoder*",))
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m4.model.block_inputs import BlockInputs
from m4.model.blocks import EncoderBlock
from m4.model.extensions import Extension
from m4.model.positions import item_address
from m4.model.stack import stack
from m4.model.visibility import Visible
from m4.tokens.batch import Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleEncoder(Extension):
    """Blocks through which tokens of in-context examples go first, seeing each other; the query's go past them."""

    depth: int = 1
    """Blocks, at least 1."""

    parameters = ("shot_encoder*",)

    def sizes(self) -> dict[str, int]:
        return {"example_encoder.depth": self.depth}

    def add(self, model: Any, rngs: nnx.Rngs) -> None:
        c = model.config
        model.shot_encoder = stack(EncoderBlock, c, len(model.modalities), self.depth, rngs)
        model.shot_encoder_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.max_items, c.width)))

    def inputs(self, model: Any, x: Float[Array, "B N D"], inputs: Tokens) -> Float[Array, "B N D"]:
        is_example = jnp.asarray(inputs.valid & (inputs.example > 0))
        y = x + item_address(model.shot_encoder_embedding[...], inputs.item, model.config.position_base)
        y, _ = model.run_blocks(model.shot_encoder, y, BlockInputs(Visible.keys(is_example), model.info(inputs)))
        return jnp.where(is_example[..., None], y, x)
