"""The kinds of modality, and the ordered modalities of a model with look-up by name.

A modality turns a *signal* (what users name: rgb, depth, caption, boxes) into tokens of one kind:

    Grid      a fixed raster of ids, predicted in parallel        rgb_tokens  8 x 8 of 1000
    Sequence  ids in reading order, predicted left to right       caption     up to 32 of 700
    Features  continuous vectors, input only                      rgb_pixels  8 x 8 patches of 192 values
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from m4.errors import closest
from m4.files import check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A raster of `shape` token ids in [0, vocab_size); position = raster index."""

    name: str
    """Name of the modality."""
    signal: str
    """Signal that it represents, as users name it: "rgb", "depth"."""
    vocab_size: int
    """Different token ids."""
    shape: tuple[int, ...]
    """Rows and columns of tokens."""
    is_input: bool = True
    """Whether the model may read it."""
    is_target: bool = True
    """Whether the model may predict it."""
    learned_positions: bool = False
    """Learned position embeddings; else sines and cosines."""

    @property
    def max_tokens(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequence:
    """At most `max_length` ids in [0, vocab_size), ending in `end_id`; position = place in the packed span sequence.

    Masked spans are replaced by the sentinels first_sentinel, first_sentinel + 1, ... (T5, Raffel et al. 2020,
    section 3.1.4; 4M, Mizrahi et al. 2023, section 2.2). Targets may be two tokens longer than the sequence: they
    open and close with a sentinel.
    """

    name: str
    """Name of the modality."""
    signal: str
    """Signal that it represents, as users name it: "caption", "boxes"."""
    vocab_size: int
    """Different token ids."""
    max_length: int
    """Ids of a sequence, at most, `end_id` included."""
    first_sentinel: int
    """Id of the first sentinel."""
    num_sentinels: int
    """Sentinels, and so masked spans of a sequence, at most."""
    end_id: int
    """Id that ends a sequence."""
    is_input: bool = True
    """Whether the model may read it."""
    is_target: bool = True
    """Whether the model may predict it."""
    chunk_ids: tuple[int, int] = (0, 0)
    """Ids (first, last + 1) that begin a chunk, which is masked whole, as [EOS] does; (0, 0) makes every token one."""
    first_declaration: int = 0
    """First of the ids that declare an answer (the first) or image i of an in-context example (index i;
    m4.masking.episodes)."""
    num_declarations: int = 0
    """Number of such ids; 0 is none."""
    num_target_positions: int = 0
    """Positions of targets with an address of their own; those beyond have that of position 0, as in 4M. 0: all."""

    learned_positions = False

    @property
    def max_tokens(self) -> int:
        return self.max_length + 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """prod(shape) continuous vectors of `size` values, input only.

    The model reads (stored / scale - mean) / std, where mean and std repeat along the last axis (channels vary fastest
    in a patch).
    """

    name: str
    """Name of the modality."""
    signal: str
    """Signal that it represents, as users name it: "rgb"."""
    shape: tuple[int, ...]
    """Rows and columns of vectors; of a sequence of vectors (T5) its greatest length."""
    size: int
    """Values of each vector."""
    scale: float = 1.0
    """Divisor of stored values: 255 for pixels."""
    mean: tuple[float, ...] = (0.0,)
    """Mean of values after scaling."""
    std: tuple[float, ...] = (1.0,)
    """Standard deviation of values after scaling."""
    bias: bool = False
    """Whether the map to the model's width has a bias."""
    dtype: str = "float32"
    """Type of stored values, such as "uint8"."""

    vocab_size = 0
    is_input = True
    is_target = False
    learned_positions = False

    @property
    def max_tokens(self) -> int:
        return math.prod(self.shape)

    def normalize(self, stored: Any) -> Any:
        """[..., size] of any numeric type -> float32 [..., size], of numpy or (under jit) of JAX."""
        repeats = self.size // len(self.mean)
        scale = np.tile(np.asarray(self.std, np.float32) * np.float32(self.scale), repeats)
        shift = np.tile(np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32), repeats)
        row = (1,) * (stored.ndim - 1) + (-1,)
        return stored.astype(np.float32) / scale.reshape(row) - shift.reshape(row)


Modality = Grid | Sequence | Features


class Modalities(Seq[Modality]):
    """The ordered modalities of a model: index, slice of the one embedding table, look-up by name or signal.

    ValueError for names that are given twice, or are not safe as part of a path.
    """

    def __init__(self, items: Seq[Modality]):
        for m in items:
            if not isinstance(m, Modality):
                raise ValueError(f"{str(m)[:80]!r} is no modality; allowed: Grid, Sequence, Features")
            check_name(m.name, "a modality")  # they become paths, and may come from a file
            check_name(m.signal, f"the signal of modality {m.name}")
        names = [m.name for m in items]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise ValueError(f"modalities {repeated} are given twice; names must differ")
        self.items = tuple(items)
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __iter__(self) -> Iterator[Modality]:
        return iter(self.items)

    def offsets(self, count: Callable[[Modality], int]) -> tuple[int, ...]:
        """Where each modality's rows begin in a table with `count(modality)` rows for each, and its end."""
        return tuple(int(o) for o in np.cumsum([0, *(count(m) for m in self.items)]))

    def index(self, name: str) -> int:  # ty: ignore[incompatible-method-override]  by name, not by item
        if name not in self.names:
            raise ValueError(f"unknown modality {name!r}; {closest(name, self.names)}")
        return self.names.index(name)

    def named(self, name: str) -> Modality:
        return self.items[self.index(name)]

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.signal for m in self))

    def as_input(self, name: str) -> Modality:
        """The modality that reads `name` (a signal or an exact modality name): Features before tokens."""
        return self._resolve(name, [m for m in self if m.is_input], prefer=Features)

    def as_target(self, name: str) -> Modality:
        """The modality that predicts `name` (a signal or an exact modality name): never Features."""
        return self._resolve(name, [m for m in self if m.is_target], prefer=(Grid, Sequence))

    def _resolve(self, name: str, allowed: Seq[Modality], prefer) -> Modality:
        for m in allowed:
            if m.name == name:
                return m
        matches = sorted((m for m in allowed if m.signal == name), key=lambda m: not isinstance(m, prefer))
        if not matches:
            if name in self.names:
                kind = "input" if self.named(name).is_input else "target"
                raise ValueError(f"modality {name!r} is {kind} only; {closest(name, [m.name for m in allowed])}")
            names = list(dict.fromkeys([n for m in allowed for n in (m.signal, m.name)]))
            raise ValueError(f"unknown modality {name!r}; {closest(name, names)}")
        return matches[0]
