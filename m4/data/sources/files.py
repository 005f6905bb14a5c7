"""One stored signal of one example, from bytes: images, arrays, texts and boxes, each checked as it is read.

This is the one reader of signals: of training (`folders`, `tars`) and, through `m4.data.samples`, of everything else.

Axes: H rows, W columns, C channels, T samples of sound, n boxes or colours.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from m4.data.sources.pictures import LOSSLESS, open_picture, to_edges, to_mask, to_rgb
from m4.data.sources.sounds import decode_sound
from m4.errors import closest
from m4.files import decode_text, parse_json

LONGEST = 1.1  # length of a normal that is still a unit vector
SATURATED = 2**16 - 1  # of 16-bit depth: sensors and converters write it where depth is unknown
PICTURES = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "gif", "ppm", "pgm", "pbm", "pnm", "pfm")
EXACT = ("png", "tif", "tiff", "bmp")
SOUNDS = ("wav", "ogg", "oga", "flac", "mp3", "aiff", "opus")

# The kind of a signal's values. A tokenizer says which kind it takes (`kind`); else the signal's name does.
KINDS = {
    "rgb": "image",
    "depth": "depth",
    "normals": "normals",
    "semseg": "classes",
    "instance": "instances",
    "mask": "mask",
    "edges": "edges",
    "caption": "text",
    "category": "class",
    "boxes": "boxes",
    "palette": "palette",
    "metadata": "metadata",
    "answer": "answer",
    "audio": "audio",
}

EXTENSIONS = {
    "image": (*PICTURES, "npy"),
    "mask": (*PICTURES, "npy"),
    "edges": (*PICTURES, "npy"),
    "depth": ("png", "tif", "tiff", "npy"),
    "relative_depth": ("png", "tif", "tiff", "npy"),
    "normals": ("png", "npy"),
    "classes": (*EXACT, "npy"),
    "instances": (*EXACT, "npy"),
    "map": ("png", "tif", "tiff", "npy"),
    "features": ("npy",),
    "ids": ("npy",),
    "text": ("txt", "json", "npy"),
    "class": ("txt", "json", "npy"),
    "boxes": ("json", "npy"),
    "palette": ("json", *PICTURES, "npy"),
    "metadata": ("json", "npy"),
    "answer": ("json", "npy"),
    "audio": (*SOUNDS, "npy"),
    "": ("npy", "png", "json", "txt"),  # of a signal of unknown kind
}

OTHER = EXTENSIONS[""]
LITERAL = ("text", "class", "boxes", "palette", "metadata", "answer")  # kinds that can be written out

# Kinds of arrays [H W ...] that lie on the same pixels as the other signals of their example.
ALIGNED = ("image", "mask", "edges", "depth", "relative_depth", "normals", "classes", "instances", "map")
MAPS = ("classes", "instances", "mask", "map")  # an array of two axes is a map even if of integers, and never tokens
ANY = None

ARRAYS = {  # arrays that are not tokens: kinds of dtype, sizes of the axes (0 = any), text for errors
    "image": ("u", (0, 0, 3), "uint8 [H W 3]"),
    "mask": ("biuf", (0, 0), "bool [H W]"),
    "edges": ("bf", (0, 0), "floats [H W] from 0 to 1"),
    "depth": ("f", (0, 0), "floats [H W] in metres"),
    "relative_depth": ("f", (0, 0), "floats [H W]"),
    "normals": ("f", (0, 0, 3), "floats [H W 3]"),
    "classes": ("iu", (0, 0), "integers [H W]"),
    "instances": ("iu", (0, 0), "integers [H W]"),
    "map": ("iuf", ANY, "numbers [H W] or [H W C]"),
    "features": ("iuf", ANY, "numbers"),
    "palette": ("iu", (0, 3), "integers [n 3]"),
    "audio": ("f", (0,), "floats [T]"),
}

MODES = {  # of images that hold other values than colours
    "depth": ("I;16", "I;16B", "I"),
    "relative_depth": ("I;16", "I;16B", "I"),
    "normals": ("RGB",),
    "classes": ("L", "P", "1", "I;16", "I;16B", "I"),
    "instances": ("L", "P", "1", "I;16", "I;16B", "I"),
    "map": ("L", "P", "I;16", "I;16B", "I", "F", "LA", "RGB", "RGBA"),
}


def decode(signal: str, file: str, data: bytes, kind: str = "") -> Any:
    """The value of `signal` from the content of `file`, which names it in errors and whose extension tells whether it
    is an image, an array or a text. `kind`: what the signal's values are; by default, what its name says (`KINDS`).

        image             pictures       uint8 [H W 3], any mode: see `to_rgb`
        mask              pictures, npy  bool [H W], the bright part: see `to_mask`
        edges             pictures, npy  float32 [H W], 0 to 1
        depth             png, tiff      16 bits, millimetres -> float32 [H W] metres, 0 = unknown, and so is 65535
                          npy            floats, metres; NaN, infinite and negative ones are refused
        relative_depth    png, tiff, npy float32 [H W], any finite values
        normals           png            0..255 -> -1..1 -> float32 [H W 3] unit vectors, zero = unknown (black, grey)
                          npy            floats; those shorter than 1/2 are unknown
        classes,          png, tiff,     int32 [H W]: pixel values or palette indices
        instances         bmp, npy
        map               png, tiff, npy values as stored, [H W] or [H W C] (palette indices)
        features, ids     npy            values as stored
        text, class       txt            str: UTF-8, stripped, not empty
                          json           a string, or a list of strings, of which the first is taken
        boxes             json           [{"bbox": [ymin, xmin, ymax, xmax], "label": "cube"}, ...], in [0, 1]
                                         -> {"bbox": float32 [n 4], "label": n strings}
        palette           json           [[255, 0, 0], ...] -> uint8 [n 3]
                          pictures       uint8 [H W 3], of which the palette is computed
        metadata, answer  json           the value
        audio             wav, ogg, ...  m4.data.sources.sounds.Sound, at its own rate
                          npy            floats [T], at the tokenizer's rate
        any of these      npy            tokens (see `is_tokens`), unchanged
        not known         npy png        the array as stored (palette indices, no rotation)
                          json txt       the value; str, UTF-8

    Images are upright by their EXIF tag; the first of several in one file is taken. ValueError "FILE: what is wrong"
    for an extension that is not allowed, and for empty, damaged or refused content.
    """
    kind = kind or kind_of_name(signal)
    extension, allowed = extension_of(file), EXTENSIONS[kind]
    if extension not in allowed:
        raise ValueError(f"{file}: {signal} has the extension {extension!r}; {closest(extension, allowed)}")
    if not data:
        raise ValueError(f"{file}: it is empty (0 bytes)")
    try:
        if extension == "npy":
            return _from_array(file, _array(data), kind)
        if extension in PICTURES:
            return _from_picture(signal, data, kind)
        if extension in SOUNDS:
            return decode_sound(data)
        return from_text(kind, extension, decode_text(data))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # decoders raise errors of nearly every kind for damaged bytes
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: damaged, or not what its extension says ({reason})") from error


def extension_of(file: str) -> str:
    return os.path.splitext(file)[1][1:].lower()


def kind_of_name(signal: str) -> str:
    """The kind of a signal of that name, "" if it is unknown."""
    return KINDS[signal] if signal in KINDS else ""


def kinds_of(tokenizers: Iterable[Any]) -> dict[str, str]:
    """The kinds of the signals that tokenizers (or recipes) read, by name. ValueError if two differ about one."""
    kinds: dict[str, str] = {}
    for tokenizer in tokenizers:
        kind, name = getattr(tokenizer, "kind", ""), tokenizer.modality.signal
        if not kind or kind == "ids":  # ids are stored under the modality's name
            continue
        if name in kinds and kinds[name] != kind:
            raise ValueError(f"the signal {name!r} is read as {kinds[name]} by one tokenizer, as {kind} by another")
        kinds[name] = kind
    return kinds


def read_for(examples: Any, tokenizers: Iterable[Any]) -> Any:
    """A split whose files are read as these tokenizers (or recipes) take their signals, whatever the names of these."""
    return examples.reading(kinds_of(tokenizers)) if hasattr(examples, "reading") else examples


def is_tokens(signal: str, file: str, value: Any, kind: str = "") -> bool:
    """Whether a decoded value is tokens: an npy file of integers, [num_tokens] or [num_crops num_tokens]."""
    kind = kind or kind_of_name(signal)
    if extension_of(file) != "npy" or value.dtype.kind not in "iu" or kind in ("features", "palette"):
        return False
    return value.ndim == 1 or (value.ndim == 2 and kind not in MAPS)


def extent(signal: str, file: str, value: Any, kind: str = "") -> tuple[int, ...] | None:
    """(H, W) of a decoded value that is aligned with images: an image, or an array of `ALIGNED`; else None."""
    kind = kind or kind_of_name(signal)
    is_picture = extension_of(file) in PICTURES
    return value.shape[:2] if is_picture or (kind in ALIGNED and not is_tokens(signal, file, value, kind)) else None


# ---- Bytes -> array -------------------------------------------------------------------------------------------------


def _array(data: bytes) -> np.ndarray:
    """An array from .npy; unlike numpy's reader, it neither allocates what the header claims nor reads pickles."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy format {version} is not read; allowed: (1, 0), (2, 0)")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never read")
    expected, given = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if min(shape, default=0) < 0 or expected != given:
        raise ValueError(f"{dtype} {list(shape)} takes {expected} bytes, but {given} follow the header")
    array = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if is_fortran else "C")
    return array.astype(dtype.newbyteorder("="), order="C")


# ---- Image, array, text -> value ------------------------------------------------------------------------------------


def _from_picture(signal: str, data: bytes, kind: str) -> np.ndarray:
    if kind in ("image", "palette"):
        return to_rgb(open_picture(data))
    if kind in ("mask", "edges"):
        return {"mask": to_mask, "edges": to_edges}[kind](open_picture(data))
    if not kind:
        return np.array(open_picture(data, ("png",), turn=False, exact=True))
    picture = open_picture(data, LOSSLESS, exact=kind != "normals")
    if picture.mode not in MODES[kind]:
        raise ValueError(f"{signal} from a picture of mode {picture.mode}; allowed: {', '.join(MODES[kind])}")
    pixels = np.array(picture)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    if kind == "depth":
        return _from_millimetres(pixels)
    if kind == "relative_depth":
        return pixels.astype(np.float32) / np.float32(1000)
    if kind == "normals":
        vectors = pixels.astype(np.float32) / np.float32(127.5) - 1
        return _normalised(np.where((pixels == 0).all(axis=-1, keepdims=True), np.float32(0), vectors))
    return pixels.astype(np.int32) if kind in ("classes", "instances") else pixels


def _from_millimetres(pixels: np.ndarray) -> Float32[np.ndarray, "H W"]:
    if (pixels == SATURATED).any():
        warnings.warn("65535 in depth of 16 bits, which is no distance, is read as unknown (0)", stacklevel=2)
    return _metres(np.where(pixels == SATURATED, 0, pixels).astype(np.float32) / np.float32(1000))


def _from_array(file: str, array: np.ndarray, kind: str) -> np.ndarray:
    if kind in ("", "ids") or is_tokens("", file, array, kind):
        return array
    kinds, sizes, allowed = ARRAYS[kind] if kind in ARRAYS else ("", (), "")
    fits = sizes is ANY or (
        array.ndim == len(sizes) and all(size in (0, given) for size, given in zip(sizes, array.shape, strict=True))
    )
    if not fits or array.dtype.kind not in kinds or (kind == "image" and array.dtype != np.uint8):
        either = f"{allowed}, or " if allowed else ""
        raise ValueError(f"{array.dtype} {list(array.shape)}; allowed: {either}tokens (integers, one or two axes)")
    if not array.size:
        raise ValueError(f"{array.dtype} {list(array.shape)} holds nothing")
    if kind in ("classes", "instances"):
        if not -(2**31) <= array.min() <= array.max() < 2**31:
            raise ValueError(f"{array.min()} to {array.max()} are given; allowed: what int32 holds")
        return array.astype(np.int32)
    if kind == "palette":
        return _palette(array.tolist())
    if kind == "mask":
        return array if array.dtype == bool else _as_mask(array)
    if kind not in ("edges", "depth", "relative_depth", "normals"):
        return array
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if kind == "normals":
        return _unit_vectors(array)
    if kind == "depth":
        return _metres(array)
    if not np.isfinite(array).all():
        raise ValueError(f"{np.sum(~np.isfinite(array))} of {array.size} numbers are not finite")
    return array


def _as_mask(array: np.ndarray) -> np.ndarray:
    levels = np.unique(array)
    if len(levels) > 2:
        raise ValueError(f"a mask of {len(levels)} different numbers; allowed: bool [H W], or two numbers")
    return array == levels[1] if len(levels) == 2 else array > 0


def _metres(array: Float32[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W"]:
    bad = {"NaN": np.isnan(array), "infinite": np.isinf(array), "negative": array < 0}
    counts = ", ".join(f"{where.sum()} {name}" for name, where in bad.items() if where.any())
    if counts:
        raise ValueError(f"{counts} of {array.size} depths; unknown depth is 0")
    return array


def _unit_vectors(array: Float32[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "H W 3"]:
    with np.errstate(over="ignore"):
        length = np.linalg.norm(array, axis=-1)
    num_bad = np.sum(~(length <= LONGEST))  # NaN, too
    if num_bad:
        raise ValueError(
            f"{num_bad} of {length.size} normals are longer than {LONGEST} or not finite; "
            "allowed: unit vectors, zero where unknown"
        )
    return _normalised(array)


def _normalised(vectors: Float32[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "H W 3"]:
    """Length 1, or zero (unknown) for those shorter than 1/2."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length < 0.5, np.float32(0), vectors / np.maximum(length, np.float32(0.5)))


def from_text(kind: str, extension: str, text: str) -> Any:
    """The value of a kind that can be written out, from the text of a file, or of JSON itself ("json")."""
    value = parse_json(text) if extension == "json" else text
    if value is None:
        raise ValueError("null is no value; leave the file out")
    if kind in ("text", "class"):
        return _first_text(value, {"text": "caption", "class": "label"}[kind])
    if kind == "palette":
        return _palette(value)
    return _boxes(value) if kind == "boxes" else value


def _first_text(value: Any, what: str) -> str:
    """A caption, or the first of a list of them."""
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(x, str) for x in texts):
        raise ValueError(f"a {what} is a string or a list of strings, not {str(value)[:60]!r}")
    if not texts[0].strip():
        raise ValueError(f"the {what} is empty")
    return texts[0].strip()


def _palette(value: Any) -> np.ndarray:
    is_list = (
        isinstance(value, list) and value and all(isinstance(colour, list) and len(colour) == 3 for colour in value)
    )
    if not is_list or not all(type(x) is int and 0 <= x <= 255 for colour in value for x in colour):
        raise ValueError(f"a palette is a list of [red, green, blue] from 0 to 255, not {str(value)[:60]!r}")
    return np.array(value, np.uint8)


def _boxes(value: Any) -> dict[str, Any]:
    if not isinstance(value, list):
        raise ValueError(f"boxes are a list of objects with bbox and label, not {str(value)[:60]!r}")
    for i, box in enumerate(value):
        if not isinstance(box, Mapping) or not {"bbox", "label"} <= box.keys() or not isinstance(box["label"], str):
            raise ValueError(f"box {i} needs a bbox and a label of text, not {str(box)[:60]!r}")
        bbox = box["bbox"]
        if not isinstance(bbox, list) or [type(x) in (int, float) for x in bbox] != [True] * 4:
            raise ValueError(f"box {i} has the bbox {str(bbox)[:60]}; allowed: four numbers, [ymin, xmin, ymax, xmax]")
        if not all(0 <= x <= 1 for x in bbox):
            raise ValueError(f"box {i} lies outside [0, 1]: {bbox}")
        if bbox[0] > bbox[2] or bbox[1] > bbox[3]:
            raise ValueError(f"box {i} is inverted: {bbox}; allowed: ymin <= ymax and xmin <= xmax")
        if not box["label"].strip():
            raise ValueError(f"box {i} has an empty label")
    bbox = np.array([box["bbox"] for box in value], np.float32).reshape(-1, 4)
    return {"bbox": bbox, "label": [box["label"] for box in value]}
