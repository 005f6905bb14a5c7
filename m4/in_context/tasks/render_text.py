"""Text in images, with the font that comes with PIL.

Axes: H rows, W columns, C colours; h and w of a rendered line.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont


@functools.cache
def _letter(letter: str, height: int) -> np.ndarray:
    """float32 [h w] in [0, 1]; letters of one font are as high as its lines."""
    font = _font(height)
    canvas = Image.new("L", (round(font.getlength(letter)), sum(font.getmetrics())))
    ImageDraw.Draw(canvas).text((0, 0), letter, fill=255, font=font)
    return np.asarray(canvas, np.float32) / 255


@functools.cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(height)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def render_line(text: str, height: int) -> np.ndarray:
    """Ink of a line of text, float32 [h w 1] in [0, 1], without a margin. height: that of the font, in pixels."""
    line = np.concatenate([_letter(letter, height) for letter in text], axis=1)
    rows, columns = (np.flatnonzero(line.any(axis)) for axis in (1, 0))
    return line[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, None]


def two_colours(rng: np.random.Generator) -> np.ndarray:
    """Paper and ink, float32 [2 C], far enough apart in brightness to be read."""
    while True:
        pairs = rng.uniform(0, 255, (16, 2, 3)).astype(np.float32)
        contrasting = np.flatnonzero(np.abs(pairs.sum(2) @ np.array([1, -1], np.float32)) > 270)
        if len(contrasting):
            return pairs[contrasting[0]]


def paint(canvas: np.ndarray, ink: np.ndarray, top: int, left: int, colour: np.ndarray) -> None:
    """Paints ink into a float32 [H W C] canvas."""
    part = canvas[top : top + ink.shape[0], left : left + ink.shape[1]]
    part += ink * (colour - part)


def render_text(text: str, size: int, rng: np.random.Generator, *, smallest: float, largest: float) -> np.ndarray:
    """uint8 [H W C]: a text at a random place, in random colours, in a font of a random share of the image's height."""
    paper, colour = two_colours(rng)
    ink = render_line(text, int(rng.integers(int(smallest * size), int(largest * size) + 1)))
    canvas = np.full((size, size, 3), paper)
    top, left = rng.integers(0, [size - ink.shape[0] + 1, size - ink.shape[1] + 1])
    paint(canvas, ink, top, left, colour)
    return canvas.astype(np.uint8)
