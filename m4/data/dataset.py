"""A dataset of a run: where examples come from, and how often."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from m4.files import shown
from m4.masking.base import ExampleMasking
from m4.tokens.tokenizer import Examples


@runtime_checkable
class Source(Protocol):
    """Aligned raw examples: a frozen dataclass, so that its fields identify its data.

    A source over files that may be edited has `signature(data_dir) -> str` too, which changes when they do; it is
    called first, and raises a ValueError for missing files.
    """

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Renders, downloads or checks what is needed; returns at once when it exists."""

    def split(self, name: str, data_dir: str | os.PathLike) -> Examples:
        """Raw examples of "train", "validation", "test" or another split that the source has.

        A ValueError that names the file is raised where a bad example is read, not before.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One part of what a run reads: raw examples (`source`), or a folder of finished token shards (`tokens`)."""

    source: Any = None
    """Raw examples, such as m4.data.sources.scenes.Scenes; None where `tokens` is given."""
    tokens: str = ""
    """Folder of token shards that `python -m m4 pretokenize` wrote; "" where `source` is given."""
    weight: float = 1.0
    """Share of this data set in the stream of examples, relative to the other weights; above 0."""
    masking: Any = None
    """How its examples are masked: a class of m4.masking, such as DirichletMasking or EpisodeMasking; None: as the
    config's masking says."""
    crops: Any = None
    """Aligned random crops (m4.data.sources.crops.Crops); None takes whole examples."""
    skip_bad: float = 0.0
    """Largest share of unreadable examples that pre-tokenization skips, in [0, 1); 0 stops at the first."""
    signals: tuple[str, ...] = ()
    """Signals of raw examples that are tokenized; () is all that the model has."""
    name: str = ""
    """Name in tables and metrics; "" is that of the source's class, or of the folder."""

    def __post_init__(self):
        if (self.source is None) == (not self.tokens):
            raise ValueError(f"a data set needs a source or tokens, one of them: source={self.source}, {self.tokens=}")
        if not self.weight > 0:
            raise ValueError(f"data set {self.label}: weight={self.weight} must be positive; leave it out instead")
        if not 0 <= self.skip_bad < 1:
            raise ValueError(f"data set {self.label}: skip_bad={self.skip_bad} must be at least 0 and less than 1")
        if self.tokens and self.signals:
            raise ValueError(f"data set {self.label}: signals={self.signals} are chosen when tokens are made")
        if self.tokens and self.crops:
            raise ValueError(f"data set {self.label}: token shards cannot be cropped; pretokenize again with crops")
        if self.masking is not None and self.masking.num_records and self.skip_bad:
            raise ValueError(f"data set {self.label}: where several records are one example, skip_bad must be 0")

    def masked_by(self, default: ExampleMasking) -> ExampleMasking:
        """Its own masking, or that of the config."""
        return default if self.masking is None else self.masking

    @property
    def label(self) -> str:
        return shown(self.name or (Path(self.tokens).name if self.tokens else type(self.source).__name__.lower()))
