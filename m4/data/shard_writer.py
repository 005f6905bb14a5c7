"""Writes one split of one data set as token shards and their manifest."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from m4.data.dataset import Dataset
from m4.data.sources.files import read_for
from m4.data.token_shards import VERSION, num_records
from m4.errors import closest
from m4.files import digest, read_json, replacing, shown, write_json
from m4.tokens.modality import Features
from m4.tokens.records import encode, is_tokenized, named_error
from m4.tokens.tokenizer import Examples, Tokenizer, load_tokenizer, tokenizer_hash

logger = logging.getLogger(__name__)

EXAMPLES_PER_CALL = 256  # that a tokenizer encodes at once
NUM_NAMED = 100  # skipped examples that the manifest names, at most


def raw_examples(dataset: Dataset, split: str, data_dir: Path, seed: int, tokenizers: Iterable[Any] = ()) -> Examples:
    """The examples of a data set that are tokenized: its source's, or aligned crops of them, or some of their signals.
    Files are read as `tokenizers` (or recipes) take them."""
    examples = read_for(dataset.source.split(split, data_dir), tokenizers)
    examples = dataset.crops.of(examples, seed=seed) if dataset.crops else examples
    return SelectSignals(examples, dataset.signals) if dataset.signals else examples


@dataclasses.dataclass(frozen=True)
class SelectSignals(Seq):
    """Examples with some of their signals alone. ValueError for one that has none of them."""

    examples: Examples
    signals: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:  # ty: ignore[incompatible-method-override]  never a slice
        example = self.examples[index]
        if not {*self.signals} & {*example}:
            raise ValueError(f"none of signals={self.signals}; {closest(self.signals[0], [*example])}")
        return {name: x for name, x in example.items() if name in (*self.signals, "id", "file")}


def limit(skip_bad: float, count: int, num_examples: int) -> str:
    """The tail of an error about a bad example that may not be skipped, after `count` of `num_examples` were bad."""
    if not skip_bad:
        return " (skip_bad=0.01 in its Dataset skips up to 1% of such examples)"
    return f" ({count} bad examples of {num_examples}, more than skip_bad={skip_bad} allows)"


@dataclasses.dataclass
class ShardWriter:
    """The shards of one split of one data set."""

    dataset: Dataset
    tokenizer_files: dict[str, Path]
    folder: Path
    split: str
    data_dir: Path
    seed: int
    examples_per_shard: int

    def __getstate__(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # workers open their own

    @functools.cached_property
    def examples(self) -> Examples:
        return raw_examples(self.dataset, self.split, self.data_dir, self.seed, self.tokenizers.values())

    @functools.cached_property
    def tokenizers(self) -> dict[str, Tokenizer]:
        return {name: load_tokenizer(path) for name, path in self.tokenizer_files.items()}

    @functools.cached_property
    def num_examples(self) -> int:
        return len(self.examples)

    @functools.cached_property
    def names(self) -> list[str]:
        count = -(-self.num_examples // self.examples_per_shard)
        return [f"{self.split}-{i:05d}-of-{count:05d}.array_record" for i in range(count)]

    def indices(self, shard: int) -> range:
        return range(shard * self.examples_per_shard, min((shard + 1) * self.examples_per_shard, self.num_examples))

    def _statistics_file(self, shard: int) -> Path:
        return self.folder / f".{self.names[shard]}.json"

    def written(self, shard: int, *, whole: bool = False) -> bool:
        """Whether a shard exists with the size that was written; `whole`: with the content that was written."""
        path = self.folder / self.names[shard]
        if not path.is_file() or not self._statistics_file(shard).exists():
            return False
        try:
            saved = read_json(self._statistics_file(shard))
        except ValueError:
            return False  # damaged: the shard is written again
        return path.stat().st_size == saved["bytes"] and (not whole or digest(path) == saved["content"])

    def write(self, shard: int, bar: tqdm) -> None:
        """One shard; beside it, hidden, which ids it holds, what was skipped and its SHA-256, for the manifest."""
        statistics, path = ShardStatistics(self.tokenizers), self.folder / self.names[shard]
        with replacing(path) as temporary:
            with contextlib.closing(ArrayRecordWriter(str(temporary), "group_size:1")) as writer:
                # Examples are written in the order of their indices, so that record i is the same in every run.
                for batch in self._read(self.indices(shard)):
                    for record in self._encode(batch, statistics):
                        writer.write(safetensors.numpy.save(record))
                        statistics.add(record)
                    bar.update(len(batch))
            if num_records(temporary) != statistics.num_examples:  # a full disk need not be an error of the writer
                raise ValueError(f"{shown(path)} was not written whole; is the disk full?")
            # The statistics first, then the shard under its final name: one without them counts as not written.
            write_json(
                self._statistics_file(shard),
                {**statistics.saved(), "bytes": temporary.stat().st_size, "content": digest(temporary)},
            )

    def _read(self, indices: range) -> Iterator[list[tuple[int, Any]]]:
        """Batches of (index, example or the error of reading it); the next batch is read while one is encoded."""

        def read(index: int):
            try:
                return index, self.examples[index]
            except Exception as error:
                return index, error

        with ThreadPoolExecutor(4) as pool:
            starts = range(indices.start, indices.stop, EXAMPLES_PER_CALL)
            ahead = None
            for start in starts:
                now = ahead or [pool.submit(read, i) for i in indices[start - indices.start :][:EXAMPLES_PER_CALL]]
                following = indices[start - indices.start + EXAMPLES_PER_CALL :][:EXAMPLES_PER_CALL]
                ahead = [pool.submit(read, i) for i in following]
                yield [future.result() for future in now]

    def _encode(self, batch: list[tuple[int, Any]], statistics: ShardStatistics) -> Iterator[dict[str, np.ndarray]]:
        """Records of the good examples; the first bad one is an error, or is skipped if `skip_bad` allows."""
        good = [(i, e) for i, e in batch if not isinstance(e, Exception)]
        errors = [(i, e) for i, e in batch if isinstance(e, Exception)]
        try:
            records = encode([e for _, e in good], self.tokenizers)
        except Exception:  # encodes one example at a time, to find the bad ones
            records, whole = [], []
            for i, example in good:
                try:
                    records += encode([example], self.tokenizers)
                    whole.append((i, example))
                except Exception as error:
                    errors.append((i, error))
            good = whole
        for index, error in sorted(errors, key=lambda pair: pair[0]):
            error = named_error(error, f"example {index} of {self.dataset.label} {self.split}")
            statistics.skipped.append(str(error))
            if len(statistics.skipped) > self.dataset.skip_bad * self.num_examples:
                raise ValueError(
                    f"{error}{limit(self.dataset.skip_bad, len(statistics.skipped), self.num_examples)}"
                ) from error
        for _, example in good:
            statistics.add_given(example)
        yield from records

    def finish(self, manifest_file: Path) -> None:
        """Writes the manifest from the statistics of the shards, which all exist."""
        total, shards = ShardStatistics(self.tokenizers), {}
        for i, name in enumerate(self.names):
            if not self.written(i):
                self._statistics_file(i).unlink(missing_ok=True)
                raise ValueError(f"token shard {shown(self.folder / name)} was damaged meanwhile; start again")
            stored = read_json(self._statistics_file(i))
            statistics = ShardStatistics.of(stored, self.tokenizers)
            total += statistics
            if statistics.num_examples:  # else all of its examples were skipped
                shards[name] = {
                    "num_examples": statistics.num_examples,
                    "bytes": stored["bytes"],
                    "sha256": stored["content"],
                }
        if len(total.skipped) > self.dataset.skip_bad * self.num_examples:
            raise ValueError(f"{total.skipped[0]}{limit(self.dataset.skip_bad, len(total.skipped), self.num_examples)}")
        label = f"{self.dataset.label} {self.split}"
        if total.skipped:
            count = f"{len(total.skipped)} bad examples of {self.num_examples}"
            logger.info(shown(f"{label}: {count} were skipped, the first: {total.skipped[0]}"))
        for name, count in total.given.items():
            if count:
                logger.info(shown(f"{label}: {count} examples have ids of {name}, which were taken as they are"))
        manifest = {
            "version": VERSION,
            "num_examples": total.num_examples,
            "shards": shards,
            "tokenizers": {name: tokenizer_hash(tokenizer) for name, tokenizer in self.tokenizers.items()},
            "modalities": {
                name: {
                    "num_examples": total.num_examples_with[name],
                    "num_tokens": total.num_tokens[name],
                    "given_as_ids": total.given[name],
                    "codes_used": int(used.sum()),
                    "vocab_size": self.tokenizers[name].modality.vocab_size,
                }
                for name, used in total.used.items()
            },
            "sets": [{"modalities": names.split("\n"), "num_examples": n} for names, n in sorted(total.sets.items())],
            "skipped": {"num_examples": len(total.skipped), "first": total.skipped[:NUM_NAMED]},
        }
        write_json(manifest_file, manifest)


class ShardStatistics:
    """Counts over written records, which add up over shards."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer]):
        self.tokenizers = tokenizers
        self.num_examples, self.skipped = 0, []
        self.num_examples_with, self.num_tokens, self.given, self.sets = (Counter() for _ in range(4))
        self.used = {name: np.zeros(t.modality.vocab_size, bool) for name, t in tokenizers.items()}

    def add(self, record: Mapping[str, np.ndarray]) -> None:
        names = [name for name in self.tokenizers if name in record]
        self.num_examples += 1
        self.sets["\n".join(names)] += 1
        for name in names:
            self.num_examples_with[name] += 1
            self.num_tokens[name] += len(record[name])
            if not isinstance(self.tokenizers[name].modality, Features):
                self.used[name][record[name]] = True

    def add_given(self, example: Mapping[str, Any]) -> None:
        self.given.update(name for name, t in self.tokenizers.items() if is_tokenized(example, t.modality))

    def __iadd__(self, other: ShardStatistics) -> ShardStatistics:
        self.num_examples += other.num_examples
        self.skipped += other.skipped
        for counter, more in zip(self._counters(), other._counters(), strict=True):
            counter.update(more)
        for name, used in other.used.items():
            self.used[name] |= used
        return self

    def _counters(self) -> tuple[Counter, ...]:
        return self.num_examples_with, self.num_tokens, self.given, self.sets

    def saved(self) -> dict[str, Any]:
        """The counts as JSON values; `of` reads them."""
        used = {name: base64.b64encode(np.packbits(used).tobytes()).decode() for name, used in self.used.items()}
        counters = [dict(counter) for counter in self._counters()]
        return {"num_examples": self.num_examples, "skipped": self.skipped, "counters": counters, "used": used}

    @classmethod
    def of(cls, saved: Mapping[str, Any], tokenizers: Mapping[str, Tokenizer]) -> ShardStatistics:
        self = cls(tokenizers)
        self.num_examples, self.skipped = saved["num_examples"], saved["skipped"]
        for name, used in self.used.items():
            used[:] = np.unpackbits(np.frombuffer(base64.b64decode(saved["used"][name]), np.uint8), count=len(used))
        for counter, counts in zip(self._counters(), saved["counters"], strict=True):
            counter.update(counts)
        return self
