"""What a file may name, and how it comes back: dataclasses as JSON, tokenizers as safetensors. Never a pickle.

A name is either an entry point of the group `m4.components` (how a user's own package joins in) or module:class of a
dataclass within m4 or m4_tokenizers. No code is ever read from a run's folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from m4.files import write_atomically

if TYPE_CHECKING:
    from m4.modality import Tokenizer


def closest(name: str, allowed: Seq[str]) -> str:
    """The tail of an error: what is allowed, and what was probably meant."""
    match = difflib.get_close_matches(name, allowed, n=1, cutoff=0.4)
    return f"allowed: {', '.join(allowed) or '(none)'}" + (f". Did you mean {match[0]!r}?" if match else "")


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


def component_class(name: str) -> type:
    """The class behind a name written by `to_json` or `save_tokenizer`."""
    if name in components():
        return components()[name].load()
    module, _, attribute = name.partition(":")
    if module.split(".")[0] in ("m4", "m4_tokenizers") and attribute:
        cls = getattr(importlib.import_module(module), attribute, None)
        if dataclasses.is_dataclass(cls):
            return cls
    raise ValueError(f"unknown component {name!r}; {closest(name, sorted(components()))}")


def _name_of(cls: type) -> str:
    value = f"{cls.__module__}:{cls.__qualname__}"
    names = [name for name, entry in components().items() if entry.value == value]
    return names[0] if names else value


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
    """The inverse of `to_json`; lists become tuples again. Unknown fields are named."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "component" not in value:
        return {k: from_json(v) for k, v in value.items()}
    cls = component_class(value["component"])
    allowed = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in value:
        if key != "component" and key not in allowed:
            raise ValueError(f"{value['component']} has no field {key!r}; {closest(key, allowed)}")
    return cls(**{k: from_json(v) for k, v in value.items() if k != "component"})


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """One safetensors file: arrays, and class, config and card as JSON. Saving what was loaded is byte-equal."""
    name = _name_of(type(tokenizer))
    if name not in components():
        raise ValueError(
            f"{name} is not registered under the entry-point group m4.components; install the package first"
        )
    config, arrays = tokenizer.state()
    metadata = {"m4": json.dumps({"component": name, "config": config, "card": tokenizer.card}, sort_keys=True)}
    write_atomically(path, safetensors.numpy.save(arrays, metadata))


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """12 hex digits of what a tokenizer computes: its class, config and arrays, without its card, which has timings."""
    config, arrays = tokenizer.state()
    digest = hashlib.sha256(json.dumps([_name_of(type(tokenizer)), config], sort_keys=True).encode())
    digest.update(safetensors.numpy.save({key: np.ascontiguousarray(array) for key, array in arrays.items()}))
    return digest.hexdigest()[:12]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file written by `save_tokenizer`."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = json.loads(file.metadata()["m4"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error
    return component_class(header["component"]).from_state(header["config"], arrays, header["card"])
