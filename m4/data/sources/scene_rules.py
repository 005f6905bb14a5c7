"""Reads scenes by rule, for evaluation: attributes from captions, colours and foregrounds from pixels.

Axes: H rows, W columns, C colour channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from m4.data.sources.rendering import COLOURS, NAMES, VARIANTS

Object = Mapping[str, str]  # shape, colour, size, material: those that are known

ATTRIBUTES = {  # what the captions of each variant mention
    name: ("colour", "size", "material") if variant.phrasings else ("colour", "size")
    for name, variant in VARIANTS.items()
}

_ATTRIBUTE_OF = {word: attribute for attribute, words in NAMES.items() for word in words}
_BOUNDARIES = {"a", "an", "and", "of", "the", "there", "is", "to", "which", "in", ",", ".", ":", ";"}


def parse_caption(text: str) -> list[dict[str, str]]:
    """The objects that a caption names, in its order; text that names none, junk included, gives none.

    A shape closes an object with the attributes since the last boundary (article, comma, "and", ...):

        a small red cube , which is left of a large blue thing and a sphere
          [size  col shape]                  (dropped: no shape)     [shape]
    """
    objects, attributes = [], {}
    for word in re.findall(r"[a-z]+|[,.:;]", text.lower()):
        if word in _BOUNDARIES:
            attributes = {}
        elif word in _ATTRIBUTE_OF:
            attributes[_ATTRIBUTE_OF[word]] = word
            if word in NAMES["shape"]:
                objects.append(attributes)
                attributes = {}
    return objects


def attribute_counts(
    predicted: str, truth: Sequence[Object] | str, attributes: Iterable[str] | None = None
) -> tuple[int, int, int]:
    """True positives, predictions and truths, each a count of (object, attribute) pairs.

    Objects of one shape are matched so that they agree best; an unmatched object is a false alarm or a miss in all its
    attributes. The shape itself is not counted, since objects are matched by it. Only `attributes` count; by default
    those that the truth mentions, so give `ATTRIBUTES["simple"]` if the truth is a list of objects that knows more than
    a simple caption says.
    """
    from scipy.optimize import linear_sum_assignment  # here, since it loads slowly and configs name this file

    truth = parse_caption(truth) if isinstance(truth, str) else truth
    counted = set(attributes) if attributes is not None else {name for thing in truth for name in thing}
    counted -= {"shape"}
    # Pairs rather than dictionaries: the agreement of two objects is the size of an intersection.
    pairs = lambda thing: (thing["shape"], {(name, thing[name]) for name in counted & thing.keys()})  # noqa: E731
    claimed, true = [pairs(thing) for thing in parse_caption(predicted)], [pairs(thing) for thing in truth]
    hits = 0
    for shape in NAMES["shape"]:
        left = [attributes for name, attributes in claimed if name == shape]
        right = [attributes for name, attributes in true if name == shape]
        if left and right:
            agreement = np.array([[len(a & b) for b in right] for a in left])
            hits += int(agreement[linear_sum_assignment(agreement, maximize=True)].sum())
    return hits, sum(len(attributes) for _, attributes in claimed), sum(len(attributes) for _, attributes in true)


def micro_f1(counts: Iterable[tuple[int, int, int]]) -> float:
    """F1 over all samples together; 0 when nothing was right."""
    hits, num_predicted, num_truth = np.sum([(0, 0, 0), *counts], axis=0)
    return float(2 * hits / max(num_predicted + num_truth, 1))


def _hue_saturation_value(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value in [0, 1], each [H W]; light and shadow leave hue and saturation alone."""
    channels = rgb.astype(np.float32) / 255
    value, chroma = channels.max(-1), np.ptp(channels, axis=-1)
    red, green, blue = np.moveaxis(channels, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(value == red, (green - blue) / safe, np.where(value == green, (blue - red) / safe + 2, 0))
    hue = np.where((value == blue) & (value != red) & (value != green), (red - green) / safe + 4, hue)
    return hue * 60 % 360, chroma / np.maximum(value, 1e-6), value


def _count_neighbours(mask: np.ndarray) -> np.ndarray:
    """How many of the 3 x 3 pixels around each pixel, itself included, are set."""
    height, width = mask.shape
    padded = np.pad(mask.astype(np.int32), 1)
    return np.stack([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]).sum(0, np.int32)


def _vivid(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hues, and where they are those of objects: these are saturated, ground and sky are not."""
    hue, saturation, value = _hue_saturation_value(rgb)
    return hue, (saturation > 0.35) & (value > 0.08)


def read_colours(rgb: np.ndarray, colours: Sequence[str] = tuple(COLOURS), min_area: float = 6 / 4096) -> set[str]:
    """The colours of the objects in an image [H W C] uint8: hues that fill compact patches of vivid pixels.

    A pixel counts if most of its neighbours share its colour: the thin rims of false hues between two objects, which
    blur leaves, do not. `min_area` is the share of the image that must count.
    """
    hue, vivid = _vivid(rgb)
    apart = np.abs((hue[..., None] - np.array([COLOURS[name] for name in colours]) + 180) % 360 - 180)
    nearest = np.where(vivid, apart.argmin(-1), -1)
    patches = [(nearest == i) & (_count_neighbours(nearest == i) >= 6) for i in range(len(colours))]
    return {name for name, patch in zip(colours, patches, strict=True) if patch.sum() >= min_area * patch.size}


def segment_objects(rgb: np.ndarray) -> np.ndarray:
    """Foreground [H W]: vivid pixels without specks, highlights enclosed by them filled in."""
    _, vivid = _vivid(rgb)
    neighbours = _count_neighbours(vivid)
    return (vivid & (neighbours >= 3)) | (neighbours >= 6)
