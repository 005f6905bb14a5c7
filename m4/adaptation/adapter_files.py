"""Small parameters beside a model's own: saved and loaded alone.

    ModelConfig(lora=LoRA(rank=8))     and    OptimizerConfig(train=("*.lora.*",))
    ModelConfig(adapter_size=32)       and    OptimizerConfig(train=("*.adapter.*",))
    ModelConfig(num_registers=8)       and    OptimizerConfig(train=("registers",))      soft prompts

The first two change nothing until they are trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from m4.checkpoints.model_file import check_names
from m4.errors import closest
from m4.model.encoder_decoder import Model
from m4.model.parameters import by_modality, matches_pattern, with_parameters
from m4.registry import to_json
from m4.tensor_file import DTYPE_NAMES, SEAL, TensorFile, make_header, write

ADAPTER_PATTERNS = ("*.lora.*", "*.adapter.*", "registers")


def save_adapter(model: Model, path: str | Path, patterns: tuple[str, ...] = ()) -> None:
    """Writes the parameters that fit any of these patterns of `OptimizerConfig.train` (default: all of
    ADAPTER_PATTERNS that there
    are), rows of tables as TABLE[MODALITY], as a safetensors file. ValueError for a pattern that fits none."""
    arrays = by_modality(model)
    chosen = {
        p: {n for n in arrays if matches_pattern(n, p) or matches_pattern(n.partition("[")[0], p)}
        for p in patterns or ADAPTER_PATTERNS
    }
    if not patterns:
        chosen = {p: names for p, names in chosen.items() if names} or chosen
    for p, names in chosen.items():
        if not names:
            raise ValueError(f"{p} fits no parameter; {closest(p, list(arrays))}")
    every = set().union(*chosen.values())
    arrays = {n: np.asarray(jax.device_get(x)) for n, x in arrays.items() if n in every}
    shapes = {name: (DTYPE_NAMES[x.dtype], x.shape) for name, x in arrays.items()}
    about = {**SEAL, "m4_part": json.dumps(list(chosen)), "m4_lora": json.dumps(to_json(model.config.lora))}
    write(Path(path), make_header(shapes, about), ([x] for x in arrays.values()))


def load_adapter(model: Model, path: str | Path) -> Model:
    """A model with the parameters of such a file in place of its own. ValueError for one that it has not, or in another
    shape, or for another LoRA."""
    file, own = TensorFile.read(path), by_modality(model)
    check_names(file, {name: own[name].shape for name in file.entries if name in own}, [])
    if not {"m4_part", "m4_lora"} <= {*file.metadata}:
        raise ValueError(f"{path} was not written by save_adapter: its metadata lacks m4_part and m4_lora")
    own_lora = json.dumps(to_json(model.config.lora))
    if any(".lora." in name for name in file.entries) and file.metadata["m4_lora"] != own_lora:
        raise ValueError(f"{path} was trained with lora={file.metadata['m4_lora']}; the model has {own_lora}")
    return with_parameters(model, {name: file.check_finite(name, file.tensor(name)) for name in file.entries})
