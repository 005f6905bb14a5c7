"""Fast concept binding: made-up names of kinds of things, to be named or generated after a few examples.

As in Frozen (Tsimpoukelis et al. 2021) and VL-ICL Bench (Zong et al. 2024), with rendered things or cut-outs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from m4.data.sources.scene_rules import read_colours
from m4.data.sources.scenes import Scenes
from m4.data.sources.stamps import Stamps
from m4.in_context.tasks.episode_rng import balanced, generator, pick, shuffled
from m4.in_context.tasks.image_cache import KINDS, heldout, image_cache
from m4.in_context.tasks.nonce_words import draw_words, same_text
from m4.masking.episodes import Episode, Shot

STAMPS = Stamps(max_objects=1, num_train=6000, num_validation=8, num_test=3000)
HELD_OUT = ("food", "household", "plants", "seasonal", "town")  # categories with several cut-outs in the test split


@dataclass(frozen=True, kw_only=True)
class SceneKinds:
    """Pairs of colour and shape. Those for tests, with new colours and a new shape, are in no training split."""

    scenes: Scenes = KINDS
    """Scenes of single objects from which images are drawn."""

    suffix: ClassVar[str] = ""

    def prepare(self, data_dir: str | os.PathLike) -> None:
        self.scenes.prepare(data_dir)

    def read(self, split: str, data_dir: str | os.PathLike) -> tuple[np.ndarray, Mapping[Any, np.ndarray]]:
        """Images [N H W C], and the indices of those of each kind."""
        return _scene_kinds(self.scenes, heldout(split), os.fspath(data_dir))


@functools.cache
def _scene_kinds(scenes: Scenes, split: str, data_dir: str) -> tuple[np.ndarray, Mapping[Any, np.ndarray]]:
    images = image_cache(scenes, split, data_dir)
    return images.rgb, images.indices_by(
        lambda example: (example["objects"][0]["colour"], example["objects"][0]["shape"])
    )


@dataclass(frozen=True, kw_only=True)
class StampKinds:
    """Categories of cut-outs, which need the package of m4.data.sources.stamps; those for tests are HELD_OUT."""

    stamps: Stamps = STAMPS
    """Compositions of single stamps from which images are drawn."""

    suffix: ClassVar[str] = "_stamps"

    def prepare(self, data_dir: str | os.PathLike) -> None:
        self.stamps.prepare(data_dir)

    def read(self, split: str, data_dir: str | os.PathLike) -> tuple[np.ndarray, Mapping[Any, np.ndarray]]:
        """Images [N H W C], and the indices of those of each kind."""
        return _stamp_kinds(self.stamps, split, os.fspath(data_dir))


@functools.cache
def _stamp_kinds(stamps: Stamps, split: str, data_dir: str) -> tuple[np.ndarray, Mapping[Any, np.ndarray]]:
    images = image_cache(stamps, split, data_dir)
    by_category = images.indices_by(lambda example: example["boxes"]["label"][0])
    return images.rgb, {name: i for name, i in by_category.items() if (name in HELD_OUT) == (split == "test")}


@dataclass(frozen=True, kw_only=True)
class FastBinding:
    """Image -> made-up name of its kind."""

    ways: int = 2
    """Kinds in an episode."""
    kinds: SceneKinds | StampKinds = SceneKinds()
    """What the images show: rendered objects or cut-outs."""
    max_shots: int = 8
    """Labelled examples of an episode."""

    output: ClassVar[str] = "caption"
    images: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return f"fast_binding_{self.ways}way{self.kinds.suffix}"

    def prepare(self, data_dir: str | os.PathLike) -> None:
        self.kinds.prepare(data_dir)

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        rgb, by_kind = self.kinds.read(split, data_dir)
        names = draw_words(split, self.ways, rng)
        examples = [
            Shot(inputs={"rgb": rgb[i]}, outputs={"caption": names[label]})
            for i, label in _draw_images(self, list(by_kind.values()), rng)
        ]
        return Episode(shots=tuple(examples[:-1]), query=examples[-1], candidates=shuffled(names, rng))

    def correct(self, answer: str, episode: Episode) -> bool:
        return same_text(answer, episode.query.outputs["caption"])


@dataclass(frozen=True, kw_only=True)
class FastBindingRgb:
    """Made-up name -> image of its kind. Kinds of an episode differ in colour, by which answers are judged."""

    ways: int = 2
    """Kinds in an episode."""
    kinds: SceneKinds = SceneKinds()
    """What the images show."""
    max_shots: int = 8
    """Labelled examples of an episode."""

    name: ClassVar[str] = "fast_binding_rgb"
    output: ClassVar[str] = "rgb"
    images: ClassVar[int] = 1

    def prepare(self, data_dir: str | os.PathLike) -> None:
        self.kinds.prepare(data_dir)

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        rgb, by_kind = self.kinds.read(split, data_dir)
        by_colour = {colour: by_kind[colour, shape] for colour, shape in shuffled(by_kind, rng)}
        names = draw_words(split, self.ways, rng)
        examples = [
            Shot(inputs={"caption": names[label]}, outputs={"rgb": rgb[i]})
            for i, label in _draw_images(self, list(by_colour.values()), rng)
        ]
        return Episode(shots=tuple(examples[:-1]), query=examples[-1])

    def correct(self, answer: np.ndarray, episode: Episode) -> bool:
        """Whether a rule reads the same colours from the pixels of answer and truth."""
        return read_colours(answer) == read_colours(episode.query.outputs["rgb"])


def _draw_images(task: FastBinding | FastBindingRgb, kinds: list[np.ndarray], rng: np.random.Generator):
    """(index of an image, label) of each shot and of the query, for `ways` of the kinds."""
    if len(kinds) < task.ways:
        raise ValueError(f"{task.name}: ways={task.ways}, but there are only {len(kinds)} kinds to choose from")
    # Kinds first, then balanced labels of the shots and a random one of the query, then different images.
    pools = shuffled(kinds, rng)[: task.ways]
    labels = [*balanced(range(task.ways), task.max_shots, rng), int(rng.integers(task.ways))]
    return zip(pick(pools, labels, rng), labels, strict=True)
