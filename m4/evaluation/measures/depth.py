"""Accuracy of depth maps: delta1, AbsRel, RMSE (Eigen et al. 2014, section 4); on objects, where they are known.

H rows, W columns
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from m4.evaluation.measures.maps import object_pixels


@dataclasses.dataclass(frozen=True)
class DepthAccuracy:
    """`value` is delta1: the share of object pixels with max(p / t, t / p) < 1.25; unknown predictions are wrong.

    Object pixels are those of instances above 0 whose depth is known; all pixels with known depth where examples have
    no "instance", or no instance at all.
    """

    metric = "delta1 on object pixels"

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        where = [o & (e["depth"] > 0) for o, e in zip(object_pixels(examples), examples, strict=True)]
        if not any(w.any() for w in where):  # no object has depth: all pixels with depth
            where = [e["depth"] > 0 for e in examples]
        if not any(w.any() for w in where):
            raise ValueError(f"no pixel of {len(examples)} examples has a known depth")
        pairs = [(p[w], e["depth"][w]) for p, e, w in zip(predictions, examples, where, strict=True)]
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
