"""Accuracy of depth maps on object pixels: delta1, AbsRel, RMSE (Eigen et al. 2014, section 4).

H rows, W columns
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class DepthAccuracy:
    """`value` is delta1: the share of object pixels with max(p / t, t / p) < 1.25; unknown predictions are wrong."""

    metric = "delta1 on object pixels"

    def score(self, predictions: Sequence[np.ndarray], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        pairs = [(p[m], e["depth"][m]) for p, e in zip(predictions, examples, strict=True) if (m := _objects(e)).any()]
        p, t = (np.concatenate(x).astype(np.float64) for x in zip(*pairs, strict=True))
        known = p > 0
        safe = np.where(known, p, 1.0)
        error = np.abs(p - t)
        return {
            "value": float((known & (np.maximum(safe / t, t / safe) < 1.25)).mean()),
            "abs_rel": float((error / t).mean()),
            "rmse_metres": float(np.sqrt((error**2).mean())),
        }

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The training-mean depth map, the same for every example."""
        depth = np.stack([e["depth"] for e in train])
        known = (depth > 0).sum(0)
        mean = np.where(known > 0, depth.sum(0) / np.maximum(known, 1), depth[depth > 0].mean())
        return self.score([mean] * len(examples), examples)


def _objects(example: dict[str, Any]) -> np.ndarray:
    """bool [H W]: pixels of an object whose depth is known."""
    return (example["instance"] > 0) & (example["depth"] > 0)
