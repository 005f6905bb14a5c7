"""Small parameters beside a model's own: saved and loaded alone, and LoRA merged into the kernels.

    ModelConfig(lora=LoRA(rank=8))     and    OptimizerConfig(train=("*.lora.*",))
    ModelConfig(adapter_size=32)       and    OptimizerConfig(train=("*.adapter.*",))
    ModelConfig(num_registers=8)       and    OptimizerConfig(train=("registers",))      soft prompts

The first two change nothing until they are trained.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m4.components import closest
from m4.model import Model
from m4.model_file import (
    DTYPE_NAMES,
    TensorFile,
    abstract,
    check_names,
    from_parameters,
    make_header,
    parameters,
    write,
)

SMALL = ("*.lora.*", "*.adapter.*", "registers")


def merged(model: Model) -> Model:
    """The same function without LoRA: what its pairs add is in the kernels. ValueError if there is none, or routed."""
    lora = model.config.lora
    if lora is None or lora.routed:
        raise ValueError(f"only LoRA that is the same for all modalities can be merged; the model has lora={lora}")
    plain = abstract(dataclasses.replace(model.config, lora=None), model.modalities)
    known = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(plain, nnx.Param)):
        x, pair = known[path][...], (*path[:-1], "lora")
        if path[-1] == "kernel" and (*pair, "a") in known:
            a, b = (known[*pair, name][...] for name in "ab")
            x = x + jnp.matmul(a[:, 0], b[:, 0]) * (lora.alpha / lora.rank)
        flat.append((path, variable.replace(x)))
    return nnx.merge(nnx.graphdef(plain), nnx.from_flat_state(flat))


def _chosen(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    names = list(names)
    found = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not found:
        raise ValueError(f"{', '.join(patterns)} fits no parameter; {closest(next(iter(patterns)), names)}")
    return found


def save_small(model: Model, path: str | Path, patterns: Iterable[str] = SMALL) -> None:
    """Writes the parameters whose names fit any of the patterns as a safetensors file."""
    arrays = parameters(nnx.state(model, nnx.Param))
    arrays = {name: np.asarray(jax.device_get(arrays[name])) for name in _chosen(arrays, patterns)}
    shapes = {name: (DTYPE_NAMES[x.dtype], x.shape) for name, x in arrays.items()}
    header = make_header(shapes, {"m4_part": json.dumps(list(patterns))})
    write(Path(path), header, ([x] for x in arrays.values()))


def load_small(model: Model, path: str | Path) -> Model:
    """A model with the parameters of such a file in place of its own. ValueError unless it has them all."""
    file = TensorFile.read(path)
    graph, state = nnx.split(model, nnx.Param)
    own = parameters(state)
    check_names(file, {name: own[name].shape for name in file.entries if name in own}, [])
    read = lambda name: file.tensor(name) if name in file.entries else own[name]  # noqa: E731
    return nnx.merge(graph, from_parameters(state, read))
