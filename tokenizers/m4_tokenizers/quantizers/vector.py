"""Codebooks of vectors: moving averages, learned from the loss, and memcodes."""

from __future__ import annotations

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m4_tokenizers.quantizers.codebooks import Codebooks, Quantized, Quantizer, Statistic, fit_codebook, unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorQuantizer(Codebooks):
    """Nearest code; codes are moving averages of their latents.

    The loss pulls latents to their codes: commitment x mean squared difference.
    """

    cosine: bool = True
    """Nearest by angle; else by distance."""
    normalize_latents: bool = False
    """The loss compares latents of unit length."""
    decay: float = 0.99
    """Decay of the moving averages."""
    dead_below: float = 0.25
    """A code whose moving count of uses falls below this moves to a random latent; 0: never."""

    def make(self, *, rngs: nnx.Rngs) -> "VectorQuantizerModule":
        return VectorQuantizerModule(self, rngs=rngs)


class VectorQuantizerModule(Quantizer):
    def __init__(self, c: VectorQuantizer, *, rngs: nnx.Rngs):
        self.config = c
        part = c.latent_size // c.num_codebooks
        codes = jax.random.normal(rngs.params(), (c.num_codebooks, c.num_codes, part))
        self.codes = Statistic(unit(codes) if c.cosine else codes)
        self.counts = Statistic(jnp.ones((c.num_codebooks, c.num_codes)))
        self.sums = None if c.cosine else Statistic(self.codes[...])

    def start_from(self, latents: Float[np.ndarray, "N D"], *, seed: int) -> None:
        c = self.config
        codes = []
        for part in np.split(latents, c.num_codebooks, axis=1):
            part = np.asarray(unit(jnp.asarray(part))) if c.cosine else part
            codes.append(fit_codebook(part, num_codes=c.num_codes, seed=seed))
        self.codes[...] = unit(jnp.asarray(np.stack(codes))) if c.cosine else jnp.asarray(np.stack(codes))
        if self.sums is not None:
            self.sums[...] = self.codes[...] * self.counts[...][..., None]

    def _parts(self, latents: Float[Array, "... D"]) -> Float[Array, "... C d"]:
        parts = einops.rearrange(latents, "... (c d) -> ... c d", c=self.config.num_codebooks)
        return unit(parts) if self.config.normalize_latents else parts

    def _nearest(self, parts: Float[Array, "... C d"]) -> Int[Array, "... C"]:
        codes = self.codes[...]
        if self.config.cosine:
            scores = jnp.einsum("...cd,ckd->...ck", unit(parts), unit(codes))
        else:
            norms = jnp.einsum("ckd,ckd->ck", codes, codes)
            products = jnp.einsum("...cd,ckd->...ck", parts, codes)
            scores = products - 0.5 * norms.reshape((1,) * (parts.ndim - 2) + norms.shape)
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def look_up(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        ids = ids[..., None] if self.config.num_codebooks == 1 else ids
        parts = [codes[ids[..., i]] for i, codes in enumerate(self.codes[...])]
        return jnp.concatenate(parts, axis=-1)

    def __call__(self, latents: Float[Array, "... D"], key: Array | None = None) -> Quantized:
        parts = self._parts(latents)
        ids = jax.lax.stop_gradient(self._nearest(parts))
        ids = ids[..., 0] if self.config.num_codebooks == 1 else ids
        x = einops.rearrange(parts, "... c d -> ... (c d)")
        codes = jax.lax.stop_gradient(self.look_up(ids))
        loss = self.config.commitment * jnp.mean(jnp.square(codes - x))
        return Quantized(x + jax.lax.stop_gradient(codes - x), ids, loss)

    def update(self, latents: Float[Array, "... D"], ids: Int[Array, "..."], key: Array) -> None:
        c = self.config
        parts = einops.rearrange(self._parts(latents), "... c d -> c (...) d")
        parts = unit(parts) if c.cosine else parts
        rows = ids.reshape(-1, c.num_codebooks).T
        # Sums over the latents of each code: a scatter costs N x d, a product with one-hot rows N x K x d.
        counts = jax.vmap(lambda i: jnp.zeros(c.num_codes).at[i].add(1.0))(rows)
        sums = jax.vmap(lambda i, x: jnp.zeros((c.num_codes, x.shape[-1])).at[i].add(x))(rows, parts)
        average = lambda old, new: c.decay * old + (1 - c.decay) * new  # noqa: E731
        codes, new_counts = self.codes[...], average(self.counts[...], counts)
        # By angle, a used code moves towards the mean direction of its latents. By distance, a code is its moving sum
        # over its moving count, smoothed so that none is zero (van den Oord et al. 2017, appendix A.1).
        if c.cosine:
            means = unit(sums / jnp.maximum(counts, 1)[..., None])
            codes = average(codes, jnp.where(counts[..., None] > 0, means, unit(codes)))
        else:
            total = new_counts.sum(-1, keepdims=True)
            smooth = (new_counts + 1e-5) / (total + c.num_codes * 1e-5) * total
            assert self.sums is not None, "cosine codebooks alone have none"
            new_sums = average(self.sums[...], sums)
            codes = new_sums / smooth[..., None]
        # Last, dead codes restart at random latents of this batch, with a count of 1.
        dead = new_counts < c.dead_below
        picks = jax.random.randint(key, dead.shape, 0, parts.shape[1])
        fresh = jnp.take_along_axis(parts, picks[..., None], axis=1)
        self.codes[...] = jnp.where(dead[..., None], fresh, codes)
        self.counts[...] = jnp.where(dead, 1.0, new_counts)
        if self.sums is not None:
            self.sums[...] = jnp.where(dead[..., None], fresh, new_sums)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedVectorQuantizer(Codebooks):
    """Nearest code by distance; codes learn from the loss itself, encoders by straight-through gradients."""

    commitment: float = 0.02
    """Weight of the loss that pulls latents to their codes."""

    def make(self, *, rngs: nnx.Rngs) -> "LearnedVectorQuantizerModule":
        if self.num_codebooks != 1:
            raise ValueError(f"LearnedVectorQuantizer has one codebook, not num_codebooks={self.num_codebooks}")
        return LearnedVectorQuantizerModule(self, rngs=rngs)


class LearnedVectorQuantizerModule(Quantizer):
    def __init__(self, c: LearnedVectorQuantizer, *, rngs: nnx.Rngs):
        self.config = c
        self.codes = nnx.Param(jax.random.normal(rngs.params(), (c.num_codes, c.latent_size)))

    def start_from(self, latents: Float[np.ndarray, "N D"], *, seed: int) -> None:
        self.codes[...] = jnp.asarray(fit_codebook(latents, num_codes=self.config.num_codes, seed=seed))

    def nearest(self, latents: Float[Array, "... D"]) -> Int[Array, "..."]:
        codes = self.codes[...]
        flat = latents.reshape(-1, latents.shape[-1])
        scores = 0.5 * jnp.einsum("kd,kd->k", codes, codes)[None] - jnp.einsum("nd,kd->nk", flat, codes)
        return jnp.argmin(scores, axis=-1).astype(jnp.int32).reshape(latents.shape[:-1])

    def look_up(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.codes[...][ids]

    def __call__(self, latents: Float[Array, "... D"], key: Array | None = None) -> Quantized:
        ids = self.nearest(latents)
        codes = self.look_up(ids)
        loss = self.config.commitment * jnp.mean(jnp.square(latents - jax.lax.stop_gradient(codes)))
        # The gradient of `codes` reaches the codebook and, unchanged, the latents.
        return Quantized(codes + latents - jax.lax.stop_gradient(latents), ids, loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memcodes(Codebooks):
    """Each codebook answers its part of the latent with the value of the best-matching key.

    Keys and values are learned maps of learned codes. In training (with a key) Gumbel noise draws the choice, and
    gradients go through the soft choice (Jang et al. 2017).
    """

    temperature: float = 1.0
    """Temperature of the drawn choice."""

    def make(self, *, rngs: nnx.Rngs) -> "MemcodesModule":
        return MemcodesModule(self, rngs=rngs)


class MemcodesModule(Quantizer):
    def __init__(self, c: Memcodes, *, rngs: nnx.Rngs):
        self.config = c
        part = c.latent_size // c.num_codebooks
        draw = lambda *shape: jax.random.normal(rngs.params(), shape)  # noqa: E731
        self.codes = nnx.Param(draw(c.num_codebooks, c.num_codes, part))
        self.key_kernel = nnx.Param(draw(c.num_codebooks, part, part) * part**-0.5)
        self.value_kernel = nnx.Param(draw(c.num_codebooks, part, part) * part**-0.5)

    def _values(self) -> Float[Array, "C K d"]:
        return jnp.einsum("ckd,cde->cke", self.codes[...], self.value_kernel[...])

    def look_up(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        ids = ids[..., None] if self.config.num_codebooks == 1 else ids
        return jnp.concatenate([values[ids[..., i]] for i, values in enumerate(self._values())], axis=-1)

    def __call__(self, latents: Float[Array, "... D"], key: Array | None = None) -> Quantized:
        c = self.config
        parts = einops.rearrange(latents, "... (c d) -> ... c d", c=c.num_codebooks)
        keys = jnp.einsum("ckd,cde->cke", self.codes[...], self.key_kernel[...])
        scores = jnp.einsum("...cd,ckd->...ck", parts * parts.shape[-1] ** -0.5, keys)
        if key is not None:
            scores = (scores + jax.random.gumbel(key, scores.shape)) / c.temperature
        ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        ids = ids[..., 0] if c.num_codebooks == 1 else ids
        codes = self.look_up(ids)
        if key is not None:
            soft = einops.rearrange(
                jnp.einsum("...ck,ckd->...cd", jax.nn.softmax(scores), self._values()), "... c d -> ... (c d)"
            )
            codes = soft + jax.lax.stop_gradient(codes - soft)
        return Quantized(codes, ids, jnp.zeros(()))
