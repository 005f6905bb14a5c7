"""Parameters that older files name otherwise: they are read under their names of today."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from m4.registry import RENAMED_PARAMETERS
from m4.tensor_file import TensorFile


def named_as_today(file: TensorFile) -> TensorFile:
    """A file of parameters with today's names of those that m4 0.1 called otherwise."""
    entries = {RENAMED_PARAMETERS.get(name, name): entry for name, entry in file.entries.items()}
    return dataclasses.replace(file, entries=entries)


def old_names(item: Path) -> dict[str, str]:
    """Names of parameters of today -> those of m4 0.1 that a saved item has in their place."""
    metadata = item / "_METADATA"
    text = metadata.read_text(encoding="utf-8", errors="replace") if metadata.is_file() else ""
    return {new: old for old, new in RENAMED_PARAMETERS.items() if f"'{old}'" in text}


def renamed(tree: Any, names: Mapping[str, str]) -> Any:
    """A tree of parameters, or of an optimizer, with other keys."""
    if isinstance(tree, nnx.State):
        return nnx.from_flat_state([((names.get(top, top), *rest), x) for (top, *rest), x in nnx.to_flat_state(tree)])
    if isinstance(tree, tuple | list):
        values = [renamed(value, names) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree
