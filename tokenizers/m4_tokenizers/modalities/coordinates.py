"""The base of palettes and metadata: short lists of values as sequences of coordinate tokens alone.

    v1=2   v0=255 v0=0   v0=0   v0=0   v0=128 v0=255 [EOS]       two colours, as 4M-21 writes them
    (1, 2) (0, 255) ...                                          the same as pairs (axis, bin)

H rows and W columns of an image.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from m4.registry import from_json, to_json
from m4.tokens.modality import Sequence
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.reading import Reader
from m4_tokenizers.modalities.text import EOS, NUM_COORDINATES, Layout, WordPieceRecipe, as_sequence

Pair = tuple[int, int]


def as_picture(image: Any) -> Image.Image:
    """The image in PIL; ValueError if it is anything but uint8 [H W 3] with at least one pixel."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"an image of {array.dtype} {list(array.shape)} was given; allowed: uint8 [H, W, 3]")
    return Image.fromarray(array)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateRecipe:
    """A subclass says how many bins an axis has (num_bins), and how long a sequence may be (max_length)."""

    signal: str
    """Signal that is read."""
    name: str
    """Name of the modality."""
    num_sentinels: int = 16
    """Masked spans of a sequence, at most."""
    num_examples: int = 4000
    """Examples that are encoded as a check, at most."""
    wordpiece: str = ""
    """Path of 4M's WordPiece file, for its ids; they follow from the layout, the file is only checked. "" is m4's
    own."""

    tokenizer_class: ClassVar[type]

    if TYPE_CHECKING:  # a field, property or constant of each subclass

        @property
        def num_bins(self) -> int: ...

        @property
        def max_length(self) -> int: ...

    def __post_init__(self):
        if self.num_bins > self.layout.num_bins:
            raise ValueError(
                f"{self.name} needs {self.num_bins} bins an axis, the WordPiece file has {self.layout.num_bins}"
            )

    @property
    def layout(self) -> Layout:
        if self.wordpiece:
            return WordPieceRecipe.layout
        return Layout(num_sentinels=self.num_sentinels, num_bins=self.num_bins)

    @property
    def modality(self) -> Sequence:
        return as_sequence(
            name=self.name,
            signal=self.signal,
            vocab_size=WordPieceRecipe.vocab_size if self.wordpiece else self.layout.first_text,
            max_length=self.max_length,
            layout=self.layout,
        )

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        """The signal of a raw example, None if it has none."""
        return example[self.signal] if self.signal in example else None

    def check(self, signal: Any) -> None:
        """ValueError for a signal that `encode` refuses."""
        self.tokenizer_class(recipe=self, card={}).encode([signal])

    def measured(self, tokenizer: Any, source: Examples, *, seed: int) -> Any:
        """The tokenizer with its card; nothing is fitted, so the seed is only recorded."""
        start = time.perf_counter()
        if self.wordpiece:
            WordPieceRecipe(path=self.wordpiece).fit([], seed=seed)
        count = min(len(source), self.num_examples)
        lengths = [len(ids) for ids in tokenizer.encode([self.signal_of(source[i]) for i in range(count)])]
        tokenizer.card.update(
            signal=self.signal,
            vocab_size=self.modality.vocab_size,
            mean_tokens=round(sum(lengths) / max(count, 1), 2),
            longest=max(lengths, default=0),
            num_examples=count,
            fit_seed=seed,
            fit_seconds=round(time.perf_counter() - start, 2),
        )
        return tokenizer


class CoordinateTokenizer(Reader):
    """Pairs as ids and back; a subclass turns a signal into pairs and back, and adds files and pictures."""

    def __init__(self, *, recipe: CoordinateRecipe, card: dict[str, Any]):
        self.recipe: Any = recipe  # a subclass of CoordinateRecipe, with further fields
        self.card = card
        self.layout, self.modality = recipe.layout, recipe.modality

    def to_pairs(self, signal: Any) -> list[Pair]:
        """(axis, bin) of each token, [EOS] excluded; ValueError if the signal is invalid."""
        raise NotImplementedError

    def from_pairs(self, pairs: list[Pair]) -> Any:
        """The signal of all valid pairs; others are skipped (axis -1 is no coordinate)."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        return self.recipe.kind

    def check(self, signal: Any) -> None:
        self.encode([signal])

    def encode(self, signals: Seq[Any]) -> list[np.ndarray]:
        """int32 [n] each, closed by [EOS]; ValueError if a signal is invalid or too long."""
        encoded = []
        for signal in signals:
            pairs = self.to_pairs(signal)
            if len(pairs) >= self.modality.max_length:
                raise ValueError(
                    f"{self.modality.name} of {len(pairs) + 1} tokens is longer than the allowed "
                    f"{self.modality.max_length}: {str(signal)[:60]}"
                )
            ids = [self.layout.first_coordinate + axis * self.layout.num_bins + index for axis, index in pairs]
            encoded.append(np.array([*ids, EOS], np.int32))
        return encoded

    def decode(self, ids: Seq[Seq[int] | np.ndarray]) -> list[Any]:
        """The signals of the ids up to the first [EOS]; invalid ids never raise."""
        signals = []
        for row in ids:
            row = np.asarray(row, np.int64).ravel()
            ends = np.flatnonzero(row == EOS)
            axes, bins = np.divmod(row - self.layout.first_coordinate, self.layout.num_bins)
            axes = np.where((axes >= 0) & (axes < NUM_COORDINATES), axes, -1)
            length = ends[0] if len(ends) else len(row)
            signals.append(self.from_pairs(list(zip(axes[:length].tolist(), bins[:length].tolist(), strict=True))))
        return signals

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        return self.recipe.signal_of(example)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"recipe": to_json(self.recipe)}, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]):
        return cls(recipe=from_json(config["recipe"]), card=card)
