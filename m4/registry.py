"""The classes that files may name, and dataclasses to and from JSON. Never a pickle.

A name is either an entry point of the group `m4.components` (how users' packages register theirs) or that of a
dataclass within m4 or m4_tokenizers, never a module: files may move. No code is ever read from a run's folder.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import re
import types
import typing
from pathlib import Path
from typing import Any

from m4.errors import closest
from m4.files import read_json, shown

PACKAGES = ("m4", "m4_tokenizers")


class FreeToChange:
    """Base of those parts of a config that change nothing of what a model learns: a resumed run may have others."""


@functools.cache
def components() -> dict[str, importlib.metadata.EntryPoint]:
    """Classes that a saved file may name: the entry-point group m4.components (never a pickle)."""
    return {e.name: e for e in importlib.metadata.entry_points(group="m4.components")}


@functools.cache
def classes() -> dict[str, str]:
    """Name of each public class of m4 and m4_tokenizers -> its module, read from the sources."""
    modules = {}
    for package in PACKAGES:
        for root in map(Path, importlib.import_module(package).__path__):
            for path in sorted(root.rglob("*.py")):
                module = ".".join((package, *path.relative_to(root).with_suffix("").parts))
                for name in re.findall(r"^class ([A-Z]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE):
                    modules[name] = module
    return modules


# Old names of classes and fields (version 0.1) -> those of today.
RENAMED = {"Direction": "ConditionalTask", "ShotMasking": "EpisodeMasking"}
RENAMED_FIELDS = {
    "ModelConfig": {"separate_depth": "num_independent_blocks"},
    "ConditionalTask": {"measure": "metric", "through": "intermediate"},
}
RENAMED_PARAMETERS = {"shot_embedding": "item_embedding"}  # in files of parameters
# What makes the fields of today from those of 0.1; imported when a file needs it, after renaming.
UPGRADES = {
    "Config": "m4.interchange.version_0_1:config_fields", "ModelConfig": "m4.interchange.version_0_1:model_fields",
    "Dataset": "m4.interchange.version_0_1:dataset_fields",
}  # fmt: skip
CHECKPOINT_FIELDS = ("save_every", "keep_last", "keep_every", "skip_damaged")
METRICS_FIELDS = ("log_every", "gallery_every", "profile", "wandb")
# Python code with these is told what to write instead.
REPLACED_FIELDS = {
    "loss": "objectives=(MaskedModeling(weighting=...),)",
    "z_loss": "objectives=(MaskedModeling(z_loss=...),)",
    "teacher": "objectives=(Distillation(teacher=...),)",
    "distill": "objectives=(Distillation(teacher=..., share=...),)",
    "contrast": "objectives=(MaskedModeling(), Contrast(...))",
    "fewshot": "evaluators=(FewShot(...),)",
    "retrieval": "evaluators=(Retrieval(...),)",
    "evaluations": "evaluators=(ConditionalGeneration(tasks=...),)",
    "eval_splits": "evaluators=(ConditionalGeneration(splits=...),)",
    "num_eval_samples": "evaluators=(ConditionalGeneration(num_samples=...),)",
    **{name: f"checkpoints=CheckpointConfig({name}=...)" for name in CHECKPOINT_FIELDS},
    **{name: f"metrics=MetricsConfig({name}=...)" for name in METRICS_FIELDS},
    "strategies": "masking=DirichletMasking(strategies=...)",
    "shots": "masking=EpisodeMasking(...)",
    "qkv_bias": 'biases=("qkv",)',
    "proj_bias": 'biases=("proj",)',
    "mlp_bias": 'biases=("mlp",)',
    "norm_bias": 'biases=("norm",)',
    "lora": "extensions=(LoRA(...),)",
    "adapter_size": "extensions=(Bottleneck(size=...),)",
    "num_registers": "extensions=(Registers(num=...),)",
    "separate_depth": "extensions=(IndependentItems(num_blocks=...),)",
    "num_independent_blocks": "extensions=(IndependentItems(num_blocks=...),)",
    "match_size": "extensions=(SimilarityPrior(size=...),)",
    "match_words": "extensions=(SimilarityPrior(size=..., words=...),)",
    "shot_depth": "extensions=(ExampleEncoder(depth=...),)",
}


def component_class(name: Any) -> type:
    """The class behind a name written by `to_json` or `save_tokenizer`; m4 0.1 wrote module:class."""
    if isinstance(name, str) and name in components():
        try:
            return components()[name].load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"component {name!r} cannot be loaded: {error}") from error
    module, _, attribute = str(name).rpartition(":")
    attribute = RENAMED.get(attribute, attribute)
    if module.split(".")[0] in ("", *PACKAGES) and attribute in classes():
        cls = getattr(importlib.import_module(classes()[attribute]), attribute)
        if dataclasses.is_dataclass(cls):
            return cls
    raise ValueError(f"unknown component {str(name)[:80]!r}; {closest(str(name)[:80], sorted(components()))}")


def _name_of(cls: type) -> str:
    """The name of a class in files: that of its entry point, else the class's own."""
    value = f"{cls.__module__}:{cls.__qualname__}"
    names = [name for name, entry in components().items() if entry.value == value]
    return names[0] if names else cls.__qualname__


def to_json(value: Any, *, without: type | tuple[type, ...] = ()) -> Any:
    """Dataclasses -> {"component": name, field: ...}, recursively; tuples become lists. `without`: classes whose
    instances are left out."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"component": _name_of(type(value)), **to_json(fields, without=without)}
    if isinstance(value, dict):
        return {k: to_json(v, without=without) for k, v in value.items() if not isinstance(v, without)}
    if isinstance(value, list | tuple):
        return [to_json(v, without=without) for v in value if not isinstance(v, without)]
    return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`; lists become tuples again. ValueError names unknown and missing fields, and values of
    another type than the field's."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "component" not in value:
        return {k: from_json(v) for k, v in value.items()}
    name, cls = value["component"], component_class(value["component"])
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init} if dataclasses.is_dataclass(cls) else {}
    renamed = RENAMED_FIELDS.get(cls.__name__, {})
    given = {renamed.get(k, k): from_json(v) for k, v in value.items() if k != "component"}
    if cls.__name__ in UPGRADES and not {*given} <= {*fields}:
        module, _, function = UPGRADES[cls.__name__].partition(":")
        upgrade = getattr(importlib.import_module(module), function)
        try:
            given = upgrade(given)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{name} cannot be made of these values: {error}") from error
    hints = _hints(cls)
    for key, item in given.items():
        if key not in fields:
            raise ValueError(f"{name} has no field {key!r}; {closest(key, list(fields))}")
        if key in hints and not _fits(item, hints[key]):
            raise ValueError(
                f"{name}.{key} is {str(item)[:80]!r}; a value of type {_type_name(hints[key])} is expected"
            )
    missing = dataclasses.MISSING
    for key, field in fields.items():
        if key not in given and field.default is missing and field.default_factory is missing:
            raise ValueError(f"{name} lacks its field {key!r}")
    try:
        return cls(**given)
    except (TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(f"{name} cannot be made of these values: {error}") from error


def config_in(folder: Path) -> Any:
    """The config in config.json of a run or an exported model. ValueError names the file."""
    value = read_json(folder / "config.json")
    try:
        config = from_json(value)
        if not dataclasses.is_dataclass(config) or not all(hasattr(r, "modality") for r in config.tokenizers):
            raise ValueError("it is not the config of a run")
        return config
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{shown(folder / 'config.json')} cannot be used: {error}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        return {}


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; checks numbers, strings, tuples, dataclasses and choices alone."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if hint in (None, types.NoneType):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if origin is tuple and isinstance(value, tuple):
        if len(args) == 2 and args[1] is ...:
            return all(_fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(_fits, value, args))
    if origin is tuple or hint is tuple:
        return isinstance(value, tuple)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    return True
