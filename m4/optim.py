"""AdamW with warm-up and cosine decay, gradient clipping, weight decay on matrices only, and what is trained at all."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import optax

from m4.components import closest


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Peak learning rate after `warmup_steps`, cosine to zero at the last step of the run. clip_norm=0: no clipping.

    `train`: patterns of the parameters that are trained ("shot_encoder*", "decoder.*"); all others keep their bytes.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    train: tuple[str, ...] = ("*",)

    def schedule(self, num_steps: int) -> optax.Schedule:
        warmup = min(self.warmup_steps, max(1, num_steps // 2))
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, num_steps)

    def make(self, num_steps: int, keep: Any = False) -> optax.GradientTransformation:
        """`keep` (bool, may be traced) leaves the moments as they are: the step is to be skipped."""
        b1, b2 = (jnp.where(keep, 1.0, b) for b in (self.b1, self.b2))
        adamw = optax.adamw(self.schedule(num_steps), b1, b2, weight_decay=self.weight_decay, mask=decays)
        chain = optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw) if self.clip_norm else adamw
        if self.train == ("*",):
            return chain
        return optax.partition({True: chain, False: optax.set_to_zero()}, self.is_trained)

    def is_trained(self, params: Any) -> Any:
        """A tree of bool. ValueError for a pattern that fits no parameter."""
        names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern in self.train:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"train={pattern!r} fits no parameter; {closest(pattern, names)}")
        fits = lambda path, _: any(fnmatch.fnmatchcase(_name(path), p) for p in self.train)  # noqa: E731
        return jax.tree_util.tree_map_with_path(fits, params)


def _name(path: Any) -> str:
    """encoder.mlp.up.kernel"""
    return ".".join(str(getattr(k, "key", getattr(k, "name", ""))) for k in path).removesuffix(".value")


def decays(params):
    """True for the kernels of linear maps: embeddings, norms and the mask token are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)
