"""Counting objects by an attribute that is never named: CLEVR count induction of VL-ICL Bench without its question."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from m4.data.sources.ray_tracing import SIZES
from m4.data.sources.rendering import VARIANTS
from m4.data.sources.scenes import Scenes
from m4.in_context.tasks.episode_rng import balanced, generator, pick, shuffled
from m4.in_context.tasks.image_cache import ImageCache, SceneTask, image_cache
from m4.in_context.tasks.nonce_words import same_text
from m4.masking.episodes import Episode, Shot

TEST_VALUES = (("colour", "cyan"), ("colour", "purple"), ("shape", "cylinder"))
FEWEST = 40  # least number of scenes of a count in episodes


@dataclass(frozen=True, kw_only=True)
class Counting(SceneTask):
    """Image -> how many objects have one value of one attribute, the same in the whole episode.

    Candidates are the counts of which there are scenes, all about equally frequent in an episode. The values that tests
    count (TEST_VALUES) are never counted in training.
    """

    name: ClassVar[str] = "counting"
    output: ClassVar[str] = "caption"
    images: ClassVar[int] = 1

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        images, values = _pools(self.scenes, split, os.fspath(data_dir))
        counts = values[list(values)[rng.integers(len(values))]]
        labels = [*balanced(range(len(counts)), self.max_shots, rng), int(rng.integers(len(counts)))]
        indices = pick(list(counts.values()), labels, rng)
        answers = [list(counts)[label] for label in labels]
        examples = [
            Shot(inputs={"rgb": images.rgb[i]}, outputs={"caption": str(answer)})
            for i, answer in zip(indices, answers, strict=True)
        ]
        return Episode(shots=tuple(examples[:-1]), query=examples[-1], candidates=shuffled(map(str, counts), rng))

    def correct(self, answer: str, episode: Episode) -> bool:
        return same_text(answer, episode.query.outputs["caption"])


@functools.cache
def _pools(
    scenes: Scenes, split: str, data_dir: str
) -> tuple[ImageCache, dict[tuple[str, str], dict[int, np.ndarray]]]:
    """Images, and (attribute, value) -> count -> indices of scenes with this count, if these are at least FEWEST."""
    images, pools = image_cache(scenes, split, data_dir), {}
    rules = VARIANTS[scenes.variant]
    values = {"colour": rules.colours, "shape": rules.shapes, "size": SIZES}
    counted = [(name, value) for name in values for value in values[name]]
    for name, value in (c for c in counted if (c in TEST_VALUES) == (split == "test")):
        by_count = images.indices_by(lambda example: sum(o[name] == value for o in example["objects"]))  # noqa: B023
        pools[name, value] = {count: indices for count, indices in by_count.items() if len(indices) >= FEWEST}
    return images, pools
