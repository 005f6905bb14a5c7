"""Accuracy of classes: of whole samples, and of every pixel.

H rows, W columns
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """`value` is the share of samples whose label (a string) is right."""

    signal: str = "category"
    """Signal that is compared."""

    @property
    def metric(self) -> str:
        return f"accuracy of {self.signal}"

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {"value": float(np.mean([p == e[self.signal] for p, e in zip(predictions, examples, strict=True)]))}

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The most frequent label."""
        label = collections.Counter(e[self.signal] for e in train).most_common(1)[0][0]
        return self.score([label] * len(examples), examples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassMapAccuracy:
    """Maps int [H W] of classes, 0 = background. Among pixels of an object in the truth or the prediction, `value` is
    the share whose class is right, and `foreground` the share that are of an object in both."""

    signal: str = "semseg"
    """Signal that is compared."""

    @property
    def metric(self) -> str:
        return f"accuracy of {self.signal} on objects"

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        predicted, truth = np.stack(predictions), np.stack([e[self.signal] for e in examples])
        objects = (predicted > 0) | (truth > 0)
        count = max(int(objects.sum()), 1)
        return {
            "value": float(((predicted == truth) & objects).sum() / count),
            "foreground": float(((predicted > 0) & (truth > 0)).sum() / count),
        }

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The better of two maps for every example: each pixel's most frequent class, or that of objects alone."""
        maps = np.stack([e[self.signal] for e in train])
        counts = np.stack([(maps == k).sum(axis=0) for k in range(maps.max() + 1)])
        choices = counts.argmax(axis=0), counts[1:].argmax(axis=0) + 1
        choice = max(choices, key=lambda c: self.score([c] * len(train), train)["value"])
        return self.score([choice] * len(examples), examples)
