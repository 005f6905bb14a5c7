"""Masks of single instances as a grid of learned tokens.

Axes: N masks, H rows, W columns; bool [H W] (a crop around the instance), True = the instance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from m4_tokenizers.losses import AbsoluteError
from m4_tokenizers.modalities.image import check_arrays, write_image
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.vq import VQRecipe, VQTokenizer

Mask = Bool[np.ndarray, "H W"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRecipe(VQRecipe):
    """Masks. Examples without one that have `instance` maps (0 = none) give the mask of their largest instance."""

    signal: str = "mask"
    """Signal that is read."""
    name: str = "mask_tokens"
    """Name of the modality."""
    quantizer: Any = LearnedVectorQuantizer(num_codes=256)
    """Latents -> token ids (m4_tokenizers.quantizers)."""
    losses: tuple[Any, ...] = (AbsoluteError(),)
    """Losses of the reconstruction (m4_tokenizers.losses)."""

    kind = "mask"
    num_channels = 1
    values = "False or True"

    def signal_of(self, example: Mapping[str, Any]) -> Mask | None:
        if self.signal in example or "instance" not in example:
            return super().signal_of(example)
        counts = np.bincount(example["instance"].ravel(), minlength=2)
        return example["instance"] == counts[1:].argmax() + 1

    def to_arrays(self, signals: Seq[Any]) -> Float[np.ndarray, "N H W C"]:
        masks = check_arrays(signals, (self.image_size, self.image_size), "a mask", "b")
        return 2 * masks[..., None].astype(np.float32) - 1

    def to_signals(self, arrays: Float[np.ndarray, "N H W C"]) -> list[Any]:
        return list(arrays[..., 0] > 0)

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """Intersection over union, a mean over masks; two empty masks agree."""
        overlap = [(a & b).sum() / (a | b).sum() if (a | b).any() else 1.0 for a, b in zip(given, decoded, strict=True)]
        return {"iou": float(np.mean(overlap))}


class MaskTokenizer(VQTokenizer):
    component = "mask"

    def write(self, signal: Mask, folder: Path, *, image: np.ndarray | None) -> None:
        write_image(self.draw(signal, image=None)[..., 0], folder, f"{self.modality.signal}.png")

    def draw(self, signal: Mask, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        return np.repeat((signal * 255).astype(np.uint8)[..., None], 3, axis=-1)


MaskRecipe.tokenizer_class = MaskTokenizer
