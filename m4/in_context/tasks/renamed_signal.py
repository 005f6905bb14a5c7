"""A task with a signal under another name, for a model that has a modality of its own for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from m4.masking.episodes import Episode, Shot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renamed:
    """A task with a signal under another name: Renamed(task=FastBinding(), old="caption", new="name").

    ValueError where an example has both.
    """

    task: Any
    """The task."""
    old: str
    """Name of the signal in the task."""
    new: str
    """Its name here."""

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def output(self) -> str:
        return self.new if self.task.output == self.old else self.task.output

    @property
    def images(self) -> int:
        return self.task.images

    @property
    def max_shots(self) -> int:
        return self.task.max_shots

    def prepare(self, data_dir: str | os.PathLike) -> None:
        self.task.prepare(data_dir)

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        return _renamed(self.task.draw(split, index, data_dir), self.old, self.new)

    def correct(self, answer: Any, episode: Episode) -> bool | float:
        return self.task.correct(answer, _renamed(episode, self.new, self.old))


def _renamed(episode: Episode, old: str, new: str) -> Episode:
    def renamed_signals(signals: Mapping[str, Any]) -> dict[str, Any]:
        if old in signals and new in signals:
            raise ValueError(f"{old!r} cannot be renamed to {new!r}: the task has both")
        return {new if name == old else name: value for name, value in signals.items()}

    def rename(shot: Shot) -> Shot:
        return Shot(inputs=renamed_signals(shot.inputs), outputs=renamed_signals(shot.outputs))

    return dataclasses.replace(episode, shots=tuple(map(rename, episode.shots)), query=rename(episode.query))
