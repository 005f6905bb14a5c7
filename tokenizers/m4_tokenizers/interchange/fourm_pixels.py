"""Images as 4M's models read them: the centre square, resized with a bicubic filter, by ImageNet's statistics."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from m4.interchange.fourm import IMAGENET_MEAN, IMAGENET_STD
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.image import PixelPatches, PixelPatchesRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedPixelsRecipe(PixelPatchesRecipe):
    """Patches of 16 x 16 pixels of images that are cropped to whole pixels before they are resized."""

    patch_size: int = 16
    """Rows and columns of a patch, pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, of values in [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel."""

    resampling = "bicubic"

    def fit(self, source: Examples, *, seed: int) -> ReleasedPixels:
        card = super().fit(source, seed=seed).card
        return ReleasedPixels(recipe=self, card={**card, "component": "released_pixels", "resampling": self.resampling})


class ReleasedPixels(PixelPatches):
    """See ReleasedPixelsRecipe."""

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]) -> ReleasedPixels:
        config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
        return cls(recipe=ReleasedPixelsRecipe(**config), card=card)
