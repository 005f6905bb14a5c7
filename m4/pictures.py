"""Pictures of many results at once, and PNG files of them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from m4.files import write_atomically

TILE, HEADER, GAP = 128, 16, 4  # pixels


def contact_sheet(rows: Seq[tuple[str, Mapping[str, UInt8[np.ndarray, "_ _ 3"]]]]) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each (name, pictures by title), the name, if any, below its pictures; a column for each title."""
    titles = list(dict.fromkeys(title for _, pictures in rows for title in pictures))
    height = TILE + GAP + (HEADER if any(name for name, _ in rows) else 0)
    canvas = Image.new("RGB", (len(titles) * (TILE + GAP) + GAP, HEADER + len(rows) * height + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for c, title in enumerate(titles):
        pen.text((GAP + c * (TILE + GAP), 3), _printable(title[:20]), fill="black")
    for r, (name, pictures) in enumerate(rows):
        top = HEADER + GAP + r * height
        pen.text((GAP, top + TILE), _printable(name[:40]), fill="grey")
        for title, picture in pictures.items():
            drawn = Image.fromarray(picture)
            side = TILE / max(drawn.size)
            drawn = drawn.resize((round(drawn.width * side), round(drawn.height * side)), Image.Resampling.NEAREST)
            canvas.paste(drawn, (GAP + titles.index(title) * (TILE + GAP), top))
    return np.asarray(canvas)


def labelled(picture: UInt8[np.ndarray, "_ _ 3"] | None, text: str) -> UInt8[np.ndarray, "H W 3"]:
    """A tile for a contact sheet: a picture (or none) above a line of text."""
    tile, side = Image.new("RGB", (TILE, TILE), "white"), TILE - HEADER
    if picture is not None:
        drawn = Image.fromarray(picture)
        scale = side / max(drawn.size)
        drawn = drawn.resize((round(drawn.width * scale), round(drawn.height * scale)), Image.Resampling.NEAREST)
        tile.paste(drawn, ((TILE - drawn.width) // 2, 0))
    ImageDraw.Draw(tile).text((TILE / 2, TILE - HEADER / 2), _printable(text[:22]), fill="black", anchor="mm")
    return np.asarray(tile)


def _printable(text: str) -> str:
    """The text in characters of PIL's built-in font, on one line."""
    return text.encode("latin-1", "replace").decode("latin-1").replace("\n", " ")


def write_png(path: Path, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    write_atomically(path, buffer.getvalue())
