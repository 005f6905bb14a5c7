"""Maps of any quantity as a grid of learned tokens: temperature, elevation, bands of a satellite, a tissue's density.

Axes: N maps, H rows, W columns, C channels; signals are float32 [H W] of one channel, else [H W C], in `units`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from m4_tokenizers.modalities.image import check_arrays, write_array, write_image
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.vq import VQRecipe, VQTokenizer

DARK_TO_LIGHT = np.array(
    [[20, 11, 52], [87, 16, 110], [156, 41, 99], [213, 72, 65], [245, 125, 21], [250, 193, 39], [252, 255, 164]]
)


def shade(level: Float[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Levels from 0 to 1 as colours: low dark, high light."""
    place = level * (len(DARK_TO_LIGHT) - 1)
    channels = [np.interp(place, np.arange(len(DARK_TO_LIGHT)), DARK_TO_LIGHT[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapRecipe(VQRecipe):
    """Values of any quantity, with the same range in all channels.

    MapRecipe(signal="thermal", name="thermal_tokens", lowest=0, highest=80, units="degrees Celsius")
    """

    lowest: float
    """Smallest value; smaller ones are clipped."""
    highest: float
    """Largest value; larger ones are clipped."""
    units: str = ""
    """Unit of the values, for pictures and tables."""
    channels: int = 1
    """Channels of a map."""
    quantizer: Any = LearnedVectorQuantizer(num_codes=512)
    """Latents -> token ids (m4_tokenizers.quantizers)."""

    kind = "map"

    def __post_init__(self):
        super().__post_init__()
        if not self.lowest < self.highest or self.channels < 1:
            raise ValueError(
                f"a map needs lowest < highest and at least one channel; got {self.lowest=}, {self.highest=}, "
                f"{self.channels=}"
            )

    @property
    def num_channels(self) -> int:
        return self.channels

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.image_size, self.image_size) + ((self.channels,) if self.channels > 1 else ())

    @property
    def values(self) -> str:
        return f"{self.units} from {self.lowest:g} to {self.highest:g}".strip()

    def to_arrays(self, signals: Seq[Any]) -> Float[np.ndarray, "N H W C"]:
        maps = check_arrays(signals, self.shape, f"a map of {self.signal}")
        with np.errstate(over="ignore"):
            maps = maps.astype(np.float32)
        if not np.isfinite(maps).all():
            raise ValueError(f"a map of {self.signal} has numbers that are not finite; fill them, or leave the map out")
        span = self.highest - self.lowest
        middle = np.median(maps.reshape(len(maps), -1), axis=1)
        for value in middle[(middle < self.lowest - span) | (middle > self.highest + span)]:
            raise ValueError(
                f"a map of {self.signal} has a median of {value:,.4g}, but this tokenizer reads {self.values}: are its "
                "units others?"
            )
        position = 2 * (maps.clip(self.lowest, self.highest) - self.lowest) / span - 1
        return position.reshape(len(maps), self.image_size, self.image_size, self.channels)

    def to_signals(self, arrays: Float[np.ndarray, "N H W C"]) -> list[Any]:
        maps = self.lowest + (arrays.clip(-1, 1) + 1) / 2 * (self.highest - self.lowest)
        return list(maps.astype(np.float32).reshape(-1, *self.shape))

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """Mean absolute error and its root mean square, in units."""
        error = np.stack(decoded) - np.stack(given)
        return {"mean_error": float(np.abs(error).mean()), "rms_error": float(np.sqrt((error**2).mean()))}


class MapTokenizer(VQTokenizer):
    component = "map"

    def average(self, signals: Seq[Any]) -> Any:
        return np.mean(signals, axis=0)

    def write(self, signal: np.ndarray, folder: Path, *, image: np.ndarray | None) -> None:
        write_array(signal, folder, f"{self.modality.signal}.npy")
        write_image(self.draw(signal, image=image), folder, f"{self.modality.signal}.png")

    def draw(self, signal: np.ndarray, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        """One channel: low dark, high light. Else the first three channels as red, green and blue (two: no blue)."""
        level = (self.recipe.to_arrays([signal])[0] + 1) / 2
        if self.recipe.channels == 1:
            return shade(level[..., 0])
        colours = np.zeros((*level.shape[:2], 3))
        colours[..., : min(3, self.recipe.channels)] = level[..., :3]
        return np.round(colours * 255).astype(np.uint8)


MapRecipe.tokenizer_class = MapTokenizer
