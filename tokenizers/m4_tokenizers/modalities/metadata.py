"""Numeric facts about an image, each a pair of tokens: the field, and the bin of its value (4M-21's "metadata").

    v1=0 v0=20            v1=9 v0=12     v1=20 v0=1     [EOS]
    original_width = 656  colorfulness   aesthetic      any fields, in the order of the recipe's

A field's id is its index in the recipe's `fields`. Own fields follow FIELDS, which keep 4M's ids:

    MetadataRecipe(fields=(*FIELDS, Bins("cloud_cover", 0, 1, 50)))

Axes: images are uint8 [H W 3]. Source of fields and bins: 4M-21 (Bachmann et al. 2024) and its released code.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageStat

from m4.errors import closest
from m4.files import parse_json
from m4.tokens.modality import Sequence
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.coordinates import CoordinateRecipe, CoordinateTokenizer, Pair, as_picture
from m4_tokenizers.modalities.text import EOS

Metadata = dict[str, int | float]  # {field: number}
FIELD, VALUE = 1, 0  # axes


@runtime_checkable
class Field(Protocol):
    """A field's name and bins. `bin` accepts any finite number, and bin(value(index)) == index for all num_bins."""

    @property
    def name(self) -> str: ...

    @property
    def num_bins(self) -> int: ...

    def bin(self, value: float) -> int: ...

    def value(self, index: int) -> int | float: ...


@dataclasses.dataclass(frozen=True)
class Whole:
    """Whole numbers from 0; larger ones than the last bin's are clipped."""

    name: str
    """Name of the field."""
    step: int = 1
    """Values of a bin."""
    num_bins: int = 1000
    """Bins."""

    def bin(self, value: float) -> int:
        if value != int(value):
            raise ValueError(f"{self.name}={value} must be a whole number")
        return min(max(int(value) // self.step, 0), self.num_bins - 1)

    def value(self, index: int) -> int:
        return index * self.step + self.step // 2


@dataclasses.dataclass(frozen=True)
class Bins:
    """num_bins - 1 bins of equal width over [low, high), and as in 4M-21 a last one for `high` itself."""

    name: str
    """Name of the field."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    num_bins: int
    """Bins, at least 2."""

    def __post_init__(self):
        if self.num_bins < 2 or not self.low < self.high:
            raise ValueError(f"{self}: allowed are low < high and at least 2 bins")

    def bin(self, value: float) -> int:
        inside = min(max(value, self.low), self.high)
        return int((float(inside) - self.low) / (self.high - self.low) * (self.num_bins - 1))

    def value(self, index: int) -> float:
        centre = self.low + (index + 0.5) * (self.high - self.low) / (self.num_bins - 1)
        return float(min(centre, self.high))


@dataclasses.dataclass(frozen=True)
class Steps:
    """A bin between each two edges, the lower one included; values beyond the outer edges are clipped."""

    name: str
    """Name of the field."""
    edges: tuple[float, ...]
    """Rising edges between bins, at least 2."""

    def __post_init__(self):
        if len(self.edges) < 2 or any(a >= b for a, b in itertools.pairwise(self.edges)):
            raise ValueError(f"{self}: allowed are at least 2 edges, each above the one before")

    @property
    def num_bins(self) -> int:
        return len(self.edges) - 1

    def bin(self, value: float) -> int:
        return bisect.bisect_right(self.edges[1:-1], value)

    def value(self, index: int) -> float:
        return (self.edges[index] + self.edges[index + 1]) / 2


FIELDS: tuple[Field, ...] = (
    *(Whole(name, step=32) for name in ("original_width", "original_height")),
    *(Whole(f"caption_n_{name}") for name in ("chars", "words", "sentences")),
    *(Whole(name) for name in ("n_humans", "n_sam_instances", "n_coco_instances", "coco_instance_diversity")),
    Bins("colorfulness", 0, 150, 50),
    Bins("brightness", 0, 255, 50),
    Bins("contrast", 0, 127, 50),
    Bins("saturation", 0, 255, 50),
    Bins("entropy", 0, 10, 50),
    Bins("walkability", 0, 1, 50),
    Bins("objectness", 0, 1, 50),
    Whole("semantic_diversity"),
    Bins("geometric_complexity", 0, 0.75, 50),
    Bins("occlusion_score", 0, 0.25, 50),
    Steps("watermark_score", (0, 0.5, 1)),
    Steps("aesthetic_score", (1, 4.5, 5.5, 10)),  # the outer edges, of the score's scale, only set the bins' centres
)


def image_metadata(image: Any) -> Metadata:
    """The values of FIELDS that can be computed from pixels. ValueError unless the image is uint8 [H W 3].

    original_width and original_height in pixels; the mean (brightness), the standard deviation (contrast) and the
    entropy in bits of grey levels (ITU-R BT.601); the mean saturation in HSV, 0 to 255; colorfulness after Hasler and
    Süsstrunk (2003), 0 for grey, 109 for "extremely colourful".
    """
    picture = as_picture(image)
    grey = picture.convert("L")
    statistics = ImageStat.Stat(grey)
    red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    spread, offset = np.hypot(*opponents.std(axis=(1, 2))), np.hypot(*opponents.mean(axis=(1, 2)))
    return {
        "original_width": picture.width,
        "original_height": picture.height,
        "colorfulness": float(spread + 0.3 * offset),
        "brightness": statistics.mean[0],
        "contrast": statistics.stddev[0],
        "saturation": ImageStat.Stat(picture.convert("HSV")).mean[1],
        "entropy": grey.entropy(),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetadataRecipe(CoordinateRecipe):
    """Fields of two tokens each. 4M-21's modality has max_length=40: 19 fields."""

    signal: str = "metadata"
    """Signal that is read."""
    name: str = "metadata"
    """Name of the modality."""
    fields: tuple[Field, ...] = FIELDS
    """Fields that an example may have, with their bins."""
    max_length: int = 64
    """Tokens of an example, at most."""

    kind = "metadata"

    def __post_init__(self):
        super().__post_init__()
        names = [field.name for field in self.fields]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated or not names:
            raise ValueError(f"fields {repeated} are given twice; names must differ" if names else "no fields given")

    @property
    def modality(self) -> Sequence:
        """A field and its value are one chunk: both are masked, or neither."""
        first = self.layout.first_coordinate + FIELD * self.layout.num_bins
        return dataclasses.replace(super().modality, chunk_ids=(first, first + self.layout.num_bins))

    @property
    def num_bins(self) -> int:
        return max([len(self.fields), *(field.num_bins for field in self.fields)])

    def fit(self, source: Examples, *, seed: int) -> "MetadataTokenizer":
        card = {"component": "metadata", "values": f"numbers of {len(self.fields)} fields"}
        return self.measured(MetadataTokenizer(recipe=self, card=card), source, seed=seed)


class MetadataTokenizer(CoordinateTokenizer):
    def to_pairs(self, signal: Any) -> list[Pair]:
        """ValueError on anything but a dict of known fields and finite numbers."""
        if not isinstance(signal, Mapping):
            raise ValueError(f"{type(signal).__name__} was given; allowed: a dict of field names and numbers")
        names = [field.name for field in self.recipe.fields]
        for name, value in signal.items():
            if name not in names:
                raise ValueError(f"unknown metadata field {name!r}; {closest(str(name), names)}")
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not -math.inf < value < math.inf:
                raise ValueError(f"metadata {name}={value!r} must be a finite number")
        present = [(i, field) for i, field in enumerate(self.recipe.fields) if field.name in signal]
        return [pair for i, field in present for pair in ((FIELD, i), (VALUE, field.bin(signal[field.name])))]

    def from_pairs(self, pairs: list[Pair]) -> Metadata:
        """Centres of bins, in the order of the recipe's fields; the last one where a field is repeated."""
        fields, bins = self.recipe.fields, {}
        for (first, i), (second, index) in itertools.pairwise(pairs):
            if (first, second) == (FIELD, VALUE) and i < len(fields) and index < fields[i].num_bins:
                bins[i] = index
        return {fields[i].name: fields[i].value(bins[i]) for i in sorted(bins)}

    @functools.cached_property
    def grammar(self) -> Any:
        """Fields and their values in turn, each value one that its field has."""
        from m4.tokens.grammar import Grammar  # here: reading data must not load JAX

        fields, values = (self.layout.first_coordinate + axis * self.layout.num_bins for axis in (FIELD, VALUE))
        sizes = sorted({f.num_bins for f in self.recipe.fields})
        # A field's class is its number of bins; a value's class, which of these numbers exceed it.
        kinds = np.full(self.modality.vocab_size, 2 * len(sizes), np.int32)
        for i, field in enumerate(self.recipe.fields):
            kinds[fields + i] = sizes.index(field.num_bins)
        kinds[values : values + sizes[-1]] = len(sizes) + np.searchsorted(sizes, np.arange(sizes[-1]), side="right")
        end = kinds[EOS] = 2 * len(sizes) + 1
        start = {**{i: i + 1 for i in range(len(sizes))}, end: -1}
        return Grammar.make(
            kinds, [start, *({len(sizes) + k: 0 for k in range(i + 1)} for i in range(len(sizes)))], end_id=EOS
        )

    def from_text(self, text: str) -> Metadata:
        """`colorfulness=40,n_humans=2`, or `{"colorfulness": 40, "n_humans": 2}`."""
        try:
            if text.lstrip().startswith("{"):
                metadata = parse_json(text)
            else:
                pairs = [pair.split("=") for pair in text.split(",")]
                metadata = {name.strip(): parse_json(number) for name, number in pairs}
                if len(metadata) < len(pairs):
                    raise ValueError("a field is given twice")
            self.to_pairs(metadata)
        except ValueError as error:
            raise ValueError(
                f'metadata must be like colorfulness=40,n_humans=2, JSON like {{"n_humans": 2}}, or the path of a '
                f"JSON file, not {text[:60]!r}: {error}"
            ) from error
        return metadata

    def write(self, signal: Metadata, folder: Path, *, image: np.ndarray | None) -> None:
        """<signal>.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(signal, indent=2, ensure_ascii=False, default=np.generic.item)
        (Path(folder) / f"{self.modality.signal}.json").write_text(text + "\n", encoding="utf-8")

    def draw(self, signal: Metadata, *, image: np.ndarray | None) -> UInt8[np.ndarray, "h h 3"]:
        """A line for each field, in black on a white tile."""
        lines = [f"{name} = {value:g}" for name, value in signal.items()]
        side = max(192, 8 + 14 * len(lines))
        tile = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(tile).multiline_text((4, 4), "\n".join(lines), fill="black", spacing=3)
        return np.asarray(tile)


MetadataRecipe.tokenizer_class = MetadataTokenizer
