"""Fields of configs that version 0.1 saved, as those of today: run folders and model files go on loading."""

from __future__ import annotations

from typing import Any

from m4.adaptation.bottleneck import Bottleneck
from m4.adaptation.registers import Registers
from m4.checkpoints.numbered import CheckpointConfig
from m4.in_context.example_encoder import ExampleEncoder
from m4.in_context.independent_items import IndependentItems
from m4.in_context.similarity_prior import SimilarityPrior
from m4.masking.dirichlet import DirichletMasking
from m4.model.layers import BIASES
from m4.objectives.distillation import Distillation
from m4.objectives.masked_modeling import MaskedModeling
from m4.objectives.word_prediction import WordPrediction
from m4.registry import CHECKPOINT_FIELDS, METRICS_FIELDS, component_class
from m4.training.metrics import MetricsConfig


def config_fields(old: dict[str, Any]) -> dict[str, Any]:
    """Objectives had fields of their own: loss, z_loss, teacher, distill and contrast; words were the
    model's. So had evaluators, checkpoints and metrics."""
    new = dict(old)
    groups = ("checkpoints", CheckpointConfig, CHECKPOINT_FIELDS), ("metrics", MetricsConfig, METRICS_FIELDS)
    for group, cls, names in groups:
        if group not in new and {*names} & {*new}:
            new[group] = cls(**{name: new.pop(name) for name in names if name in new})
    names = {"evaluations": "tasks", "eval_splits": "splits", "num_eval_samples": "num_samples"}
    generation = {field: new.pop(name) for name, field in names.items() if name in new}
    few_shot, retrieval = new.pop("fewshot", None), new.pop("retrieval", None)
    several = retrieval if isinstance(retrieval, tuple) else (retrieval,)
    conditional = component_class("ConditionalGeneration")  # by its name, as in a file: its room is not below this one
    first = conditional(**generation) if "tasks" in generation and generation["tasks"] else None
    if evaluators := tuple(e for e in (first, few_shot, *several) if e is not None):
        new["evaluators"] = (*evaluators, *new.get("evaluators", ()))
    if "objectives" in new or not {"loss", "z_loss", "teacher", "distill", "contrast"} & {*new}:
        return new
    masked = {name: new.pop(field) for name, field in (("weighting", "loss"), ("z_loss", "z_loss")) if field in new}
    teacher, share, contrast = new.pop("teacher", ""), new.pop("distill", 1.0), new.pop("contrast", None)
    objectives: list[Any] = [
        Distillation(teacher=teacher, share=share, **masked) if teacher else MaskedModeling(**masked)
    ]
    prior = new["model"].extension(SimilarityPrior) if "model" in new else None
    if prior is not None and prior.words:
        objectives.append(WordPrediction(text=prior.words))
    if contrast is not None:
        objectives.append(contrast)
    return {**new, "objectives": tuple(objectives)}


def model_fields(old: dict[str, Any]) -> dict[str, Any]:
    """Extensions had fields of their own, of which 0 or None left them out; so had biases."""
    fields = (
        "num_registers",
        "num_independent_blocks",
        "shot_depth",
        "match_size",
        "match_words",
        "lora",
        "adapter_size",
    )
    new = dict(old)
    if "biases" not in new:
        new["biases"] = tuple(name for name in BIASES if new.pop(f"{name}_bias", False))
    if "extensions" in new or not {*fields} & {*new}:
        return new
    registers, blocks, depth, size, words, lora, adapter = (new.pop(field, None) for field in fields)
    extensions = (
        Registers(num=registers) if registers else None,
        IndependentItems(num_blocks=blocks) if blocks else None,
        ExampleEncoder(depth=depth) if depth else None,
        SimilarityPrior(size=size, words=words or "") if size else None,
        lora,
        Bottleneck(size=adapter) if adapter else None,
    )
    return {**new, "extensions": tuple(extension for extension in extensions if extension is not None)}


def dataset_fields(old: dict[str, Any]) -> dict[str, Any]:
    """Each masking had a field of its own."""
    if "masking" in old or not {"strategies", "shots"} & {*old}:
        return old
    new = dict(old)
    strategies, episodes = new.pop("strategies", ()), new.pop("shots", None)
    return {**new, "masking": DirichletMasking(strategies=strategies) if strategies else episodes}
