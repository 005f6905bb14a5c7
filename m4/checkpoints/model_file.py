"""Model files: one safetensors with all parameters, and the model's config and modalities in its metadata.

metadata   {"m4_format", "m4_sha256" (of the file), "m4_model": config and modalities as JSON, ...}
tensors    by the parameters' paths: encoder.0.attention.query.kernel, ...
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from m4.checkpoints.renamed_parameters import named_as_today
from m4.files import parse_json, shown
from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.model.parameters import abstract, from_parameters, parameters
from m4.registry import from_json, to_json
from m4.tensor_file import DTYPE_NAMES, DTYPES, SEAL, TensorFile, make_header, write
from m4.tokens.modality import Features, Grid, Modalities

MAX_POSITIONS = 1 << 22  # rows of a modality's fixed table of positions, at most


def describe(model_config: Any, modalities: Modalities) -> dict[str, str]:
    """The metadata of a model file, with a place for its digest."""
    return {**SEAL, "m4_model": json.dumps({"model": to_json(model_config), "modalities": to_json(list(modalities))})}


def read_description(file: TensorFile) -> tuple[ModelConfig, Modalities]:
    """Model config and modalities of a model file. ValueError for any that no file of its size can have."""
    if "m4_model" not in file.metadata:
        raise ValueError(
            f"{shown(file.path)} is no m4 model file; `python -m m4 convert` makes one of an original checkpoint"
        )
    try:
        about = from_json(parse_json(file.metadata["m4_model"]))
        if not isinstance(about, dict) or not {"model", "modalities"} <= {*about}:
            raise ValueError("it needs model and modalities")
        config, items = about["model"], about["modalities"]
        if not isinstance(config, ModelConfig) or not isinstance(items, tuple):
            raise ValueError("model must be a ModelConfig, modalities a list")
        modalities = Modalities(items)
    except ValueError as error:
        raise ValueError(f"{shown(file.path)}: its config (m4_model) cannot be used: {error}") from error
    check_sizes(config, modalities, file)
    return config, modalities


def check_sizes(c: ModelConfig, modalities: Modalities, file: TensorFile) -> None:
    """ValueError where a config claims more than its file can hold, before anything of that size is allocated."""
    num_tensors, num_values = len(file.entries), sum(math.prod(e.shape) for e in file.entries.values())
    blocks = {name: getattr(c, name) for name in ("encoder_depth", "decoder_depth")}
    sizes = {"width": c.width, "hidden": c.hidden, "max_items": c.max_items * c.width}
    for extension in c.extensions:
        for name, value in extension.sizes().items():
            (blocks if name.endswith("depth") else sizes)[name] = value
    positions = {}
    for m in modalities:
        rows = (
            m.max_tokens if min(m.shape if isinstance(m, Grid | Features) else (m.max_length,), default=0) > 0 else -1
        )
        sizes[f"rows of {m.name}"] = (m.size if isinstance(m, Features) else m.vocab_size) * c.width
        if m.learned_positions:
            sizes[f"positions of {m.name}"] = rows * c.width
        positions[f"positions of {m.name}"] = rows
    for claims, most in ((blocks, num_tensors), (sizes, num_values), (positions, MAX_POSITIONS)):
        for name, value in claims.items():
            if not 0 <= value <= most:
                raise ValueError(
                    f"{shown(file.path)}: its config says {name} = {value:,}, which no file of {num_tensors:,} tensors "
                    f"with {num_values:,} numbers can hold; allowed here: 0 to {most:,}"
                )


def save_model(model: Model, path: str | Path, *, dtype: str = "", metadata: Mapping[str, str] = {}) -> None:
    """Writes the model's parameters in `dtype` (a name of DTYPES, "" = their own), its config and its modalities."""
    arrays = parameters(nnx.state(model, nnx.Param))
    shapes = {name: (dtype or DTYPE_NAMES[x.dtype], x.shape) for name, x in arrays.items()}
    write(
        Path(path),
        make_header(shapes, {**describe(model.config, model.modalities), **metadata}),
        ([jax.device_get(x).astype(DTYPES[shapes[name][0]])] for name, x in arrays.items()),
    )


def load_model(path: str | Path, *, is_checked: bool = False) -> Model:
    """The model in a file written by `save_model` or `python -m m4 convert`, parameters in float32.

    ValueError for a damaged file, and for values that are not finite. `is_checked`: its digest is known to be right.
    """
    return model_in(TensorFile.read(path, is_checked=is_checked))


def model_in(file: TensorFile) -> Model:
    """See `load_model`."""
    file = named_as_today(file)
    graph, state = nnx.split(abstract(*read_description(file)), nnx.Param)
    expected = parameters(state)
    check_names(file, {name: x.shape for name, x in expected.items()}, [n for n in file.entries if ":" in n])
    array_of = lambda name: file.check_finite(name, file.tensor(name).astype(np.float32))  # noqa: E731
    return nnx.merge(graph, from_parameters(state, array_of))


def check_names(file: TensorFile, expected: dict[str, tuple[int, ...]], optional: Iterable[str]) -> None:
    """ValueError that lists unknown, missing and misshapen tensors by name."""
    optional = set(optional)
    problems = {
        "unknown": [f"{n} {list(e.shape)}" for n, e in file.entries.items() if n not in expected and n not in optional],
        "missing": [f"{n} {list(s)}" for n, s in expected.items() if n not in file.entries],
        "misshapen": [
            f"{n} {list(file.entries[n].shape)} instead of {list(s)}"
            for n, s in expected.items()
            if n in file.entries and file.entries[n].shape != s
        ],
    }
    lists = [f"{len(names)} {kind}: {_shortened(names)}" for kind, names in problems.items() if names]
    if lists:
        raise ValueError(f"{shown(file.path)} does not fit its config. " + ". ".join(lists))


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
