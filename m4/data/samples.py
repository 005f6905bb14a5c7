"""The signals of one sample, from files or written out: read as training reads them, all with one geometry.

    wide.png  128 x 64    depth.png  256 x 128    boxes.json       the same image at any scale
        |  the middle square, or (pad) the whole with bars  |          |
    rgb  64 x 64          depth  64 x 64          boxes in coordinates of that square

Axes: H rows and W columns of a file, h x h pixels as a tokenizer takes them, C channels, n boxes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Shaped
from PIL import Image, ImageOps

from m4.data.sources.contents import content
from m4.data.sources.files import (
    ALIGNED,
    EXTENSIONS,
    LITERAL,
    PICTURES,
    decode,
    extension_of,
    extent,
    from_text,
    is_tokens,
)
from m4.files import check_strings, shown
from m4.tokens.tokenizer import ChecksParts, Tokenizer, WritesOut, image_size

GREY = 128  # value of the bars beside an image
BARS = {
    "depth": 0,
    "relative_depth": 0,
    "normals": 0,
    "instances": 0,
    "mask": False,
    "edges": 0,
}  # value in other signals


# ---- Files and what is written out ----------------------------------------------------------------------------------


def kind_of(tokenizer: Tokenizer) -> str:
    """The kind of signal that a tokenizer reads (m4.data.sources.files.KINDS), "" if it reads files in its own way."""
    return getattr(tokenizer, "kind", "")


def file_of(
    value: str | Path, kind: str, folder: Path | None = None, *, words_name_files: bool = True, notice: bool = True
) -> Path | None:
    """The file that a value names, beside `folder` if that is given; None if the value is the signal itself.

    Signals that cannot be written out (images, depth, ...) are always files. For the others (texts, labels, boxes, ...)
    a Path is one, and so is a str that ends in an extension of such files (.txt, .json, ...) and exists; for texts
    and labels only if `words_name_files`.
    """
    path = Path(value) if folder is None else folder / value
    if isinstance(value, Path) or kind not in LITERAL:
        return path
    is_word = kind in ("text", "class")
    if "\n" in value or extension_of(value) not in EXTENSIONS[kind] or (is_word and not words_name_files):
        return None
    if os.path.isfile(path):
        return path
    if notice and is_word and " " not in value:
        warnings.warn(f"{shown(value)} is taken as a text itself: there is no such file", stacklevel=3)
    return None


class _Value(NamedTuple):
    """A signal before it is fitted. `file`: what errors call it. `size`: its extent, if it is aligned with others."""

    signal: Any
    kind: str
    file: str
    size: tuple[int, ...] | None = None
    is_read: bool = True  # from a file or text; else it was given as training gives it


def _read(name: str, value: Any, tokenizer: Tokenizer, folder: Path | None, words_name_files: bool) -> _Value:
    kind, signal = kind_of(tokenizer), tokenizer.modality.signal
    if not isinstance(value, str | Path):
        is_array = isinstance(value, np.ndarray) and value.ndim >= 2
        return _Value(value, kind, name, value.shape[:2] if is_array and _is_map(kind, tokenizer) else None, False)
    if not kind:
        return _Value(tokenizer.read(str(value)), kind, name, None, False)
    file = file_of(value, kind, folder, words_name_files=words_name_files)
    if file is None:
        return _Value(cast(WritesOut, tokenizer).from_text(str(value)), kind, name)
    path = shown(file)
    decoded = decode(signal, path, content(file), kind)
    if kind in LITERAL and is_tokens(signal, path, decoded, kind):
        raise ValueError(f"{path}: tokens ({decoded.dtype} {list(decoded.shape)}), which training alone reads")
    if _is_map(kind, tokenizer):
        is_grid = kind == "features" and decoded.ndim > 1
        return _Value(decoded, kind, path, decoded.shape[:2] if is_grid else extent(signal, path, decoded, kind))
    if kind == "palette" and extension_of(path) in PICTURES:
        return _Value(decoded, "image", path, decoded.shape[:2])
    return _Value(decoded, kind, path)


def _is_map(kind: str, tokenizer: Tokenizer) -> bool:
    return kind in ALIGNED or (kind == "features" and image_size(tokenizer) > 1)


def written_out(kind: str, text: str) -> Any:
    """A signal that is written out: a text, or JSON."""
    if kind in ("text", "class"):
        check_strings(text)
        return text
    return from_text(kind, "json", text)


# ---- One geometry ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How images of H x W pixels (or at another scale) become squares: their middle, or the whole with bars."""

    height: int
    """Rows, pixels."""
    width: int
    """Columns, pixels."""
    pad: bool
    """Keep the whole image and add bars; else take its middle."""

    @property
    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """(y, x) where the square begins and ends, as shares of the image's height and width; bars are beyond it."""
        extent = np.array([self.height, self.width], np.float64)
        side = (extent.max() if self.pad else extent.min()) / extent
        return (1 - side) / 2, (1 + side) / 2

    def picture(
        self, pixels: Shaped[np.ndarray, "H W ..."], kind: str, size: int, resampling: str = "lanczos"
    ) -> Shaped[np.ndarray, "h h ..."]:
        """Images and edges are resized with an antialiased filter, the `resampling` of their tokenizer: "lanczos", or
        "bicubic" after cropping to whole pixels, as 4M. All others take the nearest pixels, which mixes no unknown
        values with known ones, and invents no classes."""
        if pixels.shape[:2] == (size, size):
            return pixels
        if kind in ("image", "edges"):
            picture = Image.fromarray(pixels)
            if self.pad:
                bars = (GREY,) * 3 if kind == "image" else 0
                picture = ImageOps.pad(picture, (size, size), Image.Resampling.LANCZOS, color=bars)
            elif resampling == "bicubic":
                side = min(picture.size)
                left, top = (round((n - side) / 2) for n in picture.size)
                picture = picture.crop((left, top, left + side, top + side)).resize((size, size))
            else:
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
            fitted = np.array(picture)
            return fitted.clip(0, 1) if kind == "edges" else fitted
        height, width = pixels.shape[:2]
        if not self.pad or height == width:
            side = min(height, width)
            rows, columns = (((n - side) / 2 + (np.arange(size) + 0.5) * side / size).astype(int)
                             for n in (height, width))  # fmt: skip
            return pixels[np.ix_(rows, columns)]
        if kind not in BARS:
            raise ValueError(
                f"{kind} cannot be padded: no value stands for what is beyond the picture; crop it (no --pad)"
            )
        num = [max(1, round(n / max(height, width) * size)) for n in (height, width)]  # as ImageOps.pad
        first = [round((size - n) * 0.5) for n in num]
        out = np.full((size, size, *pixels.shape[2:]), BARS[kind], pixels.dtype)
        rows, columns = (
            ((np.arange(n) + 0.5) * length / n).astype(int) for n, length in zip(num, (height, width), strict=True)
        )
        out[first[0] : first[0] + num[0], first[1] : first[1] + num[1]] = pixels[np.ix_(rows, columns)]
        return out

    def points(self, points: np.ndarray) -> np.ndarray:
        """(y, x) in the image, [n 2] -> in the square; points beyond it are outside of [0, 1]."""
        start, stop = self.window
        return (points - start[None]) / (stop - start)[None]

    def boxes(self, bbox: np.ndarray) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
        """Boxes [n 4] clipped to the square, and which of them have a part in it."""
        lowest, highest = (self.points(p) for p in np.split(np.asarray(bbox, np.float64).reshape(-1, 4), 2, axis=1))
        thin = highest == lowest
        inside = np.where(thin, (lowest >= 0) & (lowest <= 1), (highest > 0) & (lowest < 1)).all(axis=1)
        return np.concatenate([lowest, highest], axis=1).clip(0, 1).astype(np.float32), np.asarray(inside)

    def mask(self, cells: np.ndarray) -> np.ndarray:
        """A mask of h x h cells over the whole image -> over the square."""
        size = len(cells)
        start, stop = self.window
        middles = (np.arange(size) + 0.5)[:, None] / size * (stop - start)[None] + start[None]
        inside = (middles >= 0) & (middles < 1)
        rows, columns = (middles * size).clip(0, size - 1).astype(int).T
        return np.where(inside[:, 0][:, None] & inside[:, 1][None], cells[np.ix_(rows, columns)], False)


def _moved_boxes(signal: dict[str, Any], geometry: Geometry, file: str) -> dict[str, Any]:
    bbox, inside = geometry.boxes(signal["bbox"])
    _notice_outside(inside, file, "boxes")
    return {**signal, "bbox": bbox[inside], "label": [x for x, k in zip(signal["label"], inside, strict=True) if k]}


def _moved_answer(items: list[dict[str, Any]], geometry: Geometry, file: str) -> list[dict[str, Any]]:
    moved, inside = [], []
    for item in items:
        target, is_inside = item["target"], True
        if item["kind"] == "box":
            bbox, (is_inside,) = geometry.boxes(np.array([target]))
            target = bbox[0]
        elif item["kind"] == "point":
            target = geometry.points(np.array([target], np.float64))[0].astype(np.float32)
            is_inside = bool(((target >= 0) & (target <= 1)).all())
        elif item["kind"] == "mask":
            target = geometry.mask(np.asarray(target))
            is_inside = bool(target.any())
        inside.append(is_inside)
        moved.append({**item, "target": target})
    _notice_outside(np.array(inside, bool), file, "items")
    return [item for item, is_inside in zip(moved, inside, strict=True) if is_inside]


def _notice_outside(inside: np.ndarray, file: str, what: str) -> None:
    if not inside.all():
        lost = f"{np.sum(~inside)} of {len(inside)} {what}"
        warnings.warn(f"{file}: {lost} lie outside of the picture's middle square, and are left out", stacklevel=4)


def check_aspect(one: tuple[int, ...], other: tuple[int, ...], names: tuple[str, str]) -> None:
    """ValueError unless one extent is the other at some scale, within one pixel of the smaller."""
    small, large = sorted((one, other), key=lambda size: size[0] * size[1])
    long = int(np.argmax(large))
    if abs(small[1 - long] - large[1 - long] * small[long] / max(large[long], 1)) > 1:
        raise ValueError(
            f"{names[0]} has {one[0]} x {one[1]} pixels, {names[1]} {other[0]} x {other[1]} (height x width): signals "
            "of one sample must show the same picture, at any scale"
        )


# ---- Samples --------------------------------------------------------------------------------------------------------


def read_sample(
    values: Mapping[str, Any], tokenizers: Mapping[str, Tokenizer], *, pad: bool = False, folder: Path | None = None,
    words_name_files: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The signals of one sample by name ("rgb", "caption#not"), as `tokenizers` of the same names take them.

    A value is a file or written out (`file_of` tells which), or it is the signal already. Signals that show the same
    image (rgb, depth, normals, maps, masks, boxes, points) share one geometry: they are resized on the short side
    and cropped to the middle, or padded with bars (`pad`). Names with different tags are different images.
    ValueError names the file; notices (warnings) say what was changed.
    """
    read = {n: _read(n, value, tokenizers[n], folder, words_name_files) for n, value in values.items()}
    signals = {}
    for tag in dict.fromkeys(name.partition("#")[2] for name in values):
        group = {name: value for name, value in read.items() if name.partition("#")[2] == tag}
        sizes = {value.file: value.size for value in group.values() if value.size is not None}
        geometry = None
        if sizes:
            first, size = next(iter(sizes.items()))
            geometry = Geometry(*size, pad)
            for file, other in sizes.items():
                check_aspect(size, other, (first, file))
        for name, value in group.items():
            try:
                signals[name] = _finished(value, tokenizers[name], geometry)
            except ValueError as error:
                raise error if value.file in str(error) else ValueError(f"{value.file}: {error}") from error
    return {name: signals[name] for name in values}


def read_samples(inputs: Mapping[str, Seq[Any]], tokenizers: Mapping[str, Tokenizer]) -> dict[str, list[Any]]:
    """`read_sample` of lists of one length (None: the sample lacks it); a str is never a text file.
    ValueError names the sample's place in the lists."""
    read: dict[str, list[Any]] = {name: [None] * len(signals) for name, signals in inputs.items()}
    for i in range(max(map(len, inputs.values()), default=0)):
        given = {name: signals[i] for name, signals in inputs.items() if signals[i] is not None}
        try:
            signals = read_sample(given, tokenizers, words_name_files=False)
        except ValueError as error:
            raise error if len(read[next(iter(read))]) == 1 else ValueError(f"sample {i}: {error}") from error
        for name, signal in signals.items():
            read[name][i] = signal
    return read


def _finished(value: _Value, tokenizer: Tokenizer, geometry: Geometry | None) -> Any:
    """The signal in the sample's geometry, checked by its tokenizer."""
    signal = value.signal
    if value.is_read and value.size is not None and value.kind != "features" and np.ndim(signal) >= 2:
        assert geometry is not None, "what has a size has a geometry"
        resampling = getattr(getattr(tokenizer, "recipe", None), "resampling", "lanczos")
        signal = _fitted(signal, value, geometry, image_size(tokenizer), resampling)
    elif geometry is not None and geometry.height != geometry.width:
        if value.kind == "boxes":
            signal = _moved_boxes(signal, geometry, value.file)
        elif value.kind == "answer":
            checked = cast(ChecksParts, tokenizer).checked
            signal = _moved_answer([checked(item) for item in signal], geometry, value.file)
    if value.is_read:
        if value.kind != "ids":
            signal = tokenizer.signal_of({tokenizer.modality.signal: signal})
        if (check := getattr(tokenizer, "check", None)) is not None:
            check(signal)
    return signal


def _fitted(pixels: np.ndarray, value: _Value, geometry: Geometry, size: int, resampling: str) -> np.ndarray:
    height, width = pixels.shape[:2]
    if (height, width) != (size, size):
        how = "padded" if geometry.pad else "cropped"
        warnings.warn(f"{value.file}: {width} x {height} resized and {how} to {size} x {size}", stacklevel=5)
    return geometry.picture(pixels, value.kind, size, resampling)


def read_mask(file: str | Path, tokenizer: Tokenizer, picture: Any, *, pad: bool = False) -> Bool[np.ndarray, "h h"]:
    """The pixels of an image that stay (True), at its tokenizer's size: the bright part of the mask file.

    `picture`: the file of the image that is kept in part, or its array [H W ...]. Both have one shape, at any scale.
    ValueError otherwise; a notice if nothing or everything stays.
    """
    path, mask = shown(file), load_mask(file)
    if isinstance(picture, str | Path):
        signal = tokenizer.modality.signal
        name = shown(picture)
        size = decode(signal, name, content(picture), kind_of(tokenizer)).shape[:2]
    else:
        name, size = "its picture", np.shape(picture)[:2]
    check_aspect(mask.shape, size, (path, name))
    if mask.all() or not mask.any():
        what = "everything stays" if mask.all() else "nothing stays"
        warnings.warn(f"{path}: {what}: the mask is {'bright' if mask.all() else 'dark'} everywhere", stacklevel=2)
    return fit_mask(mask, tokenizer, pad=pad)


def load_mask(file: str | Path) -> Bool[np.ndarray, "H W"]:
    """The bright part of an image, or of an array [H W], at its own size: see `m4.data.sources.pictures.to_mask`.

    ValueError for what cannot be read so, tokens included, which other readers of a mask take.
    """
    mask = decode("a mask", shown(file), content(file), "mask")
    if mask.dtype != bool:
        raise ValueError(f"{shown(file)} holds {mask.dtype} {list(mask.shape)}; allowed: an image, or an array [H W]")
    return mask


def fit_mask(mask: Bool[np.ndarray, "H W"], tokenizer: Tokenizer, *, pad: bool = False) -> Bool[np.ndarray, "h h"]:
    """A mask in the geometry of its image; bars, if any, do not stay."""
    return Geometry(*mask.shape, pad).picture(mask, "mask", image_size(tokenizer))
