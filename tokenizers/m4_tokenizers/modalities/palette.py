"""Colour palettes: the main colours of an image, as a signal of its own (4M-21's "color_palette").

    v1=2  v0=255 v0=0 v0=0  v0=0 v0=128 v0=255  [EOS]
    count red    green blue red  green  blue

Axes: n colours, most frequent first, uint8 [n 3]; images are uint8 [H W 3]. A bin is one of the 256 values, so that
colours are decoded exactly. Source of the format: 4M-21 (Bachmann et al. 2024), whose models can be conditioned on it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor

from m4.data.sources.files import from_text
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.coordinates import CoordinateRecipe, CoordinateTokenizer, Pair, as_picture
from m4_tokenizers.modalities.image import write_image
from m4_tokenizers.modalities.text import EOS

Palette = UInt8[np.ndarray, "n 3"]
COUNT, VALUE = 1, 0  # axes
SWATCH = 64  # pixels


def extract_palette(image: Any, num_colors: int) -> Palette:
    """At most `num_colors` colours, most frequent first: median cut, then k-means until nothing changes.

    Nothing is random. An image with no more distinct colours returns exactly those. ValueError unless the image
    is uint8 [H W 3] and num_colors is 1 to 256.
    """
    if not 1 <= num_colors <= 256:
        raise ValueError(f"num_colors={num_colors} must be 1 to 256")
    method, dither = Image.Quantize.MEDIANCUT, Image.Dither.NONE
    quantized = as_picture(image).quantize(num_colors, method=method, kmeans=1, dither=dither)
    pixels = np.asarray(quantized.convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return colours[np.argsort(-counts, kind="stable")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaletteRecipe(CoordinateRecipe):
    """Palettes of 1 to `max_colors` colours, given or read from an image."""

    signal: str = "palette"
    """Signal that is read."""
    name: str = "color_palette"
    """Name of the modality."""
    max_colors: int = 7
    """Colours of a palette, at most."""
    num_colors: int = 5
    """Colours that are read from an image."""
    image_size: int = 64
    """Rows and columns that an image is resized to before its colours are read, pixels."""

    kind = "palette"
    num_bins = 256

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.num_colors <= self.max_colors < self.num_bins:
            raise ValueError(
                f"num_colors={self.num_colors}, max_colors={self.max_colors}; allowed: "
                f"1 <= num_colors <= max_colors < {self.num_bins}"
            )

    @property
    def max_length(self) -> int:
        return 1 + 3 * self.max_colors + 1  # count, colours, [EOS]

    def signal_of(self, example: Mapping[str, Any]) -> Palette | None:
        """The palette of a raw example: its own, that of an image in its place or, else, of its rgb image."""
        own = super().signal_of(example)
        if own is None and "rgb" in example:
            own = example["rgb"]
        return own if own is None or np.ndim(own) != 3 else extract_palette(own, self.num_colors)

    def fit(self, source: Examples, *, seed: int) -> "PaletteTokenizer":
        card = {"component": "palette", "values": f"1 to {self.max_colors} RGB colours, uint8"}
        return self.measured(PaletteTokenizer(recipe=self, card=card), source, seed=seed)


class PaletteTokenizer(CoordinateTokenizer):
    def to_pairs(self, signal: Any) -> list[Pair]:
        """ValueError unless the palette has 1 to max_colors rows of three whole numbers in [0, 255]."""
        palette = np.asarray(signal)
        if palette.ndim != 2 or palette.shape[1] != 3 or not 1 <= len(palette) <= self.recipe.max_colors:
            raise ValueError(
                f"a palette of {list(palette.shape)} was given; allowed: uint8 [n, 3] with n from 1 to "
                f"{self.recipe.max_colors}"
            )
        if palette.dtype.kind not in "ui" or palette.min() < 0 or palette.max() > 255:
            raise ValueError(
                f"colours must be whole numbers in [0, 255], but are {palette.dtype} from {palette.min()} to "
                f"{palette.max()}"
            )
        return [(COUNT, len(palette)), *((VALUE, value) for value in palette.ravel().tolist())]

    def from_pairs(self, pairs: list[Pair]) -> Palette:
        """Each run of three values is a colour; all other pairs, the count too, are skipped."""
        colours, run = [], []
        for axis, value in pairs:
            run = [*run, value] if axis == VALUE and value <= 255 else []
            if len(run) == 3:
                colours.append(run)
                run = []
        return np.array(colours[: self.recipe.max_colors], np.uint8).reshape(-1, 3)

    @functools.cached_property
    def grammar(self) -> Any:
        """A number n of colours, then n colours of three values each."""
        from m4.tokens.grammar import Grammar  # here: reading data must not load JAX

        counts, values = (self.layout.first_coordinate + axis * self.layout.num_bins for axis in (COUNT, VALUE))
        most, kinds = self.recipe.max_colors, np.zeros(self.modality.vocab_size, np.int32)
        kinds[counts + 1 : counts + most + 1] = np.arange(1, most + 1)  # class k: the number k
        value, end = most + 1, most + 2
        kinds[values : values + 256], kinds[EOS] = value, end
        # State 0, then state n: n more values.
        rules = [{k: 3 * k for k in range(1, most + 1)}, {value: 3 * most + 1}]
        rules += [{value: n - 1} for n in range(2, 3 * most + 1)]
        return Grammar.make(kinds, [*rules, {end: -1}], end_id=EOS)

    def from_text(self, text: str) -> Palette:
        """`[[255, 0, 0], ...]`, or `#ff0000,#00ff00`."""
        try:
            if text.lstrip().startswith("#"):
                return from_text(self.kind, "json", str([[*ImageColor.getrgb(c.strip())] for c in text.split(",")]))
            return super().from_text(text)
        except ValueError as error:
            raise ValueError(
                f"a palette must be JSON like [[255, 0, 0], [0, 128, 255]], colours like #ff0000,#0080ff, or the path "
                f"of a JSON or image file, not {text[:60]!r}: {error}"
            ) from error

    def write(self, signal: Palette, folder: Path, *, image: np.ndarray | None) -> None:
        """<signal>.json and, as swatches, <signal>.png."""
        write_image(self.draw(signal, image=image), folder, f"{self.modality.signal}.png")
        path = Path(folder) / f"{self.modality.signal}.json"
        path.write_text(json.dumps(np.asarray(signal).tolist()) + "\n", encoding="utf-8")

    def draw(self, signal: Palette, *, image: np.ndarray | None) -> UInt8[np.ndarray, "h w 3"]:
        """The colours side by side, from the left; white if there are none."""
        colours = np.asarray(signal, np.uint8) if len(signal) else np.full((1, 3), 255, np.uint8)
        return np.repeat(np.repeat(colours[None], SWATCH, axis=0), SWATCH, axis=1)


PaletteRecipe.tokenizer_class = PaletteTokenizer
