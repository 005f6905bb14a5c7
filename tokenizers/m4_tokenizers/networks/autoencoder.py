"""Encoder, quantizer and decoder of a recipe in one module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int


class VQ(nnx.Module):
    """Encoder, quantizer and decoder of a recipe (vq.VQRecipe). Class maps (integers) are embedded first."""

    def __init__(self, c: Any, *, rngs: nnx.Rngs):
        sizes = {"latent_size": c.quantizer.latent_size, "grid": c.grid}
        num_channels = c.embedding_size or c.num_classes or c.num_channels
        rows = jnp.eye(c.num_classes)
        if c.embedding_size:
            rows = jax.random.normal(rngs.params(), (c.num_classes, c.embedding_size))
        self.class_embedding = nnx.Param(rows) if c.num_classes else None
        self.encoder = c.encoder.make(num_channels=num_channels, rngs=rngs, **sizes)
        self.quantizer = c.quantizer.make(rngs=rngs)
        self.decoder = c.decoder.make(num_channels=c.num_classes or c.num_channels, rngs=rngs, **sizes)

    def embed(self, x: Array | np.ndarray) -> Float[Array, "B H W C"]:
        return jnp.asarray(x) if self.class_embedding is None else self.class_embedding[...][x]

    def start_from(self, x: np.ndarray, *, seed: int) -> None:
        """Fits the parts that can be fitted before training: principal components, then k-means of latents."""
        embedded = np.asarray(self.embed(x))
        for part in (self.encoder, self.decoder):
            if hasattr(part, "start_from"):
                part.start_from(embedded)
        graph, state = nnx.split(self)
        # Passed as arguments: on CPU, arrays that a jitted function closed over were read before they were written.
        encode = jax.jit(lambda state, x: nnx.merge(graph, state).latent(x))
        latents = np.concatenate([np.asarray(encode(state, x[i : i + 64])) for i in range(0, len(x), 64)])
        self.quantizer.start_from(latents.reshape(-1, latents.shape[-1]), seed=seed)

    def latent(self, x: Array) -> Float[Array, "B h w D"]:
        return self.encoder(self.embed(x))

    def encode(self, x: Array) -> Int[Array, "B h w *C"]:
        return self.quantizer(self.latent(x)).ids

    def decode(self, ids: Int[Array, "B h w *C"]) -> Float[Array, "B H W C"]:
        return self.decoder(self.quantizer.look_up(ids))


def check_finite(arrays: np.ndarray) -> None:
    """ValueError that names the signal with values that are not finite."""
    finite = np.isfinite(arrays).reshape(len(arrays), -1)
    if not finite.all():
        i = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise ValueError(f"signal {i} has {int((~finite[i]).sum())} values that are not finite")
