"""Classifier-free guidance: several passes of the model, each without some of its inputs, combined into one.

B rows, P passes, O open tokens, D width, S steps
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence as Seq
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from m4.errors import check_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022): logits = without + scale x (with - without).

    With pairs (name, weight) as scale: without + sum_i weight_i x (with condition i - without), where pass i sees one
    condition and all inputs that no pair names (Liu et al. 2022; negative weights lead away).
    """

    scale: float | tuple[tuple[str, float], ...] = 3.0
    """One value for all conditions together, or pairs (name, weight) for several. A name may be that of an input given
    twice ("caption#not"), which is read by its own pass alone."""
    drop: tuple[str, ...] = ()
    """Inputs that the pass without conditions lacks, where `scale` is one value; () is all."""
    grow: bool = False
    """With `drop` empty, it lacks what earlier stages generated too."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Scales over the steps: constant, or rising from 1 (linear, cosine)."""
    dropped_sequences: Literal["absent", "masked"] = "absent"
    """A dropped sequence is "absent", or leaves its first sentinel as if it were "masked" whole, as in 4M."""

    def __post_init__(self):
        check_choice(self, "schedule", ("constant", "linear", "cosine"))
        check_choice(self, "dropped_sequences", ("absent", "masked"))
        scales = [w for _, w in self.scale] if isinstance(self.scale, tuple) else [self.scale]
        if not scales or not all(math.isfinite(w) for w in scales):
            raise ValueError(f"{self}: scales must be finite numbers")
        names = [name for name, _ in self.scale] if isinstance(self.scale, tuple) else []
        if len(set(names)) < len(names):
            raise ValueError(f"{self}: each name may have one scale")

    def passes(self, inputs: Seq[str], generated: Seq[str], key_of: Any) -> list[set[str]]:
        """Names that each pass lacks; `key_of` maps a user's name to that of a record."""
        # A tagged input ("caption#not") is a condition of its own pass alone: all others lack it.
        tagged = {n for n in inputs if "#" in n}
        if isinstance(self.scale, tuple):
            named = [key_of(name) for name, _ in self.scale]
            return [tagged | {*named}, *((tagged | {*named}) - {name} for name in named)]
        dropped = {key_of(name) for name in self.drop} or {*inputs, *(generated if self.grow else ())}
        return [tagged | dropped, tagged]

    def weights(self, progress: Float[Array, "*S"]) -> Float[Array, "*S P"]:
        """Factors of the passes' logits, which add up to 1. `progress`: share of the steps that are done, in [0, 1]."""
        rise = {"constant": jnp.ones_like(progress), "linear": progress, "cosine": (1 - jnp.cos(jnp.pi * progress)) / 2}
        scales = [weight for _, weight in self.scale] if isinstance(self.scale, tuple) else [self.scale]
        start = 0 if self.schedule == "constant" else 1
        factors = [start + (scale - start) * rise[self.schedule] for scale in scales]
        return jnp.stack([1 - sum(factors), *factors], axis=-1)


def guided(hidden: Float[Array, "BP O D"], weights: Float[Array, "B P"]) -> Float[Array, "B O D"]:
    """Weighted sums over passes. Logits are linear in hidden vectors, so that summing these needs one output layer."""
    if weights.shape[1] == 1:
        return hidden
    passes = hidden.reshape(*weights.shape, *hidden.shape[1:])
    return jnp.einsum("bpod,bp->bod", passes.astype(jnp.float32), weights).astype(hidden.dtype)
