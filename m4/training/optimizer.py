"""AdamW with warm-up and cosine decay, gradient clipping, weight decay on matrices only, and what is trained at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m4.errors import closest
from m4.model.parameters import matches_pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a cosine to zero at the last step of the run."""

    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0 to its peak."""
    b1: float = 0.9
    """Decay of the gradients' moving mean."""
    b2: float = 0.95
    """Decay of the squared gradients' moving mean."""
    weight_decay: float = 0.05
    """Decoupled weight decay, of matrices only."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    train: tuple[str, ...] = ("*",)
    """Patterns of the parameters that are trained, such as "registers" or "decoder.*"; all others keep their bytes.
    A table's rows are named by modality: "token_embedding[thermal_tokens]"."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained though `train` names them; () is none."""

    def __post_init__(self):
        for field in ("train", "freeze"):
            if isinstance(patterns := getattr(self, field), str):
                raise ValueError(f"{field}={patterns!r} must be a tuple of patterns: ({patterns!r},)")

    def schedule(self, num_steps: int) -> optax.Schedule:
        """A run of a single step has no warm-up, for its step to train."""
        warmup = min(self.warmup_steps, max(1, num_steps // 2)) if num_steps > 1 else 0
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, num_steps)

    def make(self, num_steps: int, is_trained: Any, skip_update: Any = False) -> optax.GradientTransformation:
        """`is_trained`: see there. `skip_update` (bool, may be traced) leaves the moments unchanged."""
        b1, b2 = (jnp.where(skip_update, 1.0, b) for b in (self.b1, self.b2))
        adamw = optax.adamw(self.schedule(num_steps), b1, b2, weight_decay=self.weight_decay, mask=has_weight_decay)
        chain = optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw) if self.clip_norm else adamw
        labels = jax.tree.map(lambda t: t is not False, is_trained, is_leaf=_is_mask)
        if all(jax.tree.leaves(labels)):
            return chain
        return optax.partition({True: chain, False: optax.set_to_zero()}, labels)

    def is_trained(self, params: Any, rows: Mapping[str, Mapping[str, range]] = {}) -> Any:
        """A tree like `params` of bool, or bool [V 1] where only some rows of a table are trained.

        `rows`: of each table by modality. ValueError for a pattern that fits no parameter.
        """
        names = {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        titles = {f"{table}[{m}]" for table, of in rows.items() for m in of}
        for pattern in (*self.train, *self.freeze):
            if not any(matches_pattern(name, pattern) for name in names | titles):
                field = "train" if pattern in self.train else "freeze"
                raise ValueError(f"{field}={pattern!r} fits no parameter; {closest(pattern, sorted(names | titles))}")

        def one(path, x):
            name = _name(path)
            if name not in rows:
                return self._trains(name)
            mask = np.zeros((x.shape[0], 1), bool)
            for m, place in rows[name].items():
                mask[place.start : place.stop] = self._trains(name, f"{name}[{m}]")
            return bool(mask.all()) if mask.all() or not mask.any() else mask

        return jax.tree_util.tree_map_with_path(one, params)

    def _trains(self, *names: str) -> bool:
        any_fits = lambda patterns: any(matches_pattern(name, p) for name in names for p in patterns)  # noqa: E731
        return any_fits(self.train) and not any_fits(self.freeze)


def _is_mask(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def where_trained(trained: Any, x: Any, other: Any) -> Any:
    """x where it is trained, `other` elsewhere, by leaf of `is_trained`."""
    return x if trained is True else other if trained is False else jnp.where(trained, x, other)


def _name(path: Any) -> str:
    """encoder.mlp.up.kernel"""
    return ".".join(str(getattr(k, "key", getattr(k, "name", ""))) for k in path).removesuffix(".value")


def has_weight_decay(params):
    """True for the kernels of linear maps: embeddings, norms and the mask token are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)
