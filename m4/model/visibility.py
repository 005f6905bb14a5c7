"""Which keys a query may see, as a rule instead of a matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Visible(NamedTuple):
    """Which keys each query sees, as a rule: those of its own segment whose rank is not above its own.

    A key of segment -1 is seen by none. Axes of one element stand for all. Within a segment, keys stand in order of
    rank: kernels rely on it (`m4.model.kernels.splash`).
    """

    query_segment: Int[Array, "_ _"]  # [B T]
    query_rank: Int[Array, "_ _"]
    key_segment: Int[Array, "_ S"]  # [B S]
    key_rank: Int[Array, "_ S"]

    @classmethod
    def keys(cls, valid: Bool[Array, "B S"]) -> Visible:
        """All queries see the keys that are valid."""
        zero = jnp.zeros((1, 1), jnp.int32)
        return cls(zero, zero, jnp.where(valid, 0, -1), jnp.zeros_like(valid, jnp.int32))

    def mask(self) -> Bool[Array, "_ _ S"]:
        same = self.query_segment[:, :, None] == self.key_segment[:, None]
        return same & (self.key_rank[:, None] <= self.query_rank[:, :, None])
