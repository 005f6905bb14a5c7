"""Text in pictures, with the font that comes with PIL.

Axes: H rows, W columns, C colours; h and w of a written text.
"""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont


@functools.lru_cache(maxsize=8192)
def written(text: str, height: int) -> np.ndarray:
    """How much ink is where: float32 [h w 1] in [0, 1], without a rim. height: of the font, in pixels."""
    font = _font(height)
    left, top, right, bottom = font.getbbox(text)
    canvas = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), text, fill=255, font=font)
    return np.asarray(canvas.crop(canvas.getbbox()), np.float32)[..., None] / 255


@functools.cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(height)


def two_colours(rng: np.random.Generator) -> np.ndarray:
    """Paper and ink, float32 [2 C], far enough apart in brightness to be read."""
    while True:
        colours = rng.uniform(0, 255, (2, 3)).astype(np.float32)
        paper, ink = colours.sum(1)
        if abs(paper - ink) > 270:
            return colours


def write(canvas: np.ndarray, ink: np.ndarray, top: int, left: int, colour: np.ndarray) -> None:
    """Draws into a float32 [H W C] canvas."""
    part = canvas[top : top + ink.shape[0], left : left + ink.shape[1]]
    part += ink * (colour - part)


def note(text: str, size: int, rng: np.random.Generator, *, smallest: float, largest: float) -> np.ndarray:
    """uint8 [H W C]: a text at a drawn place, in drawn colours, in a font of a drawn share of the picture's height."""
    paper, colour = two_colours(rng)
    ink = written(text, int(rng.integers(int(smallest * size), int(largest * size) + 1)))
    canvas = np.tile(paper, (size, size, 1))
    top, left = rng.integers(0, [size - ink.shape[0] + 1, size - ink.shape[1] + 1])
    write(canvas, ink, top, left, colour)
    return canvas.astype(np.uint8)
