"""What a file may name, and how it comes back: dataclasses as JSON, tokenizers as safetensors. Never a pickle.

A name is either an entry point of the group `m4.components` (how a user's own package joins in) or that of a dataclass
within m4 or m4_tokenizers, never a module: files may move. No code is ever read from a run's folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import re
import types
import typing
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from m4.errors import closest
from m4.files import check_name, parse_json, read_json, shown, write_atomically
from m4.tensor_file import DTYPES, OTHERS, SEAL, TensorFile, sealed

if TYPE_CHECKING:
    from m4.modality import Tokenizer


# Modules of version 0.1 by class. `tokenizer_hash` goes on hashing module:class for these, so that what was prepared and
# saved with a tokenizer goes on knowing it.
_MODULES_0_1 = {
    name: module
    for module, names in {
        "m4.modality": "Grid Sequence Features",
        "m4_tokenizers.answers": "AnswerRecipe",
        "m4_tokenizers.audio": "AudioRecipe",
        "m4_tokenizers.boxes": "BoxRecipe",
        "m4_tokenizers.classes": "ClassRecipe",
        "m4_tokenizers.depth": "DepthRecipe RelativeDepthRecipe",
        "m4_tokenizers.diffusion": "Schedule DiffusionDecoder",
        "m4_tokenizers.edges": "EdgesRecipe",
        "m4_tokenizers.features": "FeatureMapRecipe VectorRecipe PoseRecipe",
        "m4_tokenizers.image": "ImageRecipe PixelPatchesRecipe",
        "m4_tokenizers.instances": "MaskRecipe",
        "m4_tokenizers.losses": "SquaredError AbsoluteError Huber CosineDistance CrossEntropy Perceptual Adversarial",
        "m4_tokenizers.maps": "MapRecipe",
        "m4_tokenizers.metadata": "Whole Bins Steps MetadataRecipe",
        "m4_tokenizers.networks": "ViTEncoder ViTDecoder VectorEncoder VectorDecoder PatchEncoder PatchDecoder",
        "m4_tokenizers.normals": "NormalsRecipe",
        "m4_tokenizers.palette": "PaletteRecipe",
        "m4_tokenizers.quantizers": (
            "VectorQuantizer LearnedVectorQuantizer Memcodes FiniteScalarQuantizer LookupFreeQuantizer"
        ),
        "m4_tokenizers.semseg": "SemanticRecipe",
        "m4_tokenizers.stored": "TokenizerFile IdsRecipe",
        "m4_tokenizers.text": "Layout TextRecipe WordPieceRecipe",
        "m4_tokenizers.unet": "UNet UViT",
    }.items()
    for name in names.split()
}


def check_choice(value: Any, field: str, allowed: Seq[str]) -> None:
    """ValueError unless the field of a dataclass has one of the allowed values."""
    if getattr(value, field) not in allowed:
        raise ValueError(f"{type(value).__name__}.{field}: {closest(str(getattr(value, field)), allowed)}")


def packaged() -> dict[str, Path]:
    """The trained models in the package: name -> folder."""
    return {p.parent.name: p.parent for p in sorted(Path(__file__).parent.glob("models/*/config.json"))}


@functools.cache
def components() -> dict[str, importlib.metadata.EntryPoint]:
    """Classes that a saved file may name: the entry-point group m4.components (never a pickle)."""
    return {e.name: e for e in importlib.metadata.entry_points(group="m4.components")}


@functools.cache
def classes() -> dict[str, str]:
    """Name of each public class of m4 and m4_tokenizers -> its module, read from the sources: nothing is imported."""
    modules = {}
    for package in ("m4", "m4_tokenizers"):
        spec = importlib.util.find_spec(package)
        for root in map(Path, spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(root.rglob("*.py")):
                module = ".".join((package, *path.relative_to(root).with_suffix("").parts))
                for name in re.findall(r"^class ([A-Z]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE):
                    modules[name] = module
    return modules


def component_class(name: Any) -> type:
    """The class behind a name written by `to_json` or `save_tokenizer`; m4 0.1 wrote module:class."""
    if isinstance(name, str) and name in components():
        try:
            return components()[name].load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"component {name!r} cannot be loaded: {error}") from error
    module, _, attribute = str(name).rpartition(":")
    if module.split(".")[0] in ("", "m4", "m4_tokenizers") and attribute in classes():
        cls = getattr(importlib.import_module(classes()[attribute]), attribute)
        if dataclasses.is_dataclass(cls):
            return cls
    raise ValueError(f"unknown component {str(name)[:80]!r}; {closest(str(name)[:80], sorted(components()))}")


def _name_of(cls: type) -> str:
    """An entry point's name, else the name of the class, which stays when files move."""
    value = f"{cls.__module__}:{cls.__qualname__}"
    names = [name for name, entry in components().items() if entry.value == value]
    return names[0] if names else cls.__qualname__


def to_json(value: Any) -> Any:
    """Dataclasses -> {"component": name, field: ...}, recursively; tuples become lists."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"component": _name_of(type(value)), **fields}
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`; lists become tuples again. ValueError names unknown fields, those that are missing, and
    values of another type than the field's."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "component" not in value:
        return {k: from_json(v) for k, v in value.items()}
    name, cls = value["component"], component_class(value["component"])
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init} if dataclasses.is_dataclass(cls) else {}
    given = {k: from_json(v) for k, v in value.items() if k != "component"}
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
    """What config.json of a run or an exported model says. ValueError names the file."""
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
    except (NameError, TypeError):  # of names that are there for a type checker alone
        return {}


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type, as far as numbers, texts, tuples, mappings and choices go."""
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


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """One safetensors file: arrays, and class, config and card as JSON. Saving what was loaded is byte-equal."""
    name = _name_of(type(tokenizer))
    if name not in components():
        raise ValueError(
            f"{name} is not registered under the entry-point group m4.components; install the package first"
        )
    config, arrays = tokenizer.state()
    about = {**SEAL, "component": name, "config": config, "card": tokenizer.card}
    data = safetensors.numpy.save(arrays, {"m4": json.dumps(about, sort_keys=True)})
    write_atomically(path, sealed(data))


def _named_as_in_0_1(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_named_as_in_0_1(v) for v in value]
    if not isinstance(value, dict):
        return value
    named = {k: _named_as_in_0_1(v) for k, v in value.items()}
    if "component" in named and named["component"] in _MODULES_0_1:
        named["component"] = f"{_MODULES_0_1[named['component']]}:{named['component']}"
    return named


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """12 hex digits of what a tokenizer computes: its class, config and arrays, without its card, which has timings."""
    config, arrays = tokenizer.state()
    digest = hashlib.sha256(json.dumps(_named_as_in_0_1([_name_of(type(tokenizer)), config]), sort_keys=True).encode())
    digest.update(safetensors.numpy.save({key: np.ascontiguousarray(array) for key, array in arrays.items()}))
    return digest.hexdigest()[:12]


def load_tokenizer(path: Path, *, is_checked: bool = False) -> Tokenizer:
    """The tokenizer in a file written by `save_tokenizer`. ValueError names a file that is damaged or is none.

    `is_checked`: the file's digest is known to be right.
    """
    file = TensorFile.read(path, dtypes={**DTYPES, **OTHERS}, is_checked=is_checked)
    try:
        about = parse_json(file.metadata["m4"]) if "m4" in file.metadata else None
        if not isinstance(about, dict) or not {"component", "config", "card"} <= {*about}:
            raise ValueError("its metadata names no component with config and card")
        cls = component_class(about["component"])
        if not hasattr(cls, "from_state"):
            raise ValueError(f"{about['component']} is no tokenizer")
        arrays = {name: file.tensor(name) for name in file.entries}
        tokenizer = cls.from_state(about["config"], arrays, about["card"])
        check_name(tokenizer.modality.name, "its modality")
        check_name(tokenizer.modality.signal, "its modality's signal")
        return tokenizer
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        what = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{shown(path)} is not a tokenizer file that can be used: {what}") from error
