"""Captions of scenes, and boxes of the objects that phrases name: captioning and grounding as in M2IXT."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from m4.data.sources.scene_rules import attribute_counts, micro_f1
from m4.data.sources.scenes import Scenes
from m4.in_context.tasks.episode_rng import balanced, generator, pick
from m4.in_context.tasks.image_cache import ImageCache, SceneTask, heldout, image_cache
from m4.masking.episodes import Episode, Shot


@dataclass(frozen=True, kw_only=True)
class Captioning(SceneTask):
    """Image -> caption, judged by F1 of its (object, attribute) pairs; tests show held-out kinds."""

    name: ClassVar[str] = "captioning"
    output: ClassVar[str] = "caption"
    images: ClassVar[int] = 1

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        images, by_count = _by_object_count(self.scenes, heldout(split), os.fspath(data_dir))
        labels = [*balanced(range(len(by_count)), self.max_shots, rng), int(rng.integers(len(by_count)))]
        examples = [
            Shot(inputs={"rgb": images.rgb[i]}, outputs={"caption": images.annotations[i]["caption"]})
            for i in pick(by_count, labels, rng)
        ]
        return Episode(shots=tuple(examples[:-1]), query=examples[-1])

    def correct(self, answer: str, episode: Episode) -> float:
        return micro_f1([attribute_counts(answer, episode.query.outputs["caption"])])


@functools.cache
def _by_object_count(scenes: Scenes, split: str, data_dir: str) -> tuple[ImageCache, list[np.ndarray]]:
    """Images, and the indices of those with the same number of objects, fewest first."""
    images = image_cache(scenes, split, data_dir)
    return images, list(images.indices_by(lambda example: len(example["objects"])).values())


@dataclass(frozen=True, kw_only=True)
class Grounding(SceneTask):
    """Image and phrase ("red cube") -> the box of the one object that it names; tests show held-out kinds."""

    name: ClassVar[str] = "grounding"
    output: ClassVar[str] = "boxes"
    images: ClassVar[int] = 1

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        images, phrases = _phrases(self.scenes, heldout(split), os.fspath(data_dir))
        examples = []
        for i in rng.choice(len(phrases), self.max_shots + 1, replace=False):
            scene, thing, phrase = phrases[i]
            boxes = images.annotations[scene]["boxes"]
            examples.append(
                Shot(
                    inputs={"rgb": images.rgb[scene], "caption": phrase},
                    outputs={"boxes": {"bbox": boxes["bbox"][thing : thing + 1], "label": [boxes["label"][thing]]}},
                )
            )
        return Episode(shots=tuple(examples[:-1]), query=examples[-1])

    def correct(self, answer: dict[str, Any], episode: Episode) -> bool:
        """Whether the first box overlaps the truth by more than half of their union."""
        if len(answer["bbox"]) == 0:
            return False
        return overlap(answer["bbox"][0], episode.query.outputs["boxes"]["bbox"][0]) > 0.5


def overlap(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Intersection over union of two boxes (ymin, xmin, ymax, xmax)."""
    area = lambda box: float(np.prod(np.maximum(box[2:] - box[:2], 0)))  # noqa: E731
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    both = area(np.concatenate([np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])]))
    return both / max(area(first) + area(second) - both, 1e-12)


@functools.cache
def _phrases(scenes: Scenes, split: str, data_dir: str) -> tuple[ImageCache, list[tuple[int, int, str]]]:
    """Images, and (scene, object, phrase) of each phrase that names one object of its scene."""
    images, phrases = image_cache(scenes, split, data_dir), []
    for i, example in enumerate(images.annotations):
        all_phrases = [f"{o['colour']} {o['shape']}" for o in example["objects"]]
        phrases += [(i, k, phrase) for k, phrase in enumerate(all_phrases) if all_phrases.count(phrase) == 1]
    return images, phrases
