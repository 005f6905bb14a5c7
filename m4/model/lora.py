"""Low-rank updates of linear layers (LoRA, Hu et al. 2021)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """A change of low rank to each linear map of the blocks: kernel + alpha / rank x A B (Hu et al. 2022, section 4.1).

    A is drawn and B zero: nothing changes at first.
    """

    rank: int = 8
    """Inner size of the two factors A and B, at least 1."""
    alpha: float = 16.0
    """Scale of the change, above 0."""
    routed: bool = False
    """Each modality has its own A and B, and each token is changed by those of its modality."""

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"{self}: rank must be at least 1 and alpha above 0")


class LowRank(nnx.Module):
    """The pairs A, B of a linear map: one for all tokens, or one for each of R routes."""

    def __init__(self, num_in: int, num_out: int, c: LoRA, num_routes: int, *, rngs: nnx.Rngs):
        self.routed, self.scale = c.routed, c.alpha / c.rank
        self.a = nnx.Param(jax.random.normal(rngs.lora(), (num_routes, num_in, c.rank)) * num_in**-0.5)
        self.b = nnx.Param(jnp.zeros((num_routes, c.rank, num_out)))

    def change(self) -> Float[Array, "D F"]:
        return jnp.matmul(self.a[0], self.b[0]) * self.scale

    def __call__(self, x: Float[Array, "T D"], route: Float[Array, "T R"]) -> Float[Array, "T F"]:
        inner = jnp.einsum("td,rdk->trk", x, self.a[...].astype(x.dtype)) * route[..., None].astype(x.dtype)
        return jnp.einsum("trk,rkf->tf", inner, self.b[...].astype(x.dtype)) * self.scale
