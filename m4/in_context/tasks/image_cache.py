"""Images in memory, from which episodes are drawn fast.

Axes: N images, H rows, W columns, C colours.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from m4.data.dataset import Source
from m4.data.sources.scenes import Scenes
from m4.errors import check
from m4.in_context.tasks.episode_rng import SPLITS

KINDS = Scenes(variant="kinds", num_train=8000, num_validation=8, num_test=8, num_heldout=3000)  # single objects
SCENES = Scenes(variant="simple", num_train=8000, num_validation=8, num_test=4000, num_heldout=4000)


@dataclass(frozen=True, kw_only=True)
class SceneTask:
    """What tasks over rendered scenes have in common."""

    scenes: Scenes = SCENES
    """Scenes from which images are drawn."""
    max_shots: int = 8
    """Labelled examples of an episode."""

    def prepare(self, data_dir: str | os.PathLike) -> None:
        self.scenes.prepare(data_dir)


def heldout(split: str) -> str:
    """The split of rendered scenes of a task's split: tests show held-out kinds."""
    check("split", split, SPLITS)
    return "train" if split == "train" else "heldout"


@dataclass(frozen=True)
class ImageCache:
    """A split of a source. rgb: uint8 [N H W C]; annotations: the other signals that tasks need."""

    rgb: np.ndarray
    annotations: tuple[dict[str, Any], ...]

    def indices_by(self, key: Callable[[dict[str, Any]], Hashable]) -> dict[Any, np.ndarray]:
        """Indices of images by the key of their annotations, sorted."""
        return group_indices(enumerate(map(key, self.annotations)))


def group_indices(entries: Any) -> dict[Any, np.ndarray]:
    """[(index, key)] -> the indices of each key, sorted."""
    groups: dict[Any, list[int]] = {}
    for index, key in entries:
        groups.setdefault(key, []).append(index)
    return {key: np.array(groups[key]) for key in sorted(groups)}


def image_cache(source: Source, split: str, data_dir: str | os.PathLike) -> ImageCache:
    """A split of a prepared source, read once per process (1.2 ms an image)."""
    return _read(source, split, os.fspath(data_dir))  # ty: ignore[invalid-argument-type]  frozen dataclasses are hashable


@functools.cache
def _read(source: Source, split: str, data_dir: str) -> ImageCache:
    examples = source.split(split, data_dir)
    rows = [examples[i] for i in range(len(examples))]
    annotations = tuple({name: row[name] for name in ("objects", "boxes", "caption") if name in row} for row in rows)
    return ImageCache(np.stack([row["rgb"] for row in rows]), annotations)
