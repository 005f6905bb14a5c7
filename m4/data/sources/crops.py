"""Aligned random crops and mirror images of raw examples, for all their signals at once.

Axes: H rows and W columns of an image, h and w of its crop, n boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from m4.tokens.tokenizer import Examples

# Signals that are images if their arrays have these kinds of dtype and this which of axes; else they hold tokens.
PICTURES = {"rgb": ("u", 3), "depth": ("f", 2), "normals": ("f", 3), "semseg": ("iu", 2), "instance": ("iu", 2)}


@dataclass(frozen=True, kw_only=True)
class Crops:
    """How `Cropped` draws square crops of examples, the same for all signals."""

    num: int = 1
    """Crops of each example."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest side of a crop, as shares of the reference image's shorter side, in (0, 1]; (1, 1) takes the
    centre."""
    flip: bool = True
    """Mirror half of the crops."""
    size: int | None = None
    """Pixels of a side that crops are resized to; None keeps their pixels."""
    min_visible: float = 0.25
    """Smallest share of a box's area within the crop with which the box is kept, in (0, 1]."""

    def __post_init__(self):
        if self.num < 1:
            raise ValueError(f"num is {self.num}, but must be at least 1")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale is {self.scale}, but must be (smallest, largest) with 0 < smallest <= largest <= 1"
            )
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size}, but must be at least 1, or None to keep the pixels")
        if not 0 < self.min_visible <= 1:
            raise ValueError(f"min_visible is {self.min_visible}, but must be above 0 and at most 1")

    def of(self, examples: Examples, *, seed: int) -> "Cropped":
        """Crops of all examples, `num` of each."""
        return Cropped(examples, self, seed)

    def draw(self, height: int, width: int, rng: np.random.Generator) -> "Crop":
        """A crop of an image of `height` x `width` pixels: a square of whole pixels."""
        shorter = min(height, width)
        side = max(1, round(rng.uniform(*self.scale) * shorter))
        if tuple(self.scale) == (1, 1):
            top, left = (height - side) // 2, (width - side) // 2
        else:
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        flipped = self.flip and bool(rng.random() < 0.5)
        return Crop(top / height, left / width, (top + side) / height, (left + side) / width, flipped)


class Crop(NamedTuple):
    """A part of an image, as shares of its height and width in [0, 1], and whether it is mirrored after cropping."""

    ymin: float
    xmin: float
    ymax: float
    xmax: float
    flipped: bool

    def picture(
        self, name: str, pixels: Shaped[np.ndarray, "H W ..."], size: int | None
    ) -> Shaped[np.ndarray, "h w ..."]:
        """The part of [H W ...] with edges at the nearest pixels, at least one; resized to [size size ...] if given.

        rgb is resized with an antialiased bicubic filter, all others take the nearest pixel: no invented surfaces,
        classes or directions.
        """
        rows = _nearest(self.ymin, self.ymax, pixels.shape[0])
        columns = _nearest(self.xmin, self.xmax, pixels.shape[1])
        part = pixels[rows, columns]
        if size is not None and name == "rgb":
            part = np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BICUBIC))
        elif size is not None:
            part = part[np.ix_(*(((np.arange(size) + 0.5) * length / size).astype(int) for length in part.shape[:2]))]
        part = part[:, ::-1].copy() if self.flipped else part.copy()
        if self.flipped and name == "normals":
            part[..., 0] = 0 - part[..., 0]  # x points right; not -part, which would make zeros negative
        return part

    def boxes(self, boxes: dict[str, Any], min_visible: float) -> dict[str, Any]:
        """bbox [n 4] and n labels, in coordinates of the crop, without boxes less visible than `min_visible`."""
        lowest, highest = np.split(np.asarray(boxes["bbox"], np.float64).reshape(-1, 4), 2, axis=1)  # [n 2] of (y, x)
        start, stop = np.array([self.ymin, self.xmin]), np.array([self.ymax, self.xmax])
        low, high = np.maximum(lowest, start), np.minimum(highest, stop)
        extent = highest - lowest
        visible = np.where(extent > 0, (high - low).clip(0) / np.where(extent > 0, extent, 1), high >= low).prod(axis=1)
        kept = visible >= min_visible
        bbox = (np.concatenate([low - start, high - start], axis=1) / np.tile(stop - start, 2))[kept].clip(0, 1)
        if self.flipped:
            bbox[:, [1, 3]] = 1 - bbox[:, [3, 1]]
        labels = [label for label, is_kept in zip(boxes["label"], kept, strict=True) if is_kept]
        return {"bbox": bbox.astype(np.float32), "label": labels}


@dataclass(frozen=True)
class Cropped:
    """A sequence of crops: indices i * num to i * num + num - 1 are those of raw example i.

    The reference image is the first in an example of rgb, depth, normals, semseg and instance; a crop is a square of
    its pixels. What becomes of the signals:

        these five, and arrays [H W ...] of the reference's height and width    cropped, mirrored, resized
        normals     their x component changes sign when mirrored, for it points right (as y points down, z forward)
        boxes       cropped, mirrored, in coordinates of the crop
        texts       unchanged: a caption may say "left", or describe what is outside of the crop
        crop        added: float32 [5], (ymin, xmin, ymax, xmax) of the reference in [0, 1], and 1 if mirrored, else 0

    Images of other sizes than the reference are cropped at the same shares, with edges at the nearest pixels. All other
    signals (poses, vectors of a whole image, tokens) are a ValueError unless the crop is the whole image, not mirrored,
    since their crop is not known. Crops depend on (seed, i, index of the crop) and the image's size alone.
    """

    examples: Examples
    crops: Crops
    seed: int

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must be at least 0")

    def __len__(self) -> int:
        return len(self.examples) * self.crops.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"crop {index} of {count}")
        place, crop_index = divmod(int(index) % count, self.crops.num)
        example = self.examples[place]
        file = f" ({example['file']})" if "file" in example else ""
        if "crop" in example:
            raise ValueError(f"example {place}{file} is a crop already")
        if all(map(_is_text, example.values())):  # text alone
            return example
        extent = next((example[name].shape[:2] for name in PICTURES if _is_picture(name, example, None)), None)
        if extent is None:
            raise ValueError(f"example {place}{file} has no picture to crop, but: {', '.join(example)}")
        crop = self.crops.draw(*extent, np.random.default_rng([self.seed, place, crop_index]))
        cropped = {}
        for name, value in example.items():
            if _is_picture(name, example, extent):
                cropped[name] = crop.picture(name, value, self.crops.size)
            elif name == "boxes" and isinstance(value, dict):
                cropped[name] = crop.boxes(value, self.crops.min_visible)
            elif _is_text(value) or crop == (0, 0, 1, 1, False):
                cropped[name] = value
            else:
                kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
                raise ValueError(
                    f"{name} ({kind}) of example {place}{file} cannot be cropped: it is neither words, nor boxes, "
                    f"nor of {extent[0]} x {extent[1]} pixels"
                )
        return cropped | {"crop": np.array(crop, np.float32)}


def _nearest(start: float, stop: float, length: int) -> slice:
    first = min(int(start * length + 0.5), length - 1)
    return slice(first, max(first + 1, int(stop * length + 0.5)))


def _is_picture(name: str, example: dict[str, Any], extent: tuple[int, int] | None) -> bool:
    if name not in example or not isinstance(example[name], np.ndarray):
        return False
    value = example[name]
    if name in PICTURES:
        kinds, num_axes = PICTURES[name]
        return value.dtype.kind in kinds and value.ndim == num_axes
    return value.ndim >= 2 and value.shape[:2] == extent


def _is_text(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_text, value.values()))
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(map(_is_text, value)))
