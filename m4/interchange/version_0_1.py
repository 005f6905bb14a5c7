"""Fields of configs that version 0.1 saved, as those of today: run folders and model files go on loading."""

from __future__ import annotations

from typing import Any

from m4.objectives.distillation import Distillation
from m4.objectives.masked_modeling import MaskedModeling
from m4.objectives.word_prediction import WordPrediction


def config_fields(old: dict[str, Any]) -> dict[str, Any]:
    """Objectives had fields of their own: loss, z_loss, teacher, distill and contrast; words were the model's."""
    if "objectives" in old or not {"loss", "z_loss", "teacher", "distill", "contrast"} & {*old}:
        return old
    new = dict(old)
    masked = {name: new.pop(field) for name, field in (("weighting", "loss"), ("z_loss", "z_loss")) if field in new}
    teacher, share, contrast = new.pop("teacher", ""), new.pop("distill", 1.0), new.pop("contrast", None)
    objectives: list[Any] = [
        Distillation(teacher=teacher, share=share, **masked) if teacher else MaskedModeling(**masked)
    ]
    if words := getattr(new.get("model"), "match_words", ""):
        objectives.append(WordPrediction(text=words))
    if contrast is not None:
        objectives.append(contrast)
    return {**new, "objectives": tuple(objectives)}
