"""Edges as a grid of learned tokens, computed from the image where they are not given.

Axes: N images, H rows, W columns; float32 [H W] in [0, 1], 1 = edge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from m4_tokenizers.modalities.image import check_arrays, write_image
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.vq import VQRecipe, VQTokenizer

Edges = Float[np.ndarray, "H W"]


def canny(image: UInt8[np.ndarray, "H W 3"], *, sigma: float = 1.0, low: float = 0.05, high: float = 0.15) -> Edges:
    """Canny's edges (1986): ridges of the smoothed gradient above `low` that touch one above `high`."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    smooth = ndimage.gaussian_filter(grey, sigma, mode="nearest")
    dy, dx = (ndimage.sobel(smooth, axis, mode="nearest") / 4 for axis in (0, 1))
    strength = np.hypot(dy, dx)
    # A ridge is at least as strong as both neighbours along the gradient (to 45 degrees).
    octant = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    padded, ridge = np.pad(strength, 1), np.zeros(strength.shape, bool)
    for direction, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        shifted = [padded[1 + s * y :, 1 + s * x :][: strength.shape[0], : strength.shape[1]] for s in (1, -1)]
        ridge |= (octant == direction) & (strength >= shifted[0]) & (strength > shifted[1])
    weak = ridge & (strength > low)
    labels, count = ndimage.label(weak, np.ones((3, 3)))
    strong = np.unique(labels[weak & (strength > high)])
    return np.isin(labels, strong[strong > 0]).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgesRecipe(VQRecipe):
    """Maps in [0, 1], computed by `canny` for examples that have an image only."""

    signal: str = "edges"
    """Signal that is read."""
    name: str = "edges_tokens"
    """Name of the modality."""
    sigma: float = 1.0
    """Width of the smoothing before edges are found, pixels."""
    low: float = 0.05
    """Strength above which pixels belong to an edge that touches a strong one."""
    high: float = 0.15
    """Strength above which an edge is strong."""
    quantizer: Any = LearnedVectorQuantizer(num_codes=512)
    """Latents -> token ids (m4_tokenizers.quantizers)."""

    kind = "edges"
    num_channels = 1
    values = "0 to 1, 1 = edge"

    def signal_of(self, example: Mapping[str, Any]) -> Edges | None:
        if self.signal in example or "rgb" not in example:
            return super().signal_of(example)
        return canny(example["rgb"], sigma=self.sigma, low=self.low, high=self.high)

    def to_arrays(self, signals: Seq[Any]) -> Float[np.ndarray, "N H W C"]:
        edges = check_arrays(signals, (self.image_size, self.image_size), "an edge map", "biuf").astype(np.float32)
        if edges.size and not (edges.min() >= 0 and edges.max() <= 1):
            raise ValueError(f"edges from {edges.min():.3g} to {edges.max():.3g} were given; allowed: 0 to 1")
        return 2 * edges[..., None] - 1

    def to_signals(self, arrays: Float[np.ndarray, "N H W C"]) -> list[Any]:
        return list(((arrays[..., 0] + 1) / 2).clip(0, 1).astype(np.float32))

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """F1 of edge pixels (above 1/2), where a pixel is a match if one of the other map is within a pixel of it."""
        a, b = np.stack(given) > 0.5, np.stack(decoded) > 0.5
        near_a, near_b = (ndimage.maximum_filter(x, (1, 3, 3)) for x in (a, b))
        precision, recall = (b & near_a).sum() / max(b.sum(), 1), (a & near_b).sum() / max(a.sum(), 1)
        return {"f1": float(2 * precision * recall / max(precision + recall, 1e-9))}


class EdgesTokenizer(VQTokenizer):
    component = "edges"

    def write(self, signal: Edges, folder: Path, *, image: np.ndarray | None) -> None:
        write_image(self.draw(signal, image=image)[..., 0], folder, f"{self.modality.signal}.png")

    def draw(self, signal: Edges, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        return np.repeat(np.round(signal * 255).astype(np.uint8)[..., None], 3, axis=-1)


EdgesRecipe.tokenizer_class = EdgesTokenizer
