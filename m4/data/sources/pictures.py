"""Images from bytes: the formats that are read, and what their modes mean.

Axes: H rows, W columns.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import SAMPLEFORMAT, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS = 64_000_000  # of an image; a larger one is refused by its header, before it takes memory

FORMATS = {  # how their files begin, and what decodes them: no other of PIL's decoders ever sees a file
    "png": ((b"\x89PNG\r\n\x1a\n",), PngImageFile),
    "jpeg": ((b"\xff\xd8\xff",), JpegImageFile),
    "webp": ((b"RIFF",), WebPImageFile),
    "tiff": ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
    "bmp": ((b"BM",), BmpImageFile),
    "gif": ((b"GIF87a", b"GIF89a"), GifImageFile),
    "pnm": ((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf"), PpmImageFile),
}

# Formats whose pixels are the values that were stored: pnm may scale them, jpeg and webp change them, and writers of
# gif renumber the colours.
LOSSLESS = ("png", "tiff", "bmp")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")

# PIL's names of packings whose values it changes: grey of 2 or 4 bits is stretched to 8, inverted grey is inverted,
# channels of 16 bits lose their lower half, and channels without a name are dropped.
CHANGED = re.compile(r"L;[24].*|[1L];I.*|(RGB|LA|CMYK).*;16.*|\w+X+(;.*)?")


def open_picture(
    data: bytes, formats: tuple[str, ...] = (*FORMATS,), *, turn: bool = True, exact: bool = False
) -> Image.Image:
    """The first image of a file, decoded and (if `turn`) upright by its EXIF tag. Its content tells the format.

    ValueError for other formats, for more than MAX_PIXELS by the header, and (if `exact`) where its pixels would not
    be the values that are stored. Damage gives errors of nearly every kind.
    """
    detected = next((name for name, (starts, _) in FORMATS.items() if data.startswith(starts)), "")
    if detected not in formats:
        unknown = f"damaged, or no picture that can be read: it begins with {data[:8]!r}"
        given = f"its content is {detected}" if detected else unknown
        raise ValueError(f"{given}; allowed: {', '.join(formats)}")
    picture = FORMATS[detected][1](
        io.BytesIO(data)
    )  # reads the header; Image.open would warn of sizes on its own terms
    if picture.width * picture.height > MAX_PIXELS:
        given = f"a picture of {picture.height} x {picture.width} pixels"
        raise ValueError(f"{given} was given; allowed: at most {MAX_PIXELS:,} pixels")
    if "jpeg" not in formats and picture.info.get("compression") in LOSSY_TIFF:
        raise ValueError(f"a tiff with {picture.info['compression']} inside was given, which changes the numbers")
    if exact and (how := next((x for x in map(_packing, picture.tile) if CHANGED.fullmatch(x)), _signed(picture))):
        raise ValueError(f"its pixels are stored as {how}, which would be read as other numbers; store them as npy")
    picture.load()
    return upright(picture) if turn else picture


def _packing(tile: Any) -> str:
    """PIL's name of how the pixels of a part of an image are stored, such as "RGB;16B"."""
    arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    return next((x for x in arguments if isinstance(x, str)), "")


def _signed(picture: Image.Image) -> str:
    """The packing of a signed tiff of 8 bits, else ""; PIL ignores the sign."""
    tags = picture.tag_v2 if isinstance(picture, TiffImageFile) else {}
    return "8 bits with a sign" if picture.mode == "L" and SAMPLEFORMAT in tags and 2 in tags[SAMPLEFORMAT] else ""


def upright(picture: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # a damaged tag is common on the web, and no reason to refuse the image
        return ImageOps.exif_transpose(picture)
    return picture


def to_rgb(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """An image of any mode, upright by its EXIF tag: transparent pixels become white, grey of 16 bits keeps its upper
    8, floats are from 0 to 1. ValueError for other floats, and for integers beyond 16 bits."""
    picture.load()  # so that the next step can fail because of the tag alone
    picture = upright(picture)
    if picture.mode == "F":
        picture = Image.fromarray(np.round(_unit_floats(picture) * 255).astype(np.uint8))
    if picture.mode.startswith("I"):  # 16 bits, which PIL would clip to 8
        picture = Image.fromarray((_integers_of_16_bits(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def to_edges(picture: Image.Image) -> Float32[np.ndarray, "H W"]:
    """Brightness from 0 to 1 (black to white)."""
    if picture.mode == "F":
        return _unit_floats(picture)
    return to_rgb(picture).mean(axis=-1).astype(np.float32) / np.float32(255)


def to_mask(picture: Image.Image) -> Bool[np.ndarray, "H W"]:
    """The bright part: the higher of two grey levels, whichever they are; of more, the upper half of the scale.

    Where all visible pixels have one colour and the rest is transparent, it is the opaque part instead. Otherwise
    transparent pixels are white, as in `to_rgb`.
    """
    if picture.has_transparency_data:
        pixels = np.asarray(picture.convert("RGBA"))
        alpha = pixels[..., 3]
        visible = pixels[alpha > 0][:, :3]
        if alpha.min() < 255 and (visible == visible[:1]).all():
            return bright(alpha, 127)
    elif picture.mode == "F":
        return bright(_unit_floats(picture), 0.5)
    elif picture.mode.startswith("I"):
        grey = _integers_of_16_bits(picture)
        return bright(grey, 127 if grey.max() < 256 else 32767)
    return bright(np.asarray(Image.fromarray(to_rgb(picture)).convert("L")), 127)


def bright(grey: np.ndarray, middle: float) -> Bool[np.ndarray, "H W"]:
    """Where values are above `middle`; of exactly two values the higher one."""
    levels = np.unique(grey)
    return grey == levels[1] if len(levels) == 2 else grey > middle


def _unit_floats(picture: Image.Image) -> Float32[np.ndarray, "H W"]:
    array = np.asarray(picture, np.float32)
    if not (array.min() >= 0 and array.max() <= 1):  # NaN, too
        raise ValueError(f"a picture of floats from {array.min():.4g} to {array.max():.4g}; allowed: 0 to 1")
    return array


def _integers_of_16_bits(picture: Image.Image) -> np.ndarray:
    array = np.asarray(picture, np.int64)
    if not 0 <= array.min() <= array.max() < 2**16:
        raise ValueError(f"a picture of integers from {array.min()} to {array.max()}; allowed: 0 to 65535")
    return array
