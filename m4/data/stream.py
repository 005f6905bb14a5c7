"""Token shards -> one endless, exactly resumable stream of masked batches.

    shards of data set 0  --shuffle, repeat--.
    shards of data set 1  --shuffle, repeat--+--mix--> example 0, 1, 2, ... --this process's share--> mask --> device

The stream is a fixed list of examples, indexed from 0, in which every data set is reshuffled as a whole each epoch and
the data sets keep their shares (evenly spread, and within 1% of the weights). A position in it is one integer. Batch t
of N examples holds examples t N to t N + N - 1, of which process p of P takes every P-th: with any number of processes,
workers or another batch size a run continues at the same example. An example's mask depends on the seed and its index
alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from m4.command_line import logs_to_output
from m4.data.dataset import Dataset, Examples
from m4.data.token_shards import TokenShards
from m4.distributed.workers import start_worker
from m4.files import fingerprint
from m4.masking.dirichlet import Masking
from m4.tokens.batch import MaskedBatch, interleave
from m4.tokens.modality import Modalities
from m4.tokens.records import check_stored

PREFETCH = 2  # batches that wait for the training step, on the device if the stream places them there


@dataclasses.dataclass(frozen=True)
class Checked:
    """Records whose arrays fit a model's modalities; ValueError names the record of one that does not."""

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
    """Records grouped into episodes of `size` consecutive ones."""

    records: Seq[dict[str, np.ndarray]]
    size: int

    def __len__(self) -> int:
        return len(self.records) // self.size

    def __getitem__(self, index: int) -> list[dict[str, np.ndarray]]:
        return [self.records[i] for i in range(index * self.size, (index + 1) * self.size)]


def by_example(shards: Seq[TokenShards | Checked], datasets: Seq[Dataset], masking: Masking) -> list[Examples]:
    """The units that are masked as one example: records, or episodes."""
    units: list[Examples] = []
    for part, dataset in zip(shards, datasets, strict=True):
        records: Any = part
        size = dataset.masked_by(masking).num_records
        units.append(Episodes(records, size) if size else records)
    return units


@dataclasses.dataclass(frozen=True)
class TaggedExamples:
    """Records with the index of the data set that each is from."""

    records: Examples
    dataset: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
        return self.dataset, self.records[index]


def examples(shards: Seq[Examples], weights: Seq[float], *, seed: int) -> Any:
    """The whole stream before it is masked: (index in the stream, (data set, stored arrays)), endless; a
    grain.MapDataset, whose types let every element be missing."""
    import grain  # here, for --help to come fast

    # Shuffle before repeat: every epoch holds each record once, in a new order. Each data set has its own seed. Mixing
    # comes last, and is deterministic, so that element i of the stream can be read without those before it.
    parts = [
        grain.MapDataset.source(TaggedExamples(part, k)).seed(seed * len(shards) + k).shuffle().repeat()
        for k, part in enumerate(shards)
    ]
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, np.asarray(weights) / np.sum(weights))
    return mixed.map_with_index(_pair)


def _pair(index, example):
    return index, example


@dataclasses.dataclass(frozen=True)
class ApplyMasking:
    """Examples of the stream -> MaskedBatch."""

    masking: Masking
    datasets: tuple[Dataset, ...]
    modalities: Modalities
    seed: int

    def __call__(self, batch: Seq[tuple[int, tuple[int, Any]]]) -> MaskedBatch:
        keys = np.array([(self.seed, index) for index, _ in batch], np.uint64)
        maskings = [self.datasets[i].masked_by(self.masking) for _, (i, _) in batch]
        examples, sizes = [example for _, (_, example) in batch], (self.masking.num_inputs, self.masking.num_targets)
        # Rows of one kind of masking are masked together; `interleave` restores their order.
        kinds: dict[Any, list[int]] = {}
        for i, masking in enumerate(maskings):
            kinds.setdefault(type(masking).mask_rows.__func__, []).append(i)
        parts = []
        for rows in kinds.values():
            own = [maskings[i] for i in rows]
            masked = type(own[0]).mask_rows(own, [examples[i] for i in rows], self.modalities, keys[rows], *sizes)
            parts.append((rows, masked))
        return interleave(parts, max(d.masked_by(self.masking).num_vectors(sizes[0]) for d in self.datasets))


def check_served(shards: TokenShards, dataset: Dataset, masking: Masking, modalities: Modalities) -> None:
    """ValueError if some examples have a set of modalities of which the data set's masking cannot make use."""
    for group in shards.manifest["sets"]:
        names = [name for name in modalities.names if name in group["modalities"]]
        if not dataset.masked_by(masking).serves(names):
            raise ValueError(
                f"no masking strategy of data set {dataset.label} fits its {group['num_examples']:,} examples that "
                f"have only {', '.join(names) or 'modalities that this run lacks'} ({shards.split}); add one, such as "
                "Strategy(inputs=..., targets=...) of those"
            )


class Stream:
    """This process's share of every batch of `batch_size` examples, endless. Call `close` when done.

    num_workers: processes that read and mask; 0: threads of this process. place: called on each batch ahead of its use,
    e.g. to transfer it to the device.
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
        read = by_example([Checked(part, modalities) for part in shards], datasets, masking)
        if sum(map(len, read)) < batch_size:
            raise ValueError(f"{sum(map(len, read))} examples are fewer than one batch of {batch_size}")
        if batch_size % process_count:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the number of processes, {process_count}")
        self.batch_size, self.share = batch_size, (process_index, process_count)
        self.num_workers, self.place = num_workers, place
        for part, dataset in zip(shards, datasets, strict=True):
            check_served(part, dataset, masking, modalities)
        self.identity = fingerprint([seed, *([p.contents, d.weight] for p, d in zip(shards, datasets, strict=True))])
        self.mask = ApplyMasking(masking, tuple(datasets), modalities, seed)
        self.examples = examples(read, [d.weight for d in datasets], seed=seed)
        self.next_example = 0
        self._batches: Any = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[Future] = deque()

    def _start(self) -> ThreadPoolExecutor:
        import grain

        index, count = self.share
        # Process p takes every P-th example, so that batches hold the same examples with any number of processes.
        mine = self.examples[self.next_example + index :: count]
        batches = mine.batch(self.batch_size // count, drop_remainder=True, batch_fn=list).map(self.mask)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
        batches = batches.to_iter_dataset(options)
        if self.num_workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads flags in its workers, and this program has none
            workers = grain.MultiprocessingOptions(num_workers=self.num_workers)
            batches = batches.mp_prefetch(workers, worker_init_fn=functools.partial(start_worker, logs_to_output()))
        self._batches = iter(batches)
        self._thread = thread = ThreadPoolExecutor(1)
        self._pending = deque(thread.submit(self._make) for _ in range(PREFETCH))
        return thread

    def _make(self) -> Any:
        return self.place(next(self._batches))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        thread = self._thread or self._start()
        first: Future = self._pending.popleft()
        try:
            batch = first.result()
        except BaseException:
            self.close()  # what was read ahead is lost; the next call begins at this batch again
            raise
        self._pending.append(thread.submit(self._make))
        self.next_example += self.batch_size
        return batch

    def mean_targets(self, count: int = 128) -> dict[str, float]:
        """Target tokens of each modality in an example, on average over the first `count` of the stream."""
        targets = self.mask([self.examples[i] for i in range(count)]).targets
        names = self.mask.modalities.names
        return dict(zip(names, np.bincount(targets.modality[targets.valid], minlength=len(names)) / count, strict=True))

    def get_state(self) -> dict[str, Any]:
        return {"next_example": self.next_example, "identity": self.identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a saved position. ValueError if it is one in another stream."""
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
