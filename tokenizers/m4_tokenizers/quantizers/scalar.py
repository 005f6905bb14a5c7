"""Quantizers without a codebook: levels of each value (FSQ), and its sign (LFQ)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m4_tokenizers.quantizers.codebooks import Quantized, Quantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiniteScalarQuantizer:
    """Each value of a latent is rounded to one of a few in [-1, 1]; there is no codebook to learn."""

    levels: tuple[int, ...] = (8, 8, 8, 5, 5)
    """Number of levels of each dimension of a latent, at least 3. Their product is the number of codes."""

    num_codebooks = 1

    def __post_init__(self):
        if min(self.levels) < 3:
            raise ValueError(f"levels={self.levels}: each must be at least 3 (two levels are a LookupFreeQuantizer)")

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)

    @property
    def latent_size(self) -> int:
        return len(self.levels)

    def make(self, *, rngs: nnx.Rngs) -> "FiniteScalarQuantizerModule":
        return FiniteScalarQuantizerModule(self)


class FiniteScalarQuantizerModule(Quantizer):
    def __init__(self, c: FiniteScalarQuantizer):
        self.config = c

    def _row(self, values: Array | np.ndarray, like: Array) -> Array:
        return jnp.asarray(values.reshape((1,) * (like.ndim - 1) + (-1,)))

    def __call__(self, latents: Float[Array, "... D"], key: Array | None = None) -> Quantized:
        levels = np.array(self.config.levels)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = np.where(levels % 2, 0.0, 0.5)
        # Bound to the range of the levels (an even number of them is off by half), round, let gradients pass unchanged.
        half, offset, shift = (
            self._row(x.astype(np.float32), latents) for x in (half, offset, np.arctanh(offset / half))
        )
        bounded = jnp.tanh(latents + shift) * half - offset
        steps = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        middle = self._row(levels // 2, latents)
        strides = self._row(np.concatenate([[1], np.cumprod(levels[:-1])]), latents)
        ids = jnp.sum((jax.lax.stop_gradient(steps).astype(jnp.int32) + middle) * strides, axis=-1)
        return Quantized(steps / middle, ids.astype(jnp.int32), jnp.zeros(()))

    def look_up(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        levels = np.array(self.config.levels)
        strides, middle = np.concatenate([[1], np.cumprod(levels[:-1])]), levels // 2
        ids = ids[..., None]
        steps = ids // self._row(strides, ids) % self._row(levels, ids)
        return (steps - self._row(middle, ids)) / self._row(middle.astype(np.float32), ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupFreeQuantizer:
    """The signs of a latent's values are the bits of its id.

    The loss favours confident choices and an evenly used codebook: entropy x (mean entropy of a latent's choice -
    entropy of the mean choice); and latents near their signs.
    """

    num_bits: int = 10
    """Values of a latent, and bits of its id: 2^num_bits codes."""
    commitment: float = 0.02
    """Weight of the squared distance between latents and their signs."""
    entropy: float = 0.01
    """Weight of the entropy loss."""
    temperature: float = 1.0
    """Softness of the choice in the entropy loss; higher is softer."""

    num_codebooks = 1

    @property
    def num_codes(self) -> int:
        return 2**self.num_bits

    @property
    def latent_size(self) -> int:
        return self.num_bits

    def make(self, *, rngs: nnx.Rngs) -> "LookupFreeQuantizerModule":
        return LookupFreeQuantizerModule(self)


class LookupFreeQuantizerModule(Quantizer):
    def __init__(self, c: LookupFreeQuantizer):
        self.config = c

    def look_up(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        bits = np.arange(self.config.num_bits).reshape((1,) * ids.ndim + (-1,))
        return ((ids[..., None] >> bits) & 1) * 2.0 - 1.0

    def __call__(self, latents: Float[Array, "... D"], key: Array | None = None) -> Quantized:
        c = self.config
        bits = (latents > 0).astype(jnp.int32)
        ids = jnp.sum(bits << np.arange(c.num_bits).reshape((1,) * (bits.ndim - 1) + (-1,)), axis=-1)
        codes = bits * 2.0 - 1.0
        # p of each bit; a latent's choice is their product, the mean choice a mean of products over all codes.
        flat = latents.reshape(-1, c.num_bits) * (4 / c.temperature)
        plus, minus = jax.nn.log_sigmoid(flat), jax.nn.log_sigmoid(-flat)
        own_entropy = -jnp.mean(jnp.sum(jnp.exp(plus) * plus + jnp.exp(minus) * minus, axis=-1))
        signs = (np.arange(c.num_codes)[:, None] >> np.arange(c.num_bits)[None]) & 1
        share = jnp.exp(plus @ signs.T.astype(np.float32) + minus @ (1 - signs.T).astype(np.float32)).mean(0)
        used_entropy = -jnp.sum(share * jnp.log(share + 1e-9))
        loss = c.entropy * (own_entropy - used_entropy)
        loss = loss + c.commitment * jnp.mean(jnp.square(latents - jax.lax.stop_gradient(codes)))
        return Quantized(latents + jax.lax.stop_gradient(codes - latents), ids.astype(jnp.int32), loss)
