"""Operator induction: what does "?" mean in "3 ? 4"? One operator per episode, shown by examples alone.

As in VL-ICL Bench (Zong et al. 2024): in one image, in text, or with each digit in an image of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from m4.errors import check
from m4.in_context.tasks.episode_rng import generator, shuffled
from m4.in_context.tasks.nonce_words import same_text
from m4.in_context.tasks.render_text import render_text
from m4.masking.episodes import Episode, Shot

OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
FORMS = {  # form: (name, images of an example)
    "image": ("operator_induction", 1),
    "text": ("operator_induction_text", 0),
    "interleaved": ("operator_induction_interleaved", 2),
}

Pair = tuple[int, int]


def _results(pair: Pair) -> tuple[int, ...]:
    return tuple(operator(*pair) for operator in OPERATORS.values())


def _split_pairs(num_test: int = 20) -> dict[str, list[Pair]]:
    """Ordered pairs of digits. None is in both splits, but each result of a test pair is that of a training pair too,
    and the reverse of a test pair is in training."""
    train = [(a, b) for a in range(10) for b in range(10)]
    test = []
    for i in np.random.default_rng(0).permutation(len(train)):
        pair = (int(i) // 10, int(i) % 10)
        others = [_results(p) for p in train if p != pair]
        is_learnable = all(result in {other[k] for other in others} for k, result in enumerate(_results(pair)))
        if is_learnable and pair[::-1] in train and pair[0] != pair[1] and len(test) < num_test:
            test.append(pair)
            train.remove(pair)
    return {"train": train, "test": test}


PAIRS = _split_pairs()

# Pairs for queries: all operators have different results.
QUERY_PAIRS = {split: [p for p in pairs if len(set(_results(p))) == len(OPERATORS)] for split, pairs in PAIRS.items()}


@dataclass(frozen=True, kw_only=True)
class OperatorInduction:
    """Two digits -> their sum, difference or product."""

    form: str = "image"
    """Where digits are written: in one "image", in "text", or "interleaved", each in an image of its own."""
    size: int = 64
    """Rows and columns of the images, pixels."""
    max_shots: int = 8
    """Labelled examples of an episode."""

    output: ClassVar[str] = "caption"

    def __post_init__(self):
        check("form", self.form, FORMS)

    @property
    def name(self) -> str:
        return FORMS[self.form][0]

    @property
    def images(self) -> int:
        return FORMS[self.form][1]

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Nothing to do: images are rendered when they are needed."""

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        query = QUERY_PAIRS[split][rng.integers(len(QUERY_PAIRS[split]))]
        others = [pair for pair in PAIRS[split] if pair != query]
        pairs = [*(others[i] for i in rng.choice(len(others), self.max_shots, replace=False)), query]
        operator = list(OPERATORS.values())[rng.integers(len(OPERATORS))]
        examples = [Shot(inputs=self._inputs(p, rng), outputs={"caption": str(operator(*p))}) for p in pairs]
        candidates = shuffled(map(str, _results(query)), rng)
        return Episode(shots=tuple(examples[:-1]), query=examples[-1], candidates=candidates)

    def _inputs(self, pair: Pair, rng: np.random.Generator) -> dict[str, Any]:
        a, b = pair
        if self.form == "text":
            return {"caption": f"{a} ? {b}"}
        if self.form == "image":
            return {"rgb": render_text(f"{a} ? {b}", self.size, rng, smallest=0.28, largest=0.42)}
        return {
            "rgb": [render_text(str(x), self.size, rng, smallest=0.4, largest=0.9) for x in pair],
            "caption": (1, " ? ", 2),
        }

    def correct(self, answer: str, episode: Episode) -> bool:
        return same_text(answer, episode.query.outputs["caption"])
