"""Accuracy of maps of any quantity, as m4_tokenizers.modalities.maps has them.

H rows, W columns
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapAccuracy:
    """`value` is the share of pixels whose error is at most `tolerance`; on objects alone where instances are known
    (`object_pixels`)."""

    signal: str
    """Signal that is compared."""
    tolerance: float
    """Largest error of a pixel that counts as right, in the map's units."""

    @property
    def metric(self) -> str:
        return f"share of {self.signal} within {self.tolerance:g}"

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        where = object_pixels(examples)
        error = np.concatenate(
            [np.abs(p - e[self.signal])[w].ravel() for p, e, w in zip(predictions, examples, where, strict=True)]
        )
        return {"value": float((error <= self.tolerance).mean()), "mean_error": float(error.mean())}

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The better of two maps for every example: the mean of training, and the constant that is best there."""
        maps = [e[self.signal] for e in train]
        values = np.sort(np.concatenate([m[w].ravel() for m, w in zip(maps, object_pixels(train), strict=True)]))
        # The best constant is the middle of the interval, two tolerances long, that holds most values.
        ends = np.searchsorted(values, values + 2 * self.tolerance, side="right")
        best = values[np.argmax(ends - np.arange(len(values)))] + self.tolerance
        constants = np.mean(maps, axis=0), np.full(maps[0].shape, best, np.float32)
        constant = max(constants, key=lambda c: self.score([c] * len(train), train)["value"])
        return self.score([constant] * len(examples), examples)


def object_pixels(examples: Sequence[dict[str, Any]]) -> list[Any]:
    """Pixels of objects in each example (bool [H W]), or True for all its pixels: if it has no "instance", or if no
    example has an instance above 0, which means that none is known."""
    masks = [e["instance"] > 0 if "instance" in e else True for e in examples]
    return masks if any(np.any(m) for m in masks) else [True] * len(examples)
