"""Model files: one safetensors with all parameters, and the model's config and modalities in its metadata.

    8 bytes       header length
    JSON header   {"__metadata__": {"m4_model": ...}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    data          tensors without gaps; m4's names are the parameters' paths: encoder.0.attention.query.kernel, ...

Reading and writing go tensor by tensor, so that a file may be larger than memory. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m4.components import closest, from_json, to_json
from m4.files import replacing
from m4.modality import Modalities
from m4.model import STACKS, Model

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open-by-name safetensors file: `TensorFile.read(path)`; `file.tensor(name)` reads one tensor from disk."""

    path: Path
    header: str
    metadata: dict[str, str]
    entries: dict[str, Entry]

    @classmethod
    def read(cls, path: str | Path) -> TensorFile:
        """Reads and checks the header. ValueError: a pickle, a corrupt or cut-off file, another dtype."""
        path = Path(path)
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            near = [str(p) for p in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
            raise ValueError(f"no file {str(path)!r}; {closest(str(path), near)}")
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            if path.suffix in PICKLES or start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
                raise ValueError(
                    f"{path} is a pickle: loading it would run whatever code it holds, so m4 does not. Way out: where "
                    "you trust the file, `torch.load(path, weights_only=True)`, then `safetensors.torch.save_file("
                    "tensors, out, metadata={key: str(value) for key, value in config.items()})`"
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError(f"{path} is no safetensors file: {size} bytes, and a header of {length} is announced")
            text = f.read(length)
        try:
            header = json.loads(text.decode())
            metadata = header.pop("__metadata__", {})
            entries = {k: Entry(v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items()}
            if not all(isinstance(v, str) for v in metadata.values()):
                raise TypeError("metadata must be strings")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has a corrupt safetensors header: {error}") from error
        expected = 0
        for name, e in sorted(entries.items(), key=lambda item: item[1].begin):
            if e.dtype not in DTYPES:
                raise ValueError(f"{path}: tensor {name!r} is {e.dtype}; {closest(e.dtype, list(DTYPES))}")
            if e.begin != expected or e.end - e.begin != math.prod(e.shape) * DTYPES[e.dtype].itemsize:
                raise ValueError(
                    f"{path} has a corrupt safetensors header: {name!r}, {e.dtype} {list(e.shape)}, "
                    f"lies at {e.begin} to {e.end}, after {expected}"
                )
            expected = e.end
        if size != 8 + length + expected:
            raise ValueError(f"{path} has {size:,} bytes, but its header describes {8 + length + expected:,}")
        return cls(path, text.decode(), metadata, entries)

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """One tensor, or some rows of its first axis."""
        e = self.entries[name]
        first, last = rows or (0, e.shape[0] if e.shape else 1)
        dtype, row = DTYPES[e.dtype], math.prod(e.shape[1:])
        with self.path.open("rb") as f:
            f.seek(e.begin - self.data_size + first * row * dtype.itemsize, os.SEEK_END)
            raw = np.fromfile(f, np.uint8, (last - first) * row * dtype.itemsize)
        return raw.view(dtype).reshape(last - first, *e.shape[1:]) if e.shape else raw.view(dtype).reshape(())

    @property
    def data_size(self) -> int:
        return max((e.end for e in self.entries.values()), default=0)


def make_header(shapes: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> str:
    """{name: (dtype name, shape)} -> the JSON of a header whose tensors follow each other in this order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"))
    return text + " " * (-len(text.encode()) % 8)


def write(path: Path, header: str, tensors: Iterable[Iterable[np.ndarray]]) -> None:
    """Header and data (each tensor in the header's order, in any number of pieces), under the name only when whole."""
    with replacing(path) as temporary, temporary.open("wb") as f:
        f.write(len(header.encode()).to_bytes(8, "little") + header.encode())
        for pieces in tensors:
            for piece in pieces:
                # As bytes: numpy's buffer protocol does not know bfloat16.
                f.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def parameters(state: Any) -> dict[str, Any]:
    """The arrays (or shapes) of a model's state by dotted name, those of each block apart: encoder.0.mlp.up.kernel."""
    found = {}
    for (top, *rest), variable in nnx.to_flat_state(state):
        (x,), rest = jax.tree.leaves(variable), "".join(f".{key}" for key in rest)
        if top not in STACKS:
            found[top + rest] = x
            continue
        for i in range(x.shape[0]):
            one = jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x[i]
            found[f"{top}.{i}{rest}"] = one
    return found


def from_parameters(state: Any, array_of: Callable[[str], np.ndarray]) -> Any:
    """A state like `state` with the arrays of these names; blocks are stacked."""
    flat = []
    for path, variable in nnx.to_flat_state(state):
        (top, *rest), shape = path, variable.shape
        rest = "".join(f".{key}" for key in rest)
        names = [f"{top}.{i}{rest}" for i in range(shape[0])] if top in STACKS else [top + rest]
        arrays = [jnp.asarray(array_of(name)) for name in names]
        flat.append((path, variable.replace(jnp.stack(arrays) if top in STACKS else arrays[0])))
    return nnx.from_flat_state(flat)


def by_modality(model: Model) -> dict[str, Any]:
    """`parameters` of a model, with the rows of its tables as TABLE[MODALITY], and so the pairs of routed LoRA."""
    found = parameters(nnx.state(model, nnx.Param))
    for table, rows in _shares(model, found).items():
        x = found.pop(table)
        names = enumerate(model.modalities.names)
        found |= {f"{table}[{m}]": x[rows[i] : rows[i + 1]] for i, m in names if rows[i] < rows[i + 1]}
    return found


def _shares(model: Model, names: Iterable[str]) -> dict[str, Sequence[int]]:
    """Parameters of which each modality has some rows: where those of modality i begin, and the end."""
    routed = model.config.lora is not None and model.config.lora.routed
    pairs = [name for name in names if routed and ".lora." in name]
    return {**model.table_rows, **dict.fromkeys(pairs, range(len(model.modalities) + 1))}


def with_pieces(model: Model, pieces: Mapping[str, Any]) -> Model:
    """A model with these in place of its own, by the names of `by_modality`."""
    found = {**by_modality(model), **pieces}
    graph, state = nnx.split(model, nnx.Param)
    for table in _shares(model, parameters(state)):
        parts = [found[name] for m in model.modalities.names if (name := f"{table}[{m}]") in found]
        found[table] = jnp.concatenate([jnp.asarray(x) for x in parts])
    return nnx.merge(graph, from_parameters(state, lambda name: found[name]))


def parameter_shapes(model_config: Any, modalities: Modalities) -> dict[str, tuple[int, ...]]:
    return {n: x.shape for n, x in parameters(nnx.state(abstract(model_config, modalities), nnx.Param)).items()}


def describe(model_config: Any, modalities: Modalities) -> dict[str, str]:
    return {"m4_model": json.dumps({"model": to_json(model_config), "modalities": to_json(list(modalities))})}


def described(file: TensorFile) -> tuple[Any, Modalities]:
    """Model config and modalities of a model file."""
    if "m4_model" not in file.metadata:
        raise ValueError(f"{file.path} is no m4 model file; `python -m m4 convert` makes one of an original checkpoint")
    config = from_json(json.loads(file.metadata["m4_model"]))
    return config["model"], Modalities(config["modalities"])


def abstract(model_config: Any, modalities: Modalities) -> Model:
    """The model without its numbers."""
    return nnx.eval_shape(lambda: Model(model_config, modalities, rngs=nnx.Rngs(0)))


def save_model(model: Model, path: str | Path, *, dtype: str = "", metadata: Mapping[str, str] = {}) -> None:
    """Writes the model's parameters in `dtype` (a name of DTYPES, "" = their own), its config and its modalities."""
    arrays = parameters(nnx.state(model, nnx.Param))
    shapes = {name: (dtype or DTYPE_NAMES[x.dtype], x.shape) for name, x in arrays.items()}
    write(
        Path(path),
        make_header(shapes, {**describe(model.config, model.modalities), **metadata}),
        ([jax.device_get(x).astype(DTYPES[shapes[name][0]])] for name, x in arrays.items()),
    )


def load_model(path: str | Path) -> Model:
    """The model in a file written by `save_model` or `python -m m4 convert`, parameters in float32."""
    file = TensorFile.read(path)
    graph, state = nnx.split(abstract(*described(file)), nnx.Param)
    expected = parameters(state)
    check_names(file, {name: x.shape for name, x in expected.items()}, [n for n in file.entries if ":" in n])
    return nnx.merge(graph, from_parameters(state, lambda name: file.tensor(name).astype(np.float32)))


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
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{file.path} does not fit its config. " + ". ".join(found))


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
