"""Signals as patches, their position tables, and the base of decoders.

B batch, H rows and W columns of pixels, C channels, h rows and w columns of tokens, D values of a latent, P values of a
patch (channels fastest)
"""

from __future__ import annotations

from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

Shape = tuple[int, int]


class Table(nnx.Variable):
    """An array of a module that is not trained."""


class DecoderModule(nnx.Module):
    """Codes [B h w D] -> signals [B H W C]."""

    def compare(self, codes: Array, x: Array, key: Array) -> tuple[Array, Array]:
        """(prediction, target) for the training loss: here the reconstruction and the signal itself."""
        return self(codes), x


def to_patches(pixels: Shaped[Any, "B H W C"], patch_size: int) -> Shaped[Any, "B h w P"]:
    if pixels.shape[1] % patch_size or pixels.shape[2] % patch_size:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[2]} is no multiple of patch_size={patch_size}")
    return einops.rearrange(pixels, "n (h p) (w q) c -> n h w (p q c)", p=patch_size, q=patch_size)


def to_pixels(patches: Shaped[Any, "B h w P"], patch_size: int) -> Shaped[Any, "B H W C"]:
    return einops.rearrange(patches, "n h w (p q c) -> n (h p) (w q) c", p=patch_size, q=patch_size)


def sine_cosine_grid(height: int, width: int, size: int) -> Float[np.ndarray, "h w D"]:
    """ml-4m's position table of a grid: sines and cosines of one axis, then of the other.

    As in ml-4m, both axes divide by the height, which matters only for grids that are not square.
    """
    if size % 4:
        raise ValueError(f"position tables need a width that is a multiple of 4, not {size}")
    frequencies = np.float32(1) / np.power(np.float32(10_000), np.arange(size // 4, dtype=np.float32) / (size // 4))
    raster = np.arange(height * width)
    slow, fast = (x.astype(np.float32)[:, None] * frequencies for x in (raster // height, raster % height))
    table = np.concatenate([np.sin(slow), np.cos(slow), np.sin(fast), np.cos(fast)], axis=1)
    return table.astype(np.float32).reshape(height, width, size)


def cubic_weights(num_in: int, num_out: int) -> Float[np.ndarray, "O I"]:
    """Bicubic resampling of one axis as torch does it: a = -0.75, half-pixel centres, repeated border, no antialias."""
    a = -0.75
    source = (np.arange(num_out) + 0.5) * (num_in / num_out) - 0.5
    first = np.floor(source).astype(int)
    weights = np.zeros((num_out, num_in))
    for offset in (-1, 0, 1, 2):
        d = np.abs(source - (first + offset))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(weights, (np.arange(num_out), np.clip(first + offset, 0, num_in - 1)), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


def resize_table(table: Float[Array, "h w D"], shape: Shape) -> Float[Array, "H W D"]:
    """A position table at another resolution; unchanged at its own."""
    if table.shape[:2] == tuple(shape):
        return table
    rows, columns = cubic_weights(table.shape[0], shape[0]), cubic_weights(table.shape[1], shape[1])
    return jnp.einsum("Hh,hwd,Ww->HWd", rows, table, columns, precision="highest")
