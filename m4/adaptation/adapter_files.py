"""Parameters of extensions, which are few beside a model's own: saved and loaded alone.

    ModelConfig(extensions=(LoRA(rank=8),))            and    OptimizerConfig(train=("*.lora.*",))
    ModelConfig(extensions=(Bottleneck(size=32),))     and    OptimizerConfig(train=("*.adapter.*",))
    ModelConfig(extensions=(Registers(num=8),))        and    OptimizerConfig(train=("registers",))      soft prompts

The first two change nothing until they are trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m4.checkpoints.model_file import check_names
from m4.checkpoints.renamed_parameters import named_as_today
from m4.errors import closest
from m4.model.encoder_decoder import Model
from m4.model.extensions import Extension
from m4.model.parameters import by_modality, matches_pattern, with_parameters
from m4.registry import from_json, to_json
from m4.tensor_file import DTYPE_NAMES, SEAL, TensorFile, make_header, write


def save_adapter(model: Model, path: str | Path, patterns: tuple[str, ...] = ()) -> None:
    """Writes the parameters that fit any of these patterns of `OptimizerConfig.train` (default: those of the model's
    extensions), rows of tables as TABLE[MODALITY], as a safetensors file. ValueError for a pattern that fits none."""
    arrays = by_modality(model)
    patterns = patterns or tuple(p for extension in model.config.extensions for p in extension.parameters)
    if not patterns:
        raise ValueError("the model has no extensions whose parameters could be saved alone; give patterns")
    chosen = {
        p: {n for n in arrays if matches_pattern(n, p) or matches_pattern(n.partition("[")[0], p)} for p in patterns
    }
    for p, names in chosen.items():
        if not names:
            raise ValueError(f"{p} fits no parameter; {closest(p, list(arrays))}")
    every = set().union(*chosen.values())
    arrays = {n: np.asarray(jax.device_get(x)) for n, x in arrays.items() if n in every}
    shapes = {name: (DTYPE_NAMES[x.dtype], x.shape) for name, x in arrays.items()}
    about = {**SEAL, "m4_part": json.dumps(list(chosen)), "m4_extensions": json.dumps(to_json(_owners(model, every)))}
    write(Path(path), make_header(shapes, about), ([x] for x in arrays.values()))


def load_adapter(model: Model, path: str | Path) -> Model:
    """A model with the parameters of such a file in place of its own. ValueError for one that it has not, or in another
    shape, or for another LoRA."""
    file, own = named_as_today(TensorFile.read(path)), by_modality(model)
    check_names(file, {name: own[name].shape for name in file.entries if name in own}, [])
    if "m4_part" not in file.metadata:
        raise ValueError(f"{path} was not written by save_adapter: its metadata lacks m4_part")
    own = {value["component"]: value for value in to_json(_owners(model, set(file.entries)))}
    for saved in _extensions_in(file):
        if (name := saved["component"]) in own and own[name] != saved:
            raise ValueError(f"{path} was trained with {saved}; the model has {own[name]}")
    return with_parameters(model, {name: file.check_finite(name, file.tensor(name)) for name in file.entries})


def _owners(model: Model, names: set[str]) -> list[Extension]:
    """The extensions of a model that have some of these parameters."""
    return [e for e in model.config.extensions if any(matches_pattern(n, p) for n in names for p in e.parameters)]


def _extensions_in(file: TensorFile) -> list[dict[str, Any]]:
    """Those that a file was trained with, as JSON; version 0.1 named only LoRA."""
    if "m4_extensions" in file.metadata:
        return json.loads(file.metadata["m4_extensions"])
    old = from_json(json.loads(file.metadata["m4_lora"])) if "m4_lora" in file.metadata else None
    return [] if old is None else [to_json(old)]
