"""AdamW with warm-up and cosine decay, gradient clipping, and weight decay on matrices only."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Peak learning rate after `warmup_steps`, cosine to zero at the last step of the run. clip_norm=0: no clipping."""

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float = 1.0

    def schedule(self, num_steps: int) -> optax.Schedule:
        warmup = min(self.warmup_steps, max(1, num_steps // 2))
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, num_steps)

    def make(self, num_steps: int, keep: Any = False) -> optax.GradientTransformation:
        """`keep` (bool, may be traced) leaves the moments as they are: the step is to be skipped."""
        b1, b2 = (jnp.where(keep, 1.0, b) for b in (self.b1, self.b2))
        adamw = optax.adamw(self.schedule(num_steps), b1, b2, weight_decay=self.weight_decay, mask=decays)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw) if self.clip_norm else adamw


def decays(params):
    """True for the kernels of linear maps: embeddings, norms and the mask token are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)
