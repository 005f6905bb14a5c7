"""Items of a prompt that are encoded each by itself before they see each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from m4.model.block_inputs import TokenInfo
from m4.model.extensions import Extension
from m4.model.visibility import Visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndependentItems(Extension):
    """In the encoder's first blocks the query and each in-context example (each image of it) see only themselves, as in
    pretraining; later blocks see all."""

    num_blocks: int = 2
    """First blocks, at least 1 and less than encoder_depth."""

    def check(self, config: Any, modalities: Any) -> None:
        if not 0 < self.num_blocks < config.encoder_depth:
            raise ValueError(
                f"{self}: num_blocks must be at least 1 and less than encoder_depth={config.encoder_depth}"
            )

    def first_blocks(self, info: TokenInfo) -> tuple[int, Visible]:
        """Learned tokens before the inputs go with the query."""
        item, rank = info.item, jnp.zeros_like(info.item)
        return self.num_blocks, Visible(item, rank, jnp.where(info.valid, item, -1), rank)
