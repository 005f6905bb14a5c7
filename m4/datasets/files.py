"""One stored signal of one example, from bytes: pictures, arrays, captions and boxes, each checked as it is read.

Axes: H rows, W columns, n boxes.
"""

import contextlib
import io
import json
import math
import os
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from m4.components import closest

LONGEST = 1.1  # length of a normal that is still a unit vector
MAX_PIXELS = 64_000_000  # of a picture; a larger one is refused by its header, before it takes memory
PICTURES = {"png": PngImageFile, "jpg": JpegImageFile, "jpeg": JpegImageFile, "webp": WebPImageFile}
EXTENSIONS = {
    "rgb": (*PICTURES, "npy"),
    "depth": ("png", "npy"),
    "normals": ("png", "npy"),
    "semseg": ("png", "npy"),
    "instance": ("png", "npy"),
    "caption": ("txt", "json", "npy"),
    "boxes": ("json", "npy"),
}
OTHER = ("npy", "png", "json", "txt")  # of a signal with any other name
MAPS = ("semseg", "instance")  # integers by nature: two axes are a map and never tokens
IMAGES = {  # what an array may be that is not tokens: kinds of dtype, sizes of its axes (0 = any), in words
    "rgb": ("u", (0, 0, 3), "uint8 [H W 3]"),
    "depth": ("f", (0, 0), "floats [H W] in metres"),
    "normals": ("f", (0, 0, 3), "floats [H W 3]"),
    **dict.fromkeys(MAPS, ("iu", (0, 0), "integers [H W]")),
}


def decode(signal: str, file: str, data: bytes) -> Any:
    """The value of `signal` from the content of `file`, which names it in errors and tells its kind by its extension.

        rgb               png jpg webp   uint8 [H W 3], any mode: see `to_rgb`
        depth             png            16 bits, millimetres -> float32 [H W] metres, 0 = unknown
                          npy            floats, metres; NaN, infinite and negative ones are refused
        normals           png            0..255 -> -1..1 -> float32 [H W 3] unit vectors, zero = unknown (black, grey)
                          npy            floats; those shorter than 1/2 are unknown
        semseg, instance  png, npy       int32 [H W]: pixel values or palette indices
        caption           txt            str: UTF-8, stripped, not empty
                          json           a string, or a list of strings, of which the first counts
        boxes             json           [{"bbox": [ymin, xmin, ymax, xmax], "label": "cube"}, ...], in [0, 1]
                                         -> {"bbox": float32 [n 4], "label": n strings}
        any of these      npy            tokens (see `is_tokens`), as they are
        others            npy png        the array as stored (palette indices, no rotation)
                          json txt       the value; str, UTF-8

    ValueError "FILE: what is wrong" for an extension that is not allowed, and for empty, damaged or refused content.
    """
    extension = extension_of(file)
    allowed = EXTENSIONS[signal] if signal in EXTENSIONS else OTHER
    if extension not in allowed:
        raise ValueError(f"{file}: {signal} has the extension {extension!r}; {closest(extension, allowed)}")
    if not data:
        raise ValueError(f"{file}: it is empty (0 bytes)")
    try:
        if extension == "npy":
            return _from_array(signal, file, _array(data))
        if extension in PICTURES:
            return _from_picture(signal, _picture(data, extension))
        return _from_text(signal, extension, _utf8(data))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # decoders meet damaged bytes with errors of nearly every kind
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: damaged, or not what its extension says ({reason})") from error


def extension_of(file: str) -> str:
    return os.path.splitext(file)[1][1:].lower()


def is_tokens(signal: str, file: str, value: Any) -> bool:
    """Whether a decoded value is tokens: an npy file of integers, [num_tokens] or [num_crops num_tokens]."""
    if extension_of(file) != "npy" or not np.issubdtype(value.dtype, np.integer):
        return False
    return value.ndim == 1 or (value.ndim == 2 and signal not in MAPS)


def extent(signal: str, file: str, value: Any) -> tuple[int, ...] | None:
    """(H, W) of a decoded value that is aligned with pictures: a picture, or an array of `IMAGES`; else None."""
    is_image = extension_of(file) in PICTURES or (signal in IMAGES and not is_tokens(signal, file, value))
    return value.shape[:2] if is_image else None


def to_rgb(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Any mode, upright by its EXIF tag: what is transparent turns white, grey of 16 bits keeps its upper 8."""
    picture.load()  # so that what fails next is the tag alone
    with contextlib.suppress(Exception):  # a damaged tag is common on the web, and not worth the picture
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which PIL would clip to 8
        picture = Image.fromarray((np.asarray(picture, np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


# ---- Bytes -> picture, array, text ----------------------------------------------------------------------------------


def _picture(data: bytes, extension: str) -> Image.Image:
    picture = PICTURES[extension](io.BytesIO(data))  # reads the header; Image.open would warn of sizes on its own terms
    if picture.width * picture.height > MAX_PIXELS:
        given = f"a picture of {picture.height} x {picture.width} pixels"
        raise ValueError(f"{given} was given; allowed: at most {MAX_PIXELS:,} pixels")
    picture.load()
    return picture


def _array(data: bytes) -> np.ndarray:
    """An array from .npy; unlike numpy's reader this one never trusts the header with an allocation, nor a pickle."""
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


def _utf8(data: bytes) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} is 0x{data[error.start]:02x} ({error.reason})") from error


# ---- Picture, array, text -> value ----------------------------------------------------------------------------------


def _from_picture(signal: str, picture: Image.Image) -> np.ndarray:
    modes = {"depth": ("I;16", "I"), "normals": ("RGB",), **dict.fromkeys(MAPS, ("L", "P", "1", "I;16", "I"))}
    if signal in modes and picture.mode not in modes[signal]:
        raise ValueError(f"{signal} from a picture of mode {picture.mode}; allowed: {', '.join(modes[signal])}")
    if signal == "rgb":
        return to_rgb(picture)
    pixels = np.array(picture)
    if signal == "depth":
        return pixels.astype(np.float32) / np.float32(1000)  # millimetres
    if signal == "normals":
        vectors = pixels.astype(np.float32) / np.float32(127.5) - 1
        return _normalised(np.where((pixels == 0).all(axis=-1, keepdims=True), np.float32(0), vectors))
    return pixels.astype(np.int32) if signal in MAPS else pixels


def _from_array(signal: str, file: str, array: np.ndarray) -> np.ndarray:
    if is_tokens(signal, file, array) or signal not in EXTENSIONS:
        return array
    kinds, sizes, allowed = IMAGES[signal] if signal in IMAGES else ("", (), "")
    fits = array.ndim == len(sizes) and all(size in (0, given) for size, given in zip(sizes, array.shape, strict=True))
    if not fits or array.dtype.kind not in kinds or (signal == "rgb" and array.dtype != np.uint8):
        either = f"{allowed}, or " if allowed else ""
        raise ValueError(f"{array.dtype} {list(array.shape)}; allowed: {either}tokens (integers, one or two axes)")
    if signal in MAPS:
        if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
            raise ValueError(f"{array.min()} to {array.max()} are given; allowed: what int32 holds")
        return array.astype(np.int32)
    if signal == "rgb":
        return array
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    return _metres(array) if signal == "depth" else _unit_vectors(array)


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


def _from_text(signal: str, extension: str, text: str) -> Any:
    try:
        value = json.loads(text) if extension == "json" else text
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if signal == "caption":
        return _caption(value)
    return _boxes(value) if signal == "boxes" else value


def _caption(value: Any) -> str:
    """A caption, or the first of a list of them."""
    captions = value if isinstance(value, list) else [value]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"a caption is a string or a list of strings, not {str(value)[:60]!r}")
    if not captions[0].strip():
        raise ValueError("the caption is empty")
    return captions[0].strip()


def _boxes(value: Any) -> dict[str, Any]:
    if not isinstance(value, list):
        raise ValueError(f"boxes are a list of objects with bbox and label, not {str(value)[:60]!r}")
    for i, box in enumerate(value):
        if not isinstance(box, dict) or not {"bbox", "label"} <= box.keys() or not isinstance(box["label"], str):
            raise ValueError(f"box {i} needs a bbox and a label of text, not {str(box)[:60]!r}")
        bbox = box["bbox"]
        if not isinstance(bbox, list) or [type(x) in (int, float) for x in bbox] != [True] * 4:
            raise ValueError(f"box {i} has the bbox {str(bbox)[:60]}; allowed: four numbers, [ymin, xmin, ymax, xmax]")
        if not all(math.isfinite(x) for x in bbox):
            raise ValueError(f"box {i} has numbers that are not finite: {bbox}")
        if not all(0 <= x <= 1 for x in bbox):
            raise ValueError(f"box {i} lies outside [0, 1]: {bbox}")
        if bbox[0] > bbox[2] or bbox[1] > bbox[3]:
            raise ValueError(f"box {i} is inverted: {bbox}; allowed: ymin <= ymax and xmin <= xmax")
    bbox = np.array([box["bbox"] for box in value], np.float32).reshape(-1, 4)
    return {"bbox": bbox, "label": [box["label"] for box in value]}
