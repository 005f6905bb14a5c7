"""Accuracy of objects in generated captions and images of scenes: attributes, colours, foreground.

H rows, W columns
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from m4.data.sources.scene_rules import attribute_counts, micro_f1, read_colours, segment_objects


@dataclasses.dataclass(frozen=True)
class CaptionAttributes:
    """`value` is micro-F1 over (object, attribute) pairs, objects matched by shape; `exact` = every pair right."""

    metric = "micro-F1 of (object, attribute) pairs"

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        counts = [attribute_counts(p, e["caption"]) for p, e in zip(predictions, examples, strict=True)]
        return {"value": micro_f1(counts), "exact": float(np.mean([tp == n == t for tp, n, t in counts]))}

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The most frequent training caption, for every example."""
        caption = collections.Counter(e["caption"] for e in train).most_common(1)[0][0]
        return self.score([caption] * len(examples), examples)


@dataclasses.dataclass(frozen=True)
class ObjectColours:
    """`value` is micro-F1 of the set of object colours that a rule reads from the pixels."""

    metric = "F1 of object colours read from pixels"

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        counts = []
        for p, e in zip(predictions, examples, strict=True):
            predicted, truth = read_colours(p), {o["colour"] for o in e["objects"]}
            counts.append((len(predicted & truth), len(predicted), len(truth)))
        return {"value": micro_f1(counts)}

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The mean training image."""
        mean = np.mean([e["rgb"] for e in train], axis=0).astype(np.uint8)
        return self.score([mean] * len(examples), examples)


@dataclasses.dataclass(frozen=True)
class ForegroundOverlap:
    """`value` is the mean intersection over union of the objects segmented from the pixels and the true mask."""

    metric = "foreground IoU"

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        return self._overlap([segment_objects(p) for p in predictions], examples)

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The training-mean mask, at the threshold that is best on the training examples."""
        mean = np.mean([e["instance"] > 0 for e in train], axis=0)
        scores = {
            t: self._overlap([mean > t] * len(train), train)["value"]
            for t in np.quantile(mean, np.linspace(0, 0.95, 20))
        }
        return self._overlap([mean > max(scores, key=scores.__getitem__)] * len(examples), examples)

    def _overlap(self, masks: Sequence[np.ndarray], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        pairs = [(m, e["instance"] > 0) for m, e in zip(masks, examples, strict=True)]
        return {"value": float(np.mean([(m & t).sum() / max((m | t).sum(), 1) for m, t in pairs]))}
