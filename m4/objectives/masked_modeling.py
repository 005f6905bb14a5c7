"""Masked multimodal modelling: the cross-entropy of masked tokens (4M, Mizrahi et al. 2023, section 2)."""

from __future__ import annotations

import dataclasses
from typing import Any

from m4.model.encoder_decoder import Model, Outputs
from m4.objectives.base import Objective
from m4.objectives.cross_entropy import TeacherOutputs, Weighting, cross_entropy
from m4.tokens.batch import MaskedBatch, token_counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedModeling(Objective):
    """Cross-entropy of each target token over its own modality's vocabulary."""

    weighting: Weighting = "modality"
    """How tokens are averaged: every "modality" counts alike, or every "token"; 4m_modality and 4m_token as in 4M."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of each token's logits, which keeps logits small; 0 is none."""

    name = "masked_modeling"

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"z_loss={self.z_loss} must be at least 0")

    def totals(self, batch: MaskedBatch, model: Model) -> Any:
        return token_counts(batch.targets, len(model.modalities))

    def __call__(self, outputs: Outputs, part: MaskedBatch, totals: Any, loaded: Any):
        return self._loss(outputs, part, totals, None)

    def _loss(self, outputs: Outputs, part: MaskedBatch, totals: Any, taught: TeacherOutputs | None):
        loss, detail = cross_entropy(
            outputs.model, outputs.hidden, part.targets,
            weighting=self.weighting, counts=totals, z_loss=self.z_loss, taught=taught,
        )  # fmt: skip
        return loss, {f"loss/{name}": value for name, value in detail["loss"].items()}
