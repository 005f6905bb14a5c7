"""Random draws of all tasks: one generator per episode, balanced labels, no entry of a pool twice."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from m4.errors import check

SPLITS = ("train", "test")


def generator(name: str, split: str, index: int) -> np.random.Generator:
    """The only source of randomness of one episode."""
    check("split", split, SPLITS)
    return np.random.default_rng([zlib.crc32(name.encode()), SPLITS.index(split), index])


def balanced(choices: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    """`count` choices in blocks that hold each of them once, in random order, so that every prefix is balanced."""
    blocks = [rng.permutation(len(choices)) for _ in range(-(-count // len(choices)))]
    return [choices[i] for i in np.concatenate(blocks)[:count]]


def shuffled(choices: Iterable[Any], rng: np.random.Generator) -> tuple[Any, ...]:
    choices = list(choices)
    return tuple(choices[i] for i in rng.permutation(len(choices)))


def pick(pools: Sequence[np.ndarray], labels: Sequence[int], rng: np.random.Generator) -> list[int]:
    """An entry of its pool for each label, none of a pool twice. ValueError if a pool is too small."""
    counts = np.bincount(labels, minlength=len(pools))
    for pool, count in zip(pools, counts.tolist(), strict=True):
        if len(pool) < count:
            raise ValueError(f"an episode needs {count} different examples of one kind, and there are {len(pool)}")
    decks = [iter(rng.choice(pool, n, replace=False)) for pool, n in zip(pools, counts, strict=True)]
    return [int(next(decks[label])) for label in labels]
