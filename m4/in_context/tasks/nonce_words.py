"""Made-up words, and when two texts are the same answer."""

from __future__ import annotations

import functools
from itertools import product

import numpy as np

from m4.data.sources.rendering import NAMES
from m4.errors import check
from m4.in_context.tasks.episode_rng import SPLITS

CONSONANTS, VOWELS = "bdfgklmnprstvxz", "aeiou"
NUM_TEST = 4000


@functools.cache
def made_up_words(split: str) -> tuple[str, ...]:
    """Words of three to five letters, consonants and vowels in turn ("dax"); none is in both splits or an attribute."""
    check("split", split, SPLITS)
    patterns = [(CONSONANTS, VOWELS, CONSONANTS, VOWELS, CONSONANTS)[:length] for length in (3, 4, 5)]
    rng = np.random.default_rng(0)
    words = [rng.permutation([*map("".join, product(*letters))])[:6000] for letters in patterns]
    real = {word for names in NAMES.values() for word in names}
    words = [str(word) for word in rng.permutation(np.concatenate(words)) if word not in real]
    return tuple(words[:NUM_TEST] if split == "test" else words[NUM_TEST:])


def draw_words(split: str, count: int, rng: np.random.Generator) -> list[str]:
    """Different made-up words."""
    words = made_up_words(split)
    return [words[i] for i in rng.choice(len(words), count, replace=False)]


def same_text(answer: str, truth: str) -> bool:
    """Exact match of the first lines, whatever the case, spaces and a full stop at the end."""
    first, second = (" ".join(text.strip().split("\n")[0].lower().split()).rstrip(".") for text in (answer, truth))
    return first == second
