"""Semantic maps as a grid of learned tokens: class indices in, class scores out.

Axes: N images, H rows, W columns, K classes; int [H W] class indices.
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from m4_tokenizers.losses import CrossEntropy
from m4_tokenizers.modalities.image import check_arrays, write_image
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.vq import VQRecipe, VQTokenizer

ClassMap = Int[np.ndarray, "H W"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticRecipe(VQRecipe):
    """Maps of classes, read through an embedding or as one-hot vectors."""

    signal: str = "semseg"
    """Signal that is read."""
    name: str = "semseg_tokens"
    """Name of the modality."""
    num_classes: int = 6
    """Classes."""
    embedding_size: int = 0
    """Values of each class's learned vector; 0 is one-hot."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in pictures and errors; () is none."""
    quantizer: Any = LearnedVectorQuantizer(num_codes=512)
    """Latents -> token ids (m4_tokenizers.quantizers)."""
    losses: tuple[Any, ...] = (CrossEntropy(),)
    """Losses of the reconstruction (m4_tokenizers.losses)."""

    kind = "classes"
    num_channels = 1

    @property
    def values(self) -> str:
        return f"class indices, 0 to {self.num_classes - 1}"

    def to_arrays(self, signals: Seq[Any]) -> Int[np.ndarray, "N H W"]:
        maps = check_arrays(signals, (self.image_size, self.image_size), "a class map", "iu")
        if maps.size and not 0 <= maps.min() <= maps.max() < self.num_classes:
            raise ValueError(f"class ids {maps.min()} to {maps.max()} were given; allowed: 0 to {self.num_classes - 1}")
        return maps.astype(np.int32)

    def to_signals(self, arrays: Float[np.ndarray, "N H W K"]) -> list[Any]:
        return list(arrays.argmax(axis=-1).astype(np.int32))

    def mean_signal(self, arrays: np.ndarray) -> Any:
        """The most frequent class of each pixel."""
        counts = np.stack([(arrays == k).sum(axis=0) for k in range(self.num_classes)])
        return counts.argmax(axis=0).astype(np.int32)

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """Pixel accuracy, and intersection over union, a mean over the classes that occur."""
        a, b = np.stack(given), np.stack(decoded)
        classes = [k for k in range(self.num_classes) if (a == k).any()]
        overlap = [((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in classes]
        return {"miou": float(np.mean(overlap)), "accuracy": float((a == b).mean())}


class SemanticTokenizer(VQTokenizer):
    component = "semseg"

    def write(self, signal: ClassMap, folder: Path, *, image: np.ndarray | None) -> None:
        """<signal>.png of class indices, <signal>_color.png to look at."""
        dtype = np.uint8 if self.recipe.num_classes <= 256 else np.uint16
        write_image(signal.astype(dtype), folder, f"{self.modality.signal}.png")
        write_image(self.draw(signal, image=image), folder, f"{self.modality.signal}_color.png")

    def draw(self, signal: ClassMap, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        hues = (np.arange(self.recipe.num_classes) * 0.618) % 1  # the golden angle keeps neighbours apart
        colours = np.array([colorsys.hsv_to_rgb(h, 0.65, 0.9) for h in hues])
        return (colours[signal] * 255).astype(np.uint8)


SemanticRecipe.tokenizer_class = SemanticTokenizer
