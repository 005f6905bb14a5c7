"""Questions about scenes, and true or false statements about them: VQA and visual entailment as in M2IXT.

Each example contains its question, so that shots show only the form of the answer (Chen et al. 2023).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from m4.data.sources.scenes import Scenes
from m4.in_context.tasks.episode_rng import balanced, generator, pick, shuffled
from m4.in_context.tasks.image_cache import ImageCache, SceneTask, group_indices, heldout, image_cache
from m4.in_context.tasks.nonce_words import same_text
from m4.masking.episodes import Episode, Shot

Object = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Questions(SceneTask):
    """Image and question -> its answer. An episode has questions of one sort; tests show held-out kinds."""

    name: ClassVar[str] = "questions"
    output: ClassVar[str] = "caption"
    images: ClassVar[int] = 1

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        images, entries, sorts = _questions(self.scenes, heldout(split), os.fspath(data_dir))
        answers = sorts[list(sorts)[rng.integers(len(sorts))]]
        labels = [*balanced(range(len(answers)), self.max_shots, rng), int(rng.integers(len(answers)))]
        examples = []
        for i in pick(list(answers.values()), labels, rng):
            scene, question, answer = entries[i]
            inputs = {"rgb": images.rgb[scene], "caption": question}
            examples.append(Shot(inputs=inputs, outputs={"caption": answer}))
        return Episode(shots=tuple(examples[:-1]), query=examples[-1], candidates=shuffled(answers, rng))

    def correct(self, answer: str, episode: Episode) -> bool:
        return same_text(answer, episode.query.outputs["caption"])


def ask(objects: list[Object]) -> Iterator[tuple[str, str, str]]:
    """(sort, question, answer) of every question that has one answer."""
    yield "number", "how many things are there?", str(len(objects))
    for thing in objects:
        alike = lambda *names: sum(all(o[n] == thing[n] for n in names) for o in objects)  # noqa: B023, E731
        if alike("shape") == 1:
            yield "colour", f"what colour is the {thing['shape']}?", thing["colour"]
        if alike("colour") == 1:
            yield "shape", f"what shape is the {thing['colour']} thing?", thing["shape"]
        if alike("colour", "shape") == 1:
            yield "size", f"what size is the {thing['colour']} {thing['shape']}?", thing["size"]


@functools.cache
def _questions(
    scenes: Scenes, split: str, data_dir: str
) -> tuple[ImageCache, list[tuple[int, str, str]], dict[str, Any]]:
    """Images, entries (scene, question, answer), and sort -> answer -> the indices of its entries."""
    images = image_cache(scenes, split, data_dir)
    entries = [(i, *entry) for i, example in enumerate(images.annotations) for entry in ask(example["objects"])]
    sorts = {
        sort: group_indices((n, answer) for n, (_, other, _, answer) in enumerate(entries) if other == sort)
        for sort in ("colour", "number", "shape", "size")
    }
    return images, [(i, question, answer) for i, _, question, answer in entries], sorts


@dataclass(frozen=True, kw_only=True)
class Entailment(SceneTask):
    """Image and statement -> "yes" or "no". False statements are wrong in one word. Tests show held-out kinds."""

    name: ClassVar[str] = "entailment"
    output: ClassVar[str] = "caption"
    images: ClassVar[int] = 1

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        rng = generator(self.name, split, index)
        images = image_cache(self.scenes, heldout(split), data_dir)
        answers = [*balanced(("yes", "no"), self.max_shots, rng), ("yes", "no")[rng.integers(2)]]
        examples = []
        for i, answer in zip(rng.choice(len(images.rgb), len(answers), replace=False), answers, strict=True):
            objects = images.annotations[i]["objects"]
            thing = objects[rng.integers(len(objects))]
            if answer == "no":
                thing = _absent(images, objects, rng)
            inputs = {"rgb": images.rgb[i], "caption": f"there is a {thing['colour']} {thing['shape']}"}
            examples.append(Shot(inputs=inputs, outputs={"caption": answer}))
        return Episode(shots=tuple(examples[:-1]), query=examples[-1], candidates=shuffled(("yes", "no"), rng))

    def correct(self, answer: str, episode: Episode) -> bool:
        return same_text(answer, episode.query.outputs["caption"])


def _absent(images: ImageCache, objects: list[Object], rng: np.random.Generator) -> Object:
    """A random object that equals none of these, but shares the colour or the shape of one of them."""
    while True:
        others = images.annotations[rng.integers(len(images.annotations))]["objects"]
        thing = others[rng.integers(len(others))]
        if max((thing["colour"] == o["colour"]) + (thing["shape"] == o["shape"]) for o in objects) == 1:
            return thing
