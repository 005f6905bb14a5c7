"""Quantizers: latent vectors -> token ids -> codes, and how much of a codebook is used.

    VectorQuantizer           nearest code; codebooks are moving averages      van den Oord et al. 2017, appendix A.1
    LearnedVectorQuantizer    nearest code; codebooks learn from the loss      the same, section 3.2, without its stops
    Memcodes                  best key of each codebook, its value             4M-21's vectors (lucidrains' NWT)
    FiniteScalarQuantizer     each number rounded to a few levels              Mentzer et al. 2023
    LookupFreeQuantizer       each number's sign                               Yu et al. 2023 (MAGVIT-v2), section 3.1

Each is a frozen dataclass that says `num_codes`, `num_codebooks` and `latent_size`, and `make` builds its module:

    module(latents [... D], key) -> Quantized(codes [... D], ids [...], loss)     trained through, straight
    module.look_up(ids [...]) -> codes [... D]
    module.update(latents, ids, key)       what training does besides gradients (moving averages, dead codes)
    module.start_from(latents, seed)       a first fit, before any training

With more than one codebook ids have a last axis C. A new quantizer is one more such pair, here or in a file of its own.

N vectors, C codebooks, K codes, D dimensions, d = D / C; `...` any leading axes
"""

import dataclasses
import math
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

CHUNK = 8192  # vectors compared with the codebook at once: the distances stay within the processor's cache


def nearest_codes(
    vectors: Float[np.ndarray, "N D"], codes: Float[np.ndarray, "K D"]
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """The index of each vector's nearest code, and its squared distance."""
    half_norms = 0.5 * np.einsum("kd,kd->k", codes, codes)
    ids, distances = np.empty(len(vectors), np.int32), np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK]
        # The vector's own norm does not change which code is nearest: it is added to the one distance that is kept.
        scores = half_norms - part @ codes.T
        best = scores.argmin(axis=1)
        ids[start : start + CHUNK] = best
        least = np.take_along_axis(scores, best[:, None], axis=1)[:, 0]
        distances[start : start + CHUNK] = 2 * least + np.einsum("nd,nd->n", part, part)
    return ids, np.maximum(distances, 0)


def fit_codebook(
    vectors: Float[np.ndarray, "N D"],
    *,
    num_codes: int,
    seed: int,
    num_rounds: int = 6,
    num_start_vectors: int = 16_384,
) -> Float[np.ndarray, "K D"]:
    """K-means: a k-means++ start on a sample (Arthur & Vassilvitskii 2007), then rounds over all vectors.

    A code that nothing is nearest to moves to a vector drawn with probability proportional to its squared error.
    """
    if len(vectors) < num_codes:
        raise ValueError(f"{num_codes} codes need at least as many vectors, but {len(vectors)} were given")
    rng = np.random.default_rng(seed)
    vectors = np.ascontiguousarray(vectors, np.float32)
    sample = vectors[rng.permutation(len(vectors))[: max(num_start_vectors, num_codes)]]
    norms = np.einsum("nd,nd->n", sample, sample)
    codes = np.empty((num_codes, vectors.shape[1]), np.float32)
    codes[0] = sample[0]
    distances = np.full(len(sample), np.inf, np.float32)
    for k in range(1, num_codes):
        last = codes[k - 1]
        distances = np.minimum(distances, np.maximum(norms - 2 * (sample @ last) + last @ last, 0))
        codes[k] = sample[_draw(distances, 1, rng)[0]]

    for _ in range(num_rounds):
        ids, distances = nearest_codes(vectors, codes)
        counts = np.bincount(ids, minlength=num_codes)
        order = np.argsort(ids, kind="stable")
        used = np.flatnonzero(counts)
        starts = np.concatenate([[0], np.cumsum(counts[used])[:-1]])
        codes[used] = np.add.reduceat(vectors[order], starts, axis=0) / counts[used, None]
        dead = np.flatnonzero(counts == 0)
        codes[dead] = vectors[_draw(distances, len(dead), rng)]
    return codes


def _draw(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices with probabilities proportional to `weights`."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    return np.minimum(np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right"), len(weights) - 1)


def code_use(ids: Int[np.ndarray, "..."], num_codes: int) -> dict[str, float]:
    """The share of codes that occur, and the perplexity: how many codes equally frequent ones would be."""
    return use_of_counts(np.bincount(np.ravel(ids), minlength=num_codes))


def use_of_counts(counts: Int[np.ndarray, " K"]) -> dict[str, float]:
    """`code_use` of how often each code occurs."""
    present = counts[counts > 0] / counts.sum()
    entropy = -np.einsum("k,k->", present, np.log(present))
    return {"codes_used": round(len(present) / len(counts), 4), "perplexity": round(float(np.exp(entropy)), 1)}


class Quantized(NamedTuple):
    """Codes let gradients through to the latents; `loss` is what the quantizer adds to the training loss."""

    codes: Float[Array, "... D"]
    ids: Int[Array, "..."]
    loss: Float[Array, ""]


class Statistic(nnx.Variable):
    """What training moves without a gradient: codes and counts that are moving averages."""


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Quantizer(nnx.Module):
    """What quantizers share: nothing happens in `update` and `start_from` unless they say so."""

    def update(self, latents: Float[Array, "... D"], ids: Int[Array, "..."], key: Array) -> None:
        """Moves what is no parameter."""

    def start_from(self, latents: Float[np.ndarray, "N D"], *, seed: int) -> None:
        """Fits a codebook to latents of an untrained encoder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebooks:
    """`num_codebooks` > 1 is product quantization: each codebook reads its own part of the latent."""

    num_codes: int = 1024
    latent_size: int = 32
    num_codebooks: int = 1
    commitment: float = 1.0

    def __post_init__(self):
        if self.latent_size % self.num_codebooks:
            raise ValueError(f"num_codebooks={self.num_codebooks} does not divide latent_size={self.latent_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorQuantizer(Codebooks):
    """Nearest code by angle (`cosine`) or distance; codes follow the latents that they stand for.

    The loss pulls latents to their codes: commitment x mean squared difference, of normalised latents if
    `normalize_latents`. A code whose moving count of uses falls below `dead_below` is put onto a random latent.
    """

    cosine: bool = True
    normalize_latents: bool = False
    decay: float = 0.99
    dead_below: float = 0.25

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
            part = np.asarray(unit(part)) if c.cosine else part
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
        if c.cosine:
            means = unit(sums / jnp.maximum(counts, 1)[..., None])
            codes = average(codes, jnp.where(counts[..., None] > 0, means, unit(codes)))
        else:
            total = new_counts.sum(-1, keepdims=True)
            smooth = (new_counts + 1e-5) / (total + c.num_codes * 1e-5) * total
            new_sums = average(self.sums[...], sums)
            codes = new_sums / smooth[..., None]
        dead = new_counts < c.dead_below
        picks = jax.random.randint(key, dead.shape, 0, parts.shape[1])
        fresh = jnp.take_along_axis(parts, picks[..., None], axis=1)
        self.codes[...] = jnp.where(dead[..., None], fresh, codes)
        self.counts[...] = jnp.where(dead, 1.0, new_counts)
        if not c.cosine:
            self.sums[...] = jnp.where(dead[..., None], fresh, new_sums)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedVectorQuantizer(Codebooks):
    """Nearest code by distance; codes learn from the loss itself, encoders through a straight line."""

    commitment: float = 0.02

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

    Keys and values are learned maps of learned codes. In training (with a key) the choice is drawn, by Gumbel noise at
    `temperature`, and gradients go through the soft choice (Jang et al. 2017).
    """

    temperature: float = 1.0

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiniteScalarQuantizer:
    """Number i of a latent is rounded to one of `levels[i]` values in [-1, 1]; there is no codebook to learn."""

    levels: tuple[int, ...] = (8, 8, 8, 5, 5)

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

    def _row(self, values: Array, like: Array) -> Array:
        return values.reshape((1,) * (like.ndim - 1) + (-1,))

    def __call__(self, latents: Float[Array, "... D"], key: Array | None = None) -> Quantized:
        levels = np.array(self.config.levels)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = np.where(levels % 2, 0.0, 0.5)
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
    """The signs of a latent's numbers are the bits of its id.

    The loss asks for sure choices and an evenly used codebook: entropy x (mean entropy of a latent's choice - entropy
    of the mean choice), the choice being softer the higher `temperature`; and for latents near their signs.
    """

    num_bits: int = 10
    commitment: float = 0.02
    entropy: float = 0.01
    temperature: float = 1.0

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
