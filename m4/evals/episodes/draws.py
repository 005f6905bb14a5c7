"""What every task draws with: one generator per episode, balanced labels, made-up words, images in memory."""

import functools
import os
import zlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from m4.data import Source
from m4.datasets.rendering import NAMES, check

SPLITS = ("train", "test")
CONSONANTS, VOWELS = "bdfgklmnprstvxz", "aeiou"
NUM_TEST_WORDS = 4000


def generator(name: str, split: str, index: int) -> np.random.Generator:
    """The only source of randomness of one episode."""
    check("split", split, SPLITS)
    return np.random.default_rng([zlib.crc32(name.encode()), SPLITS.index(split), index])


def balanced(choices: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    """`count` choices in blocks that hold each of them once, in random order: no prefix could be more balanced."""
    blocks = [rng.permutation(len(choices)) for _ in range(-(-count // len(choices)))]
    return [choices[i] for i in np.concatenate(blocks)[:count]]


def shuffled(choices: Iterable[Any], rng: np.random.Generator) -> tuple[Any, ...]:
    choices = list(choices)
    return tuple(choices[i] for i in rng.permutation(len(choices)))


@functools.cache
def made_up_words(split: str) -> tuple[str, ...]:
    """Of three to five letters, consonants and vowels in turn ("dax"); none is in both splits, none an attribute."""
    check("split", split, SPLITS)
    patterns = [[CONSONANTS, VOWELS] * 2, [CONSONANTS, VOWELS, CONSONANTS], [CONSONANTS, VOWELS] * 2 + [CONSONANTS]]
    words = [[*map("".join, product(*letters))] for letters in patterns]
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.permutation(w)[:6000] for w in words])  # lengths about equally often
    real = {word for names in NAMES.values() for word in names}
    chosen = [str(word) for word in rng.permutation(chosen) if word not in real]
    return tuple(chosen[:NUM_TEST_WORDS] if split == "test" else chosen[NUM_TEST_WORDS:])


def draw_words(split: str, count: int, rng: np.random.Generator) -> list[str]:
    """Different made-up words."""
    words = made_up_words(split)
    return [words[i] for i in rng.choice(len(words), count, replace=False, shuffle=False)]


def same_text(answer: Any, truth: str) -> bool:
    """Exact match of the first line, whatever the case, spaces and a full stop at the end."""
    first, second = (" ".join(str(text).strip().split("\n")[0].lower().split()).rstrip(".") for text in (answer, truth))
    return first == second


def pick(pools: Sequence[np.ndarray], labels: Sequence[int], rng: np.random.Generator) -> list[int]:
    """An entry of its pool for each label, none twice."""
    counts = np.bincount(labels, minlength=len(pools))
    decks = [iter(rng.choice(pool, n, replace=False)) for pool, n in zip(pools, counts, strict=True)]
    return [int(next(decks[label])) for label in labels]


@dataclass(frozen=True)
class Bank:
    """A split of a source in memory. rgb: uint8 [N H W C]; annotations: the other signals that tasks ask for."""

    rgb: np.ndarray
    annotations: tuple[dict[str, Any], ...]

    def places(self, key: Callable[[dict[str, Any]], Hashable]) -> dict[Any, np.ndarray]:
        """Numbers of examples by key, sorted."""
        keys = [key(example) for example in self.annotations]
        return {k: np.array([i for i, other in enumerate(keys) if other == k]) for k in sorted(set(keys))}


def bank(source: Source, split: str, data_dir: str | os.PathLike) -> Bank:
    """A split of a prepared source, read once per process (1.2 ms an example)."""
    return _read(source, split, os.fspath(data_dir))


@functools.cache
def _read(source: Source, split: str, data_dir: str) -> Bank:
    examples = source.split(split, data_dir)
    rows = [examples[i] for i in range(len(examples))]
    kept = tuple({name: row[name] for name in ("objects", "boxes", "caption") if name in row} for row in rows)
    return Bank(np.stack([row["rgb"] for row in rows]), kept)
