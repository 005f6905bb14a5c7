"""In-context examples: few-shot tasks as labelled examples in the context, without a gradient step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """One example: signals by name.

    A list is several images of one signal. Text is a str, or a tuple of str and int: i says "image i of this example"
    (from 1), in reading order.
    """

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """Labelled examples, then a query whose outputs are the truth.

    candidates: answers among which closed-ended scoring chooses (empty: open-ended).
    """

    shots: tuple[Shot, ...]
    query: Shot
    candidates: tuple[Any, ...] = ()


class Task(Protocol):
    """A frozen dataclass that draws episodes. Nothing of its test split that is to be learned occurs in training.

    name: its key in results. output: the signal that is asked for. images: how many are in each example.
    max_shots: labelled examples in every episode, of which every prefix is as balanced over labels as it can be.
    """

    @property
    def name(self) -> str: ...

    output: str
    images: int
    max_shots: int

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Renders what is needed; returns at once when it is there."""

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        """Episode `index` of "train" or "test": a pure function of the task's fields, split and index."""

    def correct(self, answer: Any, episode: Episode) -> bool | float:
        """Whether, or how much, an answer to the query is right."""
