"""Low-rank updates of linear layers (LoRA, Hu et al. 2022), for all tokens or by each token's modality.

    ModelConfig(extensions=(LoRA(rank=8),))     and    OptimizerConfig(train=("*.lora.*",))

T tokens, D width of what comes in, F of what goes out, R routes (one, or one for each modality)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m4.model.block_inputs import TokenInfo
from m4.model.extensions import Extension
from m4.model.layers import Linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Extension):
    """A change of low rank to each linear map of the blocks: kernel + alpha / rank x A B (Hu et al. 2022, section 4.1).

    A is drawn and B zero: nothing changes at first.
    """

    rank: int = 8
    """Inner size of the two factors A and B, at least 1."""
    alpha: float = 16.0
    """Scale of the change, above 0."""
    routed: bool = False
    """Each modality has its own A and B, and each token is changed by those of its modality."""

    parameters = ("*.lora.*",)

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"{self}: rank must be at least 1 and alpha above 0")

    @property
    def parameters_by_modality(self) -> tuple[str, ...]:
        return self.parameters if self.routed else ()

    @property
    def can_merge(self) -> bool:
        return not self.routed

    def sizes(self) -> dict[str, int]:
        return {"lora.rank": self.rank}

    def wrap(self, module: nnx.Module, config: Any, num_modalities: int, rngs: nnx.Rngs) -> None:
        if isinstance(module, Linear):
            module.add("lora", LowRank(*module.kernel.shape, self, num_modalities if self.routed else 1, rngs=rngs))


class LowRank(nnx.Module):
    """The pairs A, B of a linear map: one for all tokens, or one for each of R modalities."""

    def __init__(self, num_in: int, num_out: int, c: LoRA, num_routes: int, *, rngs: nnx.Rngs):
        self.per_token, self.scale = c.routed, c.alpha / c.rank
        self.a = nnx.Param(jax.random.normal(rngs.extensions(), (num_routes, num_in, c.rank)) * num_in**-0.5)
        self.b = nnx.Param(jnp.zeros((num_routes, c.rank, num_out)))

    def change(self) -> Float[Array, "D F"]:
        return jnp.matmul(self.a[0], self.b[0]) * self.scale

    def __call__(self, x: Float[Array, "T D"], info: TokenInfo) -> Float[Array, "T F"]:
        """Tokens before the inputs have no modality, and no change."""
        route = jax.nn.one_hot(info.modality, len(self.a[...]))
        inner = jnp.einsum("td,rdk->trk", x, self.a[...].astype(x.dtype)) * route[..., None].astype(x.dtype)
        return jnp.einsum("trk,rkf->tf", inner, self.b[...].astype(x.dtype)) * self.scale
