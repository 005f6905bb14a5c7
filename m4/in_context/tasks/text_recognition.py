"""Text recognition: the word in the box of one colour, which only examples show. As TextOCR of VL-ICL Bench."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from m4.in_context.tasks.episode_rng import generator, shuffled
from m4.in_context.tasks.nonce_words import draw_words, same_text
from m4.in_context.tasks.render_text import paint, render_line
from m4.masking.episodes import Episode, Shot

BOXES = {"red": (220, 30, 30), "green": (20, 150, 40), "blue": (40, 60, 230), "orange": (240, 150, 20)}
NUM_WORDS = 3  # in each image


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Image of made-up words in boxes -> the word in the box of one colour, the same in the whole episode."""

    size: int = 64
    """Rows and columns of the images, pixels."""
    max_shots: int = 8
    """Labelled examples of an episode."""

    name: ClassVar[str] = "reading"
    output: ClassVar[str] = "caption"
    images: ClassVar[int] = 1

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Nothing to do: images are rendered when they are needed."""

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        count = self.max_shots + 1
        words = np.array(draw_words(split, count * NUM_WORDS, rng)).reshape(count, NUM_WORDS).tolist()
        relevant, *others = shuffled(BOXES, rng)
        examples = []
        for row in words:
            # The first word is the answer, in the relevant box; then the lines are shuffled.
            colours = [relevant, *shuffled(others, rng)[: NUM_WORDS - 1]]
            lines = shuffled(zip(row, colours, strict=True), rng)
            examples.append(Shot(inputs={"rgb": _page(lines, self.size, rng)}, outputs={"caption": row[0]}))
        return Episode(shots=tuple(examples[:-1]), query=examples[-1], candidates=shuffled(words[-1], rng))

    def correct(self, answer: str, episode: Episode) -> bool:
        return same_text(answer, episode.query.outputs["caption"])


def _page(lines: tuple[tuple[str, str], ...], size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H W C]: words below each other, each in a box of its colour."""
    canvas = np.full((size, size, 3), rng.uniform(200, 255, 3).astype(np.float32))
    colour, row, rim = rng.uniform(0, 70, 3).astype(np.float32), size // len(lines), size // 32
    for i, (word, box) in enumerate(lines):
        ink = render_line(word, int(rng.integers(row * 11 // 20, row * 14 // 20 + 1)))
        height, width = (length + 2 * rim + 2 for length in ink.shape[:2])
        top, left = i * row + int(rng.integers(row - height + 1)), int(rng.integers(size - width + 1))
        # Fill a whole box, and restore its inside, so that a frame is left.
        inside = canvas[top + rim : top + height - rim, left + rim : left + width - rim].copy()
        canvas[top : top + height, left : left + width] = BOXES[box]
        canvas[top + rim : top + height - rim, left + rim : left + width - rim] = inside
        paint(canvas, ink, top + rim + 1, left + rim + 1, colour)
    return canvas.astype(np.uint8)
