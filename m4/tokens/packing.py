"""Records (stored arrays by modality) as addressed tokens in rows of one length, as models read them.

n tokens, K vectors of F values
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from m4.tokens.batch import Tokens, pad
from m4.tokens.modality import Features, Grid, Modalities, Sequence

ANSWER = 0  # the declaration before an answer; declaration i is image i of the example
Record = Mapping[str, np.ndarray]  # by modality, or MODALITY#x for a second one


@functools.cache
def coarse_to_fine(shape: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """Raster positions in an order whose first 1, 4, 16, 64, .. form evenly spaced grids over the whole."""
    levels = []
    for size in shape:
        bits = max(size - 1, 1).bit_length()
        # Level of a position along an axis: 0 for the middle, then one more for each halving of the spacing.
        places = (np.arange(size) + size // 2) % size
        level = np.array([0 if p == 0 else bits - ((p & -p).bit_length() - 1) for p in places.tolist()])
        levels.append(level)
    # A position belongs to the coarsest grid that has both its row and its column.
    level = functools.reduce(np.maximum.outer, levels)
    return np.argsort(level.ravel(), kind="stable")


class Packed(NamedTuple):
    """Columns of input tokens (ids, modality, position, item, example) and the vectors that ids of features index."""

    columns: Int[np.ndarray, "5 n"]
    features: dict[str, np.ndarray]  # stored [k F]

    @classmethod
    def nothing(cls) -> Packed:
        return cls(np.zeros((5, 0), np.int32), {})

    @classmethod
    def join(cls, parts: Seq[Packed], modalities: Modalities) -> Packed:
        columns, features = [], {}
        for part in parts:
            ids = part.columns[0].copy()
            for name, vectors in part.features.items():
                ids[part.columns[1] == modalities.index(name)] += sum(map(len, features.setdefault(name, [])))
                features[name].append(vectors)
            columns.append(np.concatenate([ids[None], part.columns[1:]]))
        nothing = cls.nothing().columns
        return cls(np.concatenate([nothing, *columns], axis=1), {n: np.concatenate(v) for n, v in features.items()})


def pack(
    records: Seq[Record], items: Seq[int], modalities: Modalities, *, example: int = 0, num_tokens: int = 0
) -> Packed:
    """One example, each of its images an item of its own. `num_tokens`: of each image at most, coarse to fine
    (0: all)."""
    columns, features = [], {}
    for record, own_item in zip(records, items, strict=True):
        for name, stored in record.items():
            m = modalities.named(name.partition("#")[0])
            if isinstance(m, Sequence):
                ids, place, item = stored, np.arange(len(stored)), _items_of_text(stored, m, items)
            else:
                place = np.arange(len(stored))
                if 0 < num_tokens < len(stored):
                    order = coarse_to_fine(m.shape)
                    place = order[order < len(stored)][:num_tokens]
                if isinstance(m, Grid):
                    place = place[stored[place] >= 0]  # -1: unknown tokens of a partial grid
                ids, item = stored[place], np.full(len(place), own_item)
            if isinstance(m, Features):
                # Ids of features are rows of the vectors so far, to which these are appended.
                vectors = features.setdefault(name, [])
                ids, _ = np.arange(len(place)) + sum(map(len, vectors)), vectors.append(ids)
            index, number = np.full(len(ids), modalities.index(m.name)), np.full(len(ids), example)
            columns.append(np.stack([ids, index, place, item, number]))
    nothing = Packed.nothing().columns
    return Packed(
        np.concatenate([nothing, *columns], axis=1).astype(np.int32),
        {n: np.concatenate(v) for n, v in features.items()},
    )


def _items_of_text(ids: np.ndarray, m: Sequence, items: Seq[int]) -> np.ndarray:
    """Items of a text's tokens: the example's first, but for declarations of images those of the images."""
    declared = ids.astype(int) - m.first_declaration
    item = np.full(len(ids), items[0])
    for i, image in enumerate(items, 1):
        item[(declared == i) & (i < m.num_declarations)] = image
    return item


def stack(
    rows: Seq[Packed], modalities: Modalities, length: int, num_vectors: int
) -> tuple[Tokens, dict[str, np.ndarray]]:
    """Rows padded with invalid slots to Tokens [B length], and the stored features [B num_vectors F] of the
    continuous modalities that any row has."""
    counts = np.array([row.columns.shape[1] for row in rows])
    columns = [np.stack([pad([row.columns[i]], length) for row in rows]) for i in range(5)]
    features = {}
    for m in modalities:
        if isinstance(m, Features) and any(m.name in row.features for row in rows):
            features[m.name] = np.zeros((len(rows), num_vectors, m.size), m.dtype)
            for out, row in zip(features[m.name], rows, strict=True):
                if m.name in row.features:
                    out[: len(row.features[m.name])] = row.features[m.name]
    return Tokens(*columns, np.arange(length) < counts[:, None]), features
