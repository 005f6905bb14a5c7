"""Records, stored arrays by modality, as addressed tokens in rows of one length: what models read, in training or not.

n tokens, K vectors of F numbers
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
    """Raster positions in an order whose beginnings are grids: 1 token, 4, 16, 64, .. evenly over the whole."""
    offsets = []
    for size in shape:
        bits = max(size - 1, 1).bit_length()
        # A place's level: how far it is halved; the middle first.
        places = (np.arange(size) + size // 2) % size
        level = np.array([0 if p == 0 else bits - ((p & -p).bit_length() - 1) for p in places.tolist()])
        offsets.append(level)
    level = functools.reduce(np.maximum.outer, offsets)
    return np.argsort(level.ravel(), kind="stable")


class Packed(NamedTuple):
    """Columns of input tokens (ids, modality, position, shot) and the vectors that ids of features count."""

    columns: Int[np.ndarray, "4 n"]
    features: dict[str, np.ndarray]  # stored [k F]

    @classmethod
    def nothing(cls) -> Packed:
        return cls(np.zeros((4, 0), np.int32), {})

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


def pack(records: Seq[Record], addresses: Seq[int], modalities: Modalities, num_tokens: int = 0) -> Packed:
    """One example, each of its images at its own address. `num_tokens`: of each image at most so many, coarse to fine
    (0: all)."""
    columns, features = [], {}
    for record, address in zip(records, addresses, strict=True):
        for name, stored in record.items():
            m = modalities.named(name.partition("#")[0])
            if isinstance(m, Sequence):
                ids, place, shot = stored, np.arange(len(stored)), _addressed(stored, m, addresses, addresses[0])
            else:
                place = np.arange(len(stored))
                if 0 < num_tokens < len(stored):
                    order = coarse_to_fine(m.shape)
                    place = order[order < len(stored)][:num_tokens]
                if isinstance(m, Grid):
                    place = place[stored[place] >= 0]  # -1: of a grid that is given in part
                ids, shot = stored[place], np.full(len(place), address)
            if isinstance(m, Features):
                known = features.setdefault(name, [])
                ids, _ = np.arange(len(place)) + sum(map(len, known)), known.append(ids)
            columns.append(np.stack([ids, np.full(len(ids), modalities.index(m.name)), place, shot]))
    nothing = Packed.nothing().columns
    return Packed(
        np.concatenate([nothing, *columns], axis=1).astype(np.int32),
        {n: np.concatenate(v) for n, v in features.items()},
    )


def _addressed(ids: np.ndarray, m: Sequence, addresses: Seq[int], own: int) -> np.ndarray:
    """A text's tokens have its example's address, its declarations of images those of the images."""
    number = ids.astype(int) - m.first_declaration
    shot = np.full(len(ids), own)
    for i, address in enumerate(addresses, 1):
        shot[(number == i) & (i < m.num_declarations)] = address
    return shot


def stack(
    rows: Seq[Packed], modalities: Modalities, length: int, num_vectors: int
) -> tuple[Tokens, dict[str, np.ndarray]]:
    """Rows padded with slots that are not valid to Tokens [B length], and the stored features [B num_vectors F] of the
    continuous modalities that any row has."""
    counts = np.array([row.columns.shape[1] for row in rows])
    columns = [np.stack([pad([row.columns[i]], length) for row in rows]) for i in range(4)]
    features = {}
    for m in modalities:
        if isinstance(m, Features) and any(m.name in row.features for row in rows):
            features[m.name] = np.zeros((len(rows), num_vectors, m.size), m.dtype)
            for out, row in zip(features[m.name], rows, strict=True):
                if m.name in row.features:
                    out[: len(row.features[m.name])] = row.features[m.name]
    return Tokens(*columns, np.arange(length) < counts[:, None]), features
