"""Safetensors files: read and written tensor by tensor, with a SHA-256 of the whole file in their own metadata.

    8 bytes       header length
    JSON header   {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    data          tensors without gaps

The digest is that of the file with 64 zeros in place of it. Two keys mark a file that has one, so that damage to a
single key cannot hide it; files of other programs, and of m4 before 0.2, have neither. A file may be larger than
memory, and nothing is ever unpickled.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from m4.errors import closest
from m4.files import parse_json, replacing, shown

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CODES = {"F64": "f8", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2"}
OTHERS = {name: np.dtype(code) for name, code in {**_CODES, "U8": "u1", "BOOL": "?"}.items()}  # of tokenizers
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # bytes, as safetensors' own limit

# Entries of the metadata of a file with a digest (as strings, or within the JSON of one of them).
SEAL = {"m4_format": "2", "m4_sha256": "0" * 64}
_DIGEST = re.compile(rb'"m4_sha256\\?": ?\\?"([0-9a-f]{64})\\?"')
_KEYS = re.compile(rb"m4_format|m4_sha256")


# ---- The digest of a file -------------------------------------------------------------------------------------------


def _place(header: bytes) -> slice | None:
    """Where the 64 digits are in the bytes from the file's start to the end of its header."""
    match = _DIGEST.search(header)
    return match and slice(*match.span(1))


def sealed(data: bytes) -> bytes:
    """The bytes of a whole safetensors file with `SEAL` in its metadata -> the same with its digest."""
    place = _place(data[: 8 + int.from_bytes(data[:8], "little")])
    assert place is not None, "the metadata must hold SEAL"
    return data[: place.start] + hashlib.sha256(data).hexdigest().encode() + data[place.stop :]


def check_seal(path: Path, file: BinaryIO, start: bytes) -> bool:
    """Whether a file has a digest; ValueError unless it is that of its content.

    `start`: its bytes to the end of the header, which is the position of `file`.
    """
    if not _KEYS.search(start):
        return False
    place = _place(start)
    actual = hashlib.sha256(start if place is None else start[: place.start] + b"0" * 64 + start[place.stop :])
    while piece := file.read(1 << 20):
        actual.update(piece)
    if place is None or actual.hexdigest().encode() != start[place]:
        raise ValueError(f"{shown(path)} is damaged: its SHA-256 is not that of what was written")
    return True


# ---- Reading --------------------------------------------------------------------------------------------------------


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
    def read(cls, path: str | Path, *, dtypes: dict[str, np.dtype] = DTYPES, is_checked: bool = False) -> TensorFile:
        """Reads and checks the header, and the file's digest if it has one and it is not `is_checked` already.

        ValueError: a pickle, a corrupt, damaged or truncated file, another dtype than `dtypes`.
        """
        path = Path(path)
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            near = [str(p) for p in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
            raise ValueError(f"no file {shown(path)!r}; {closest(str(path), near)}")
        size = path.stat().st_size
        with path.open("rb") as f:
            start, brace = f.read(8), f.read(1)
            # A header of 640 or 1,152 bytes begins as pickles do, too.
            if path.suffix in PICKLES or (start[:2] in (b"PK", b"\x80\x02", b"\x80\x04") and brace != b"{"):
                raise ValueError(
                    f"{shown(path)} is a pickle: loading it would run whatever code it holds, so m4 does not. Way out: "
                    "where you trust the file, `torch.load(path, weights_only=True)`, then `safetensors.torch."
                    "save_file(tensors, out, metadata={key: str(value) for key, value in config.items()})`"
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError(
                    f"{shown(path)} is no safetensors file: {size} bytes, and a header of {length} is announced"
                )
            text = brace + f.read(length - 1)
            if not is_checked:
                check_seal(path, f, start + text)
        try:
            metadata, entries = parse_header(text)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{shown(path)} has a corrupt safetensors header: {error}") from error
        check_entries(path, size - 8 - length, entries, dtypes)
        return cls(path, text.decode(), metadata, entries)

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """One tensor, or some rows of its first axis."""
        e = self.entries[name]
        first, last = rows or (0, e.shape[0] if e.shape else 1)
        dtype, row = {**DTYPES, **OTHERS}[e.dtype], math.prod(e.shape[1:])
        with self.path.open("rb") as f:
            f.seek(e.begin - self.data_size + first * row * dtype.itemsize, os.SEEK_END)
            raw = np.fromfile(f, np.uint8, (last - first) * row * dtype.itemsize)
        return raw.view(dtype).reshape(last - first, *e.shape[1:]) if e.shape else raw.view(dtype).reshape(())

    @property
    def data_size(self) -> int:
        return max((e.end for e in self.entries.values()), default=0)

    def check_finite(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array; ValueError names its tensor if some of its values are not finite."""
        if not is_finite(array):
            count = int((~np.isfinite(array.astype(np.float32))).sum())
            raise ValueError(f"{shown(self.path)}: {count:,} of the {array.size:,} numbers of {name} are not finite")
        return array


def is_finite(array: np.ndarray) -> bool:
    """Whether all values of an array of floats are finite; checks a few million at a time, to save memory."""
    flat = np.ravel(array)
    return all(np.isfinite(flat[i : i + (1 << 22)].astype(np.float32)).all() for i in range(0, flat.size, 1 << 22))


def parse_header(text: bytes | str) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors. ValueError or TypeError says what is wrong, without the file."""
    header = parse_json(text)
    if not isinstance(header, dict):
        raise TypeError(f"a JSON object is expected, not {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TypeError("metadata must be strings")
    entries = {}
    for name, value in header.items():
        if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= {*value}:
            raise TypeError(f"{name!r} needs dtype, shape and data_offsets")
        if not isinstance(value["dtype"], str):
            raise TypeError(f"the dtype of {name!r} must be a name")
        for key in ("shape", "data_offsets"):
            sizes = value[key]
            if not isinstance(sizes, list) or not all(type(x) is int and 0 <= x < 1 << 60 for x in sizes):
                raise TypeError(f"the {key} of {name!r} must be whole numbers from 0")
        if len(value["data_offsets"]) != 2:
            raise TypeError(f"the data_offsets of {name!r} must be two")
        entries[name] = Entry(value["dtype"], tuple(value["shape"]), *value["data_offsets"])
    return metadata, entries


def literal_like(text: str, like: Any, what: str) -> Any:
    """A value of 4M's configs, which headers hold as Python literals: of the type of its default `like` (None: a whole
    number or None; a str needs no quotes). ValueError begins with `what`."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        if not isinstance(like, str):
            raise ValueError(f"{what}={text[:80]!r} is no Python literal") from error
        value = text
    if isinstance(like, str):
        return value if isinstance(value, str) else text
    if isinstance(like, list) and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ValueError(f"{what}={text[:80]!r} is no list of names")
    allowed: Any = (int, float) if isinstance(like, float) else int | None if like is None else type(like)
    if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(like, bool):
        raise ValueError(f"{what}={text[:80]!r} is no {'whole number' if like is None else type(like).__name__}")
    if isinstance(value, int | float) and not 0 <= value < 1e9:
        raise ValueError(f"{what}={text[:80]!r} must be at least 0 and less than 1e9")
    return value


def check_entries(path: Path, data_size: int, entries: dict[str, Entry], dtypes: dict[str, np.dtype]) -> None:
    """ValueError unless the tensors follow each other and fill the file."""
    expected = 0
    for name, e in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if e.dtype not in dtypes:
            raise ValueError(f"{shown(path)}: tensor {name!r} is {e.dtype[:20]}; {closest(e.dtype, list(dtypes))}")
        if e.begin != expected or e.end - e.begin != math.prod(e.shape) * dtypes[e.dtype].itemsize:
            raise ValueError(
                f"{shown(path)} has a corrupt safetensors header: {name!r}, {e.dtype} {list(e.shape)}, "
                f"lies at {e.begin} to {e.end}, after {expected}"
            )
        expected = e.end
    if data_size != expected:
        raise ValueError(f"{shown(path)} has {data_size:,} bytes of tensors, but its header describes {expected:,}")


# ---- Writing --------------------------------------------------------------------------------------------------------


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
    """Header and data (each tensor in the header's order, in any number of pieces), under the name only when whole.

    A header with `SEAL` receives the file's digest.
    """
    start = len(header.encode()).to_bytes(8, "little") + header.encode()
    digest, place = hashlib.sha256(start), _place(start)
    with replacing(path) as temporary, temporary.open("wb") as f:
        f.write(start)
        for pieces in tensors:
            for piece in pieces:
                # As bytes: numpy's buffer protocol does not know bfloat16.
                data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                f.write(data)
                if place:
                    digest.update(data)
        if place:
            f.seek(place.start)
            f.write(digest.hexdigest().encode())
