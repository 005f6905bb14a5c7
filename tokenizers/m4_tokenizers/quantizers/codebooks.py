"""Shared by quantizers: nearest codes, k-means, how much of a codebook is used.

N vectors, C codebooks, K codes, D dimensions, d = D / C; `...` any leading axes
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

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

    A code that is nearest to no vector moves to one drawn with probability proportional to its squared error.
    """
    if len(vectors) < num_codes:
        raise ValueError(f"{num_codes} codes need at least as many vectors, but {len(vectors)} were given")
    rng = np.random.default_rng(seed)
    vectors = np.ascontiguousarray(vectors, np.float32)
    sample = vectors[rng.permutation(len(vectors))[: max(num_start_vectors, num_codes)]]
    norms = np.einsum("nd,nd->n", sample, sample)
    codes = np.empty((num_codes, vectors.shape[1]), np.float32)
    # k-means++: each next code is a vector drawn with probability proportional to its distance from the codes so far.
    codes[0] = sample[0]
    distances = np.full(len(sample), np.inf, np.float32)
    for k in range(1, num_codes):
        last = codes[k - 1]
        distances = np.minimum(distances, np.maximum(norms - 2 * (sample @ last) + last @ last, 0))
        codes[k] = sample[_draw(distances, 1, rng)[0]]

    # A round: assign, move each used code to the mean of its vectors (summed in sorted order), then move dead codes.
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
    """The share of codes that occur, and the perplexity: the number of equally frequent codes with the same entropy."""
    return use_of_counts(np.bincount(np.ravel(ids), minlength=num_codes))


def use_of_counts(counts: Int[np.ndarray, " K"]) -> dict[str, float]:
    """`code_use` from the count of each code."""
    present = counts[counts > 0] / counts.sum()
    entropy = -np.einsum("k,k->", present, np.log(present))
    return {"codes_used": round(len(present) / len(counts), 4), "perplexity": round(float(np.exp(entropy)), 1)}


class Quantized(NamedTuple):
    """Codes let gradients through to the latents; `loss` is what the quantizer adds to the training loss."""

    codes: Float[Array, "... D"]
    ids: Int[Array, "..."]
    loss: Float[Array, ""]


class Statistic(nnx.Variable):
    """A variable that training updates without a gradient: codes and counts that are moving averages."""


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Quantizer(nnx.Module):
    """The base of quantizers: `update` and `start_from` do nothing unless overridden."""

    def update(self, latents: Float[Array, "... D"], ids: Int[Array, "..."], key: Array) -> None:
        """Updates variables that are not parameters."""

    def start_from(self, latents: Float[np.ndarray, "N D"], *, seed: int) -> None:
        """Fits a codebook to latents of an untrained encoder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebooks:
    """More than one codebook is product quantization: each reads its own part of the latent."""

    num_codes: int = 1024
    """Codes of each codebook."""
    latent_size: int = 32
    """Values of a latent, a multiple of num_codebooks."""
    num_codebooks: int = 1
    """Codebooks, and token ids of each latent."""
    commitment: float = 1.0
    """Weight of the loss that pulls latents to their codes."""

    def __post_init__(self):
        if self.latent_size % self.num_codebooks:
            raise ValueError(f"num_codebooks={self.num_codebooks} does not divide latent_size={self.latent_size}")
