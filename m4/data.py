"""Token shards -> one endless, exactly resumable stream of masked batches.

    shards of data set 0  --shuffle, repeat--.
    shards of data set 1  --shuffle, repeat--+--mix--> example 0, 1, 2, ... --this process's share--> mask --> device

The stream is a fixed list of examples, numbered from 0, in which every data set is reshuffled as a whole each epoch and
the data sets keep their shares (evenly spread, and within 1% of the weights). A position in it is one integer. Batch t
of N examples holds examples t N to t N + N - 1, of which process p of P takes every P-th: with any number of processes,
workers or another batch size a run goes on at the same example. An example's mask depends on the seed and its number
alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from m4.files import fingerprint, shown
from m4.masking import Masking, Strategy, check_strategies
from m4.modality import Modalities
from m4.records import check_stored
from m4.shots import ShotMasking
from m4.token_shards import VERSION, TokenShards
from m4.tokens import MaskedBatch, interleave
from m4.workers import leave_with_parent

__all__ = ["VERSION", "Dataset", "Mask", "Source", "Stream", "TokenShards", "by_example", "examples"]
PREFETCH = 2  # batches that wait for the training step, on the device if the stream places them there


class Source(Protocol):
    """Aligned raw examples: a frozen dataclass, so that its fields identify its data.

    A source over files that may be edited has `signature(data_dir) -> str` too, which changes when they do; it is asked
    first, and raises a ValueError for files that are not there.
    """

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Renders, downloads or checks what is needed; returns at once when it is there."""

    def split(self, name: str, data_dir: str | os.PathLike) -> Seq[dict[str, Any]]:
        """Raw examples of "train", "validation", "test" or another split that the source has.

        A ValueError that names the file is raised where a bad example is read, not before.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One part of what a run reads: raw examples (`source`), or a folder of token shards made before (`tokens`).

    weight: share of this data set in the stream, relative to the others'. strategies: its own mixture of masking
    strategies (default: those of the config's masking). crops: aligned random crops, m4.datasets.crops.Crops.
    skip_bad: the greatest share of examples that pre-tokenization may skip because they cannot be read (0: none).
    shots: its examples are those of episodes, one after the other, and are masked so (then `strategies` are not used).
    signals: which signals of raw examples are tokenized (default: all that the model has). name: default the source's
    class, or the folder.
    """

    source: Any = None
    tokens: str = ""
    weight: float = 1.0
    strategies: tuple[Strategy, ...] = ()
    crops: Any = None
    skip_bad: float = 0.0
    shots: ShotMasking | None = None
    signals: tuple[str, ...] = ()
    name: str = ""

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
        if self.shots and (self.skip_bad or self.strategies):
            raise ValueError(f"data set {self.label}: episodes take neither skip_bad nor strategies")

    def check(self, masking: Masking, modalities: Modalities) -> None:
        if self.shots:
            self.shots.check(modalities)
        else:
            check_strategies(self.strategies or masking.strategies, modalities)

    @property
    def label(self) -> str:
        return shown(self.name or (Path(self.tokens).name if self.tokens else type(self.source).__name__.lower()))


@dataclasses.dataclass(frozen=True)
class Checked:
    """Records whose arrays can be those of a model's modalities; ValueError names the record of one that cannot."""

    records: TokenShards
    modalities: Modalities

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self.records[index]
        try:
            for modality in self.modalities:
                if modality.name in record:
                    check_stored(record[modality.name], modality)
        except ValueError as error:
            raise ValueError(f"{self.records.where(index)}: {error}; tokenize the data again") from error
        return record


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Records by episode: `size` consecutive ones."""

    records: Seq[dict[str, np.ndarray]]
    size: int

    def __len__(self) -> int:
        return len(self.records) // self.size

    def __getitem__(self, index: int) -> list[dict[str, np.ndarray]]:
        return [self.records[i] for i in range(index * self.size, (index + 1) * self.size)]


def by_example(shards: Seq[TokenShards | Checked], datasets: Seq[Dataset]) -> list[Seq[Any]]:
    """What is masked at once: a record, or an episode."""
    return [Episodes(s, d.shots.num_records) if d.shots else s for s, d in zip(shards, datasets, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """Records that know which data set they are of."""

    records: Seq[dict[str, np.ndarray]]
    dataset: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
        return self.dataset, self.records[index]


def examples(shards: Seq[Seq[dict[str, np.ndarray]]], weights: Seq[float], *, seed: int) -> grain.MapDataset:
    """The whole stream before it is masked: (number in the stream, (data set, stored arrays)), endless."""
    parts = [
        grain.MapDataset.source(_Numbered(part, k)).seed(seed * len(shards) + k).shuffle().repeat()
        for k, part in enumerate(shards)
    ]
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, np.asarray(weights) / np.sum(weights))
    return mixed.map_with_index(_pair)


def _pair(index, example):
    return index, example


@dataclasses.dataclass(frozen=True)
class Mask:
    """Examples of the stream -> MaskedBatch."""

    masking: Masking
    datasets: tuple[Dataset, ...]
    modalities: Modalities
    seed: int

    def __call__(self, batch: Seq[tuple[int, tuple[int, Any]]]) -> MaskedBatch:
        keys = np.array([(self.seed, index) for index, _ in batch], np.uint64)
        of, examples = [self.datasets[dataset] for _, (dataset, _) in batch], [example for _, (_, example) in batch]
        masking, parts = self.masking, []
        for shots in dict.fromkeys(d.shots for d in of):
            rows = [i for i, d in enumerate(of) if d.shots == shots]
            part = [examples[i] for i in rows]
            if shots:
                made = shots.batch(part, self.modalities, keys[rows], masking.num_inputs, masking.num_targets)
            else:
                made = masking(
                    part, self.modalities, keys[rows], [of[i].strategies or masking.strategies for i in rows]
                )
            parts.append((rows, made))
        num_vectors = masking.num_inputs if any(d.shots for d in self.datasets) else 0
        return interleave(parts, num_vectors)


def check_served(shards: TokenShards, dataset: Dataset, masking: Masking, modalities: Modalities) -> None:
    """ValueError if some examples have a set of modalities of which no masking strategy can make use."""
    for group in shards.manifest["sets"] if not dataset.shots else ():
        names = [name for name in modalities.names if name in group["modalities"]]
        if not any(s.fits(names) for s in dataset.strategies or masking.strategies):
            raise ValueError(
                f"no masking strategy of data set {dataset.label} fits its {group['num_examples']:,} examples that "
                f"have only {', '.join(names) or 'modalities that this run lacks'} ({shards.split}); add one, such as "
                "Strategy(inputs=..., targets=...) of those"
            )


class Stream:
    """This process's share of every batch of `batch_size` examples, endless. Call `close` when done.

    num_workers: processes that read and mask; 0: threads of this process. place: what becomes of a batch while others
    train, such as its transfer to the device.
    """

    def __init__(
        self,
        shards: Seq[TokenShards],
        datasets: Seq[Dataset],
        masking: Masking,
        modalities: Modalities,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        place: Callable[[MaskedBatch], Any] = lambda batch: batch,
    ):
        read = by_example([Checked(part, modalities) for part in shards], datasets)
        if sum(map(len, read)) < batch_size:
            raise ValueError(f"{sum(map(len, read))} examples are fewer than one batch of {batch_size}")
        if batch_size % process_count:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the number of processes, {process_count}")
        self.batch_size, self.share = batch_size, (process_index, process_count)
        self.num_workers, self.place = num_workers, place
        for part, dataset in zip(shards, datasets, strict=True):
            check_served(part, dataset, masking, modalities)
        self.identity = fingerprint([seed, *([p.contents, d.weight] for p, d in zip(shards, datasets, strict=True))])
        self.mask = Mask(masking, tuple(datasets), modalities, seed)
        self.examples = examples(read, [d.weight for d in datasets], seed=seed)
        self.next_example = 0
        self._batches, self._thread, self._pending = None, None, deque()

    def _start(self) -> None:
        index, count = self.share
        mine = self.examples[self.next_example + index :: count]
        batches = mine.batch(self.batch_size // count, drop_remainder=True, batch_fn=list).map(self.mask)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
        batches = batches.to_iter_dataset(options)
        if self.num_workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads flags in its workers, and this program has none
            workers = grain.MultiprocessingOptions(num_workers=self.num_workers)
            batches = batches.mp_prefetch(workers, worker_init_fn=leave_with_parent)
        self._batches = iter(batches)
        self._thread = ThreadPoolExecutor(1)
        self._pending = deque(self._thread.submit(self._make) for _ in range(PREFETCH))

    def _make(self) -> Any:
        return self.place(next(self._batches))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        if self._thread is None:
            self._start()
        first: Future = self._pending.popleft()
        try:
            batch = first.result()
        except BaseException:
            self.close()  # what was read ahead is lost; the next call begins at this batch again
            raise
        self._pending.append(self._thread.submit(self._make))
        self.next_example += self.batch_size
        return batch

    def mean_targets(self, count: int = 128) -> dict[str, float]:
        """Target tokens of each modality in an example, on average over the first of the stream."""
        targets = self.mask([self.examples[i] for i in range(count)]).targets
        names = self.mask.modalities.names
        return dict(zip(names, np.bincount(targets.modality[targets.valid], minlength=len(names)) / count, strict=True))

    def get_state(self) -> dict[str, Any]:
        return {"next_example": self.next_example, "identity": self.identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there. ValueError if it is a place in another stream."""
        if state["identity"] != self.identity:
            raise ValueError(
                "the saved position is one in another stream of examples: the data sets, their weights, tokenizers, "
                "numbers of examples or the seed differ from those that it was saved with"
            )
        self.close()
        self.next_example = state["next_example"]

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._batches.close()
            self._batches, self._thread, self._pending = None, None, deque()
