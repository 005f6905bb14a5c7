"""Codebooks: fitting one by k-means, looking vectors up in it, and how much of it is used.

Axes: N vectors, K codes, D dimensions; `...` any leading axes.
"""

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
    shares = np.bincount(np.ravel(ids), minlength=num_codes) / np.size(ids)
    present = shares[shares > 0]
    entropy = -np.einsum("k,k->", present, np.log(present))
    return {"codes_used": round(len(present) / num_codes, 4), "perplexity": round(float(np.exp(entropy)), 1)}


class VectorQuantizer(nnx.Module):
    """Replaces vectors by their nearest codes; codes learn from the loss itself, encoders through a straight line."""

    def __init__(self, codes: Float[Array, "K D"]):
        self.codes = nnx.Param(codes)

    def nearest(self, vectors: Float[Array, "... D"]) -> Int[Array, "..."]:
        codes = self.codes[...]
        flat = vectors.reshape(-1, vectors.shape[-1])
        scores = 0.5 * jnp.einsum("kd,kd->k", codes, codes)[None] - jnp.einsum("nd,kd->nk", flat, codes)
        return jnp.argmin(scores, axis=-1).astype(jnp.int32).reshape(vectors.shape[:-1])

    def look_up(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.codes[...][ids]

    def __call__(self, vectors: Float[Array, "... D"]) -> tuple[Float[Array, "... D"], Float[Array, ""]]:
        """(codes, commitment loss): the loss keeps the encoder's vectors near the codes that they are replaced by."""
        codes = self.look_up(self.nearest(vectors))
        commitment = jnp.mean((vectors - jax.lax.stop_gradient(codes)) ** 2)
        # The gradient of `codes` reaches the codebook and, unchanged, the vectors.
        return codes + vectors - jax.lax.stop_gradient(vectors), commitment
