"""Do two objects agree in an attribute that is never named? MiniImageNet matching of VL-ICL Bench."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from m4.in_context.tasks.episode_rng import balanced, generator, shuffled
from m4.in_context.tasks.fast_binding import SceneKinds
from m4.in_context.tasks.nonce_words import draw_words, same_text
from m4.masking.episodes import Episode, Shot

Kind = tuple[str, str]  # colour, shape


@dataclass(frozen=True, kw_only=True)
class PairMatching:
    """Two images -> one made-up word if they agree in colour (or shape, one of both in an episode), else another."""

    kinds: SceneKinds = SceneKinds()
    """What the images show."""
    max_shots: int = 8
    """Labelled examples of an episode."""

    name: ClassVar[str] = "pair_matching"
    output: ClassVar[str] = "caption"
    images: ClassVar[int] = 2

    def prepare(self, data_dir: str | os.PathLike) -> None:
        self.kinds.prepare(data_dir)

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        rgb, by_kind = self.kinds.read(split, data_dir)
        pairs = _pairs(tuple(by_kind))
        relevant, words = int(rng.integers(2)), draw_words(split, 2, rng)
        labels = [*balanced((False, True), self.max_shots, rng), bool(rng.integers(2))]
        examples = []
        for label in labels:
            agree = (label, bool(rng.integers(2)))  # in the relevant attribute, in the other one
            choices = pairs[agree if relevant == 0 else agree[::-1]]
            first, second = choices[rng.integers(len(choices))]
            images = rng.choice(by_kind[first], 2, replace=False)  # two images, should both be of one kind
            if first != second:
                images[1] = rng.choice(by_kind[second])
            answer = words[label]
            examples.append(Shot(inputs={"rgb": [rgb[i] for i in images]}, outputs={"caption": answer}))
        return Episode(shots=tuple(examples[:-1]), query=examples[-1], candidates=shuffled(words, rng))

    def correct(self, answer: str, episode: Episode) -> bool:
        return same_text(answer, episode.query.outputs["caption"])


@functools.cache
def _pairs(kinds: tuple[Kind, ...]) -> dict[tuple[bool, bool], list[tuple[Kind, Kind]]]:
    """Pairs of kinds by whether they agree in colour and in shape."""
    pairs: dict[tuple[bool, bool], list[tuple[Kind, Kind]]]
    pairs = {(colour, shape): [] for colour in (False, True) for shape in (False, True)}
    for first, second in product(kinds, repeat=2):
        pairs[first[0] == second[0], first[1] == second[1]].append((first, second))
    return pairs
