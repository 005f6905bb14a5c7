"""Accuracy of maps of any quantity, as m4_tokenizers.maps has them.

H rows, W columns
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapAccuracy:
    """`value` is the share of pixels whose error is at most `tolerance`; on objects alone where instances are known."""

    signal: str
    tolerance: float

    @property
    def metric(self) -> str:
        return f"share of {self.signal} within {self.tolerance:g}"

    def score(self, predictions: Sequence[np.ndarray], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        error = np.concatenate(
            [np.abs(p - e[self.signal])[_where(e)].ravel() for p, e in zip(predictions, examples, strict=True)]
        )
        return {"value": float((error <= self.tolerance).mean()), "mean_error": float(error.mean())}

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The mean training map, for every example."""
        return self.score([np.mean([e[self.signal] for e in train], axis=0)] * len(examples), examples)


def _where(example: dict[str, Any]) -> Any:
    return example["instance"] > 0 if "instance" in example else ...
