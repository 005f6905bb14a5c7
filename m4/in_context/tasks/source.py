"""Episodes as ordinary raw examples, so that they are pre-tokenized and streamed like any other data set."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

from m4.data.sources import rendering, stamps
from m4.errors import check
from m4.in_context.tasks.episode_rng import SPLITS
from m4.masking.episodes import Episode, Task, raw_examples

VERSION = "1.0.0"  # version of the tasks: raise it whenever the same arguments give other episodes


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeSource:
    """Episodes of a task. Each is `records` consecutive raw examples, labelled example by example, the query last.

    The first record of an example has its signals (the first image of several), further records the further images:

        {"rgb": image 1, "caption": (1, " ? ", 2, 0, "7")}, {"rgb": image 2}, ...

    Text is (*question, 0, answer), where 0 separates the two; or one of them, if the example has no other.
    """

    task: Any
    """The task (m4.in_context.tasks)."""
    num_train: int = 2000
    """Episodes of the split train."""
    num_test: int = 200
    """Episodes of the split test."""
    seed: int = 0
    """Seed of the episodes."""

    splits = SPLITS

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must be at least 0")

    @property
    def records(self) -> int:
        return (self.task.max_shots + 1) * max(1, self.task.images)

    def signature(self, data_dir: str | os.PathLike) -> str:
        """The versions of the code that draws and renders."""
        return f"{VERSION}, scenes {rendering.VERSION}, stamps {stamps.VERSION}"

    def prepare(self, data_dir: str | os.PathLike) -> None:
        self.task.prepare(data_dir)

    def split(self, name: str, data_dir: str | os.PathLike) -> "EpisodeSplit":
        check("split", name, SPLITS)
        return EpisodeSplit(self, name, os.fspath(data_dir))


@dataclasses.dataclass(frozen=True)
class EpisodeSplit:
    """A sequence of raw examples."""

    source: EpisodeSource
    name: str
    data_dir: str

    def __len__(self) -> int:
        return getattr(self.source, f"num_{self.name}") * self.source.records

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} ({self.name} of {self.source.task.name})")
        episode, record = divmod(int(index) % len(self), self.source.records)
        return _records(self.source.task, self.name, (self.source.seed << 32) + episode, self.data_dir)[record]


@functools.lru_cache(maxsize=16)  # the records of an episode are read one by one
def _records(task: Task, split: str, index: int, data_dir: str) -> tuple[dict[str, Any], ...]:
    episode: Episode = task.draw(split, index, data_dir)
    return tuple(record for shot in (*episode.shots, episode.query) for record in raw_examples(shot))
