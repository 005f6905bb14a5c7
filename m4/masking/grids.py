"""Random subsets of grid positions for many examples at once."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int, Integer, UInt

from m4.masking.draws import POSITIONS, Draws
from m4.tokens.modality import Features, Grid, Modalities, Sequence


@dataclasses.dataclass
class Grids:
    """The grids and features of a batch of which something is picked, their positions in random order."""

    example: Int[np.ndarray, " R"]
    modality: Int[np.ndarray, " R"]
    order: UInt[np.ndarray, "R L"]  # positions: inputs come first, targets next
    num_inputs: Int[np.ndarray, " R"]
    num_targets: Int[np.ndarray, " R"]
    ids: Integer[np.ndarray, " N"]  # of all rows, one after the other
    first_id: Int[np.ndarray, " R"]  # where those of a row begin; -1: features, whose id is their place

    @classmethod
    def of(cls, examples, modalities: Modalities, lengths, inputs, targets, draws: Draws) -> Grids:
        others = np.array([not isinstance(m, Sequence) for m in modalities])
        example, modality = np.nonzero((inputs + targets) * others)
        length = lengths[example, modality]
        # Of the model, not of the batch, for an example's mask not to depend on what else is in its batch.
        longest = max([2, *(m.max_tokens for m in modalities if not isinstance(m, Sequence))])
        longest += longest % 2
        # Sorting random numbers whose low bits are the position shuffles positions, far faster than argsort.
        bits = int(longest - 1).bit_length()
        dtype, words = (np.uint32, longest // 2) if bits <= 10 else (np.uint64, longest)
        counts = np.bincount(example, minlength=len(examples)).tolist()
        raw = [draws.at(i, POSITIONS).bit_generator.random_raw(n * words) for i, n in enumerate(counts) if n]
        order = np.concatenate([np.zeros(0, np.uint64), *raw]).view(dtype).reshape(len(example), longest)
        low, columns = dtype((1 << bits) - 1), np.arange(longest, dtype=dtype)
        order >>= dtype(1)
        order &= ~low
        order |= columns
        if (length < longest).any():
            order[columns >= length[:, None]] = ~dtype(0)
        order.sort(axis=1)
        order &= low
        is_grid = np.array([isinstance(m, Grid) for m in modalities])[modality]
        names = modalities.names
        pairs = zip(example[is_grid].tolist(), modality[is_grid].tolist(), strict=True)
        ids = np.concatenate([np.zeros(1, np.uint8), *(examples[i][names[j]] for i, j in pairs)])
        first_id = np.where(is_grid, 1 + np.cumsum(length * is_grid) - length, -1)
        return cls(example, modality, order, inputs[example, modality], targets[example, modality], ids, first_id)

    def _picked(self, start: np.ndarray, count: np.ndarray):
        row = np.repeat(np.arange(len(count)), count)
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count - start, count)
        position = self.order[row, place].astype(int)
        first = self.first_id[row]
        ids = np.where(first < 0, place, self.ids[np.where(first < 0, 0, first + position)])
        return self.example[row], ids, self.modality[row], position

    def inputs(self):
        """(example, ids, modality, position) of every input."""
        return self._picked(np.zeros_like(self.num_inputs), self.num_inputs)

    def targets(self):
        """(example, ids, previous, modality, position) of every target."""
        example, ids, modality, position = self._picked(self.num_inputs, self.num_targets)
        return example, ids, np.full(len(ids), -1), modality, position

    def features(self, examples, modalities: Modalities, num_inputs: int) -> dict[str, np.ndarray]:
        """The picked vectors as they are stored, [B K F] with K = the most that can be picked, zeros behind them."""
        features = {}
        for j, m in enumerate(modalities):
            if isinstance(m, Features):
                out = np.empty((len(examples), min(m.max_tokens, num_inputs), m.size), m.dtype)
                counts = np.zeros(len(examples), int)
                rows = np.flatnonzero(self.modality == j)
                counts[self.example[rows]] = self.num_inputs[rows]
                for row, i in zip(rows.tolist(), self.example[rows].tolist(), strict=True):
                    count = counts[i]
                    examples[i][m.name].take(self.order[row, :count], axis=0, out=out[i, :count], mode="clip")
                for i, count in enumerate(counts.tolist()):
                    out[i, count:] = 0
                features[m.name] = out
        return features
