"""How examples are masked: a protocol that data sets and the stream know, each way a frozen dataclass of its own file.

Dataset(source=..., masking=EpisodeMasking(num_examples=5))      its own; without one, that of the config
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from jaxtyping import UInt64

from m4.tokens.batch import MaskedBatch, interleave
from m4.tokens.modality import Modalities


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleMasking(abc.ABC):
    """Examples of a data set -> which tokens are given and which are predicted. Only `__call__` must be defined."""

    @property
    def num_records(self) -> int:
        """Consecutive records of the data set that are one example, a list of them; 0: an example is one record."""
        return 0

    @property
    def num_items(self) -> int:
        """Items of an example are numbered below this; 1: all tokens are of the query's first."""
        return 1

    def num_vectors(self, num_inputs: int) -> int:
        """Rows that each modality of features has in a batch; 0: as many as are needed."""
        return 0

    def check(self, modalities: Modalities) -> None:
        """ValueError for names and values that do not fit."""

    def serves(self, names: Seq[str]) -> bool:
        """Whether it can make use of an example that has these modalities."""
        return True

    @abc.abstractmethod
    def __call__(
        self, examples: Seq[Any], modalities: Modalities, keys: UInt64[np.ndarray, "B 2"], num_inputs: int,
        num_targets: int,
    ) -> MaskedBatch:  # fmt: skip
        """A masked batch. An example's mask depends on its own key (seed, index) alone."""

    @classmethod
    def mask_rows(
        cls, maskings: Seq[Any], examples: Seq[Any], modalities: Modalities, keys: UInt64[np.ndarray, "B 2"],
        num_inputs: int, num_targets: int,
    ) -> MaskedBatch:  # fmt: skip
        """Rows of data sets with maskings of this class, each with its own: equal ones are masked together."""
        parts = []
        for masking in dict.fromkeys(maskings):
            rows = [i for i, other in enumerate(maskings) if other == masking]
            masked = masking([examples[i] for i in rows], modalities, keys[rows], num_inputs, num_targets)
            parts.append((rows, masked))
        return interleave(parts, max(masking.num_vectors(num_inputs) for masking in maskings))
