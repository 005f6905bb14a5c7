"""One split of one data set to token shards and their manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from m4.components import closest, load_tokenizer, tokenizer_hash
from m4.data import VERSION, Dataset
from m4.files import replacing, write_atomically
from m4.modality import Features, Tokenizer
from m4.records import encode, is_tokenized, named_error

EXAMPLES_PER_CALL = 256  # what a tokenizer gets at once
NUM_NAMED = 100  # skipped examples that the manifest names


def raw_examples(dataset: Dataset, split: str, data_dir: Path, seed: int) -> Seq[dict[str, Any]]:
    """What is tokenized of a data set: its source's examples, or aligned crops of them, or chosen signals of these."""
    examples = dataset.source.split(split, data_dir)
    examples = dataset.crops.of(examples, seed=seed) if dataset.crops else examples
    return Chosen(examples, dataset.signals) if dataset.signals else examples


@dataclasses.dataclass(frozen=True)
class Chosen(Seq):
    """Examples with some of their signals alone. ValueError for one that has none of them."""

    examples: Seq[dict[str, Any]]
    signals: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        if not {*self.signals} & {*example}:
            raise ValueError(f"none of signals={self.signals}; {closest(self.signals[0], [*example])}")
        return {name: x for name, x in example.items() if name in (*self.signals, "id", "file")}


@dataclasses.dataclass
class Job:
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
    def examples(self) -> Seq[dict[str, Any]]:
        return raw_examples(self.dataset, self.split, self.data_dir, self.seed)

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

    def _facts_file(self, shard: int) -> Path:
        return self.folder / f".{self.names[shard]}.safetensors"

    def written(self, shard: int) -> bool:
        return (self.folder / self.names[shard]).exists() and self._facts_file(shard).exists()

    def write(self, shard: int, bar: tqdm) -> None:
        """One shard; beside it, hidden, which ids it holds and what was skipped, for the manifest."""
        facts = Facts(self.tokenizers)
        with replacing(self.folder / self.names[shard]) as temporary:
            with contextlib.closing(ArrayRecordWriter(str(temporary), "group_size:1")) as writer:
                for batch in self._read(self.indices(shard)):
                    for record in self._encode(batch, facts):
                        writer.write(safetensors.numpy.save(record))
                        facts.add(record)
                    bar.update(len(batch))
            write_atomically(self._facts_file(shard), facts.saved())

    def _read(self, indices: range) -> Iterator[list[tuple[int, Any]]]:
        """Batches of (index, example or the error that it gave); the next is read while one is encoded."""

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

    def _encode(self, batch: list[tuple[int, Any]], facts: Facts) -> Iterator[dict[str, np.ndarray]]:
        """Records of the good examples; the first bad one is an error, or is skipped if the data set says so."""
        good = [(i, e) for i, e in batch if not isinstance(e, Exception)]
        errors = [(i, e) for i, e in batch if isinstance(e, Exception)]
        try:
            records = encode([e for _, e in good], self.tokenizers)
        except Exception:  # find the bad ones
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
            facts.skipped.append(str(error))
            if len(facts.skipped) > self.dataset.skip_bad * self.num_examples:
                raise ValueError(f"{error}{self._limit(len(facts.skipped))}") from error
        for _, example in good:
            facts.add_given(example)
        yield from records

    def _limit(self, count: int) -> str:
        if not self.dataset.skip_bad:
            return " (skip_bad=0.01 in its Dataset skips up to 1% of such examples)"
        return f" ({count} bad examples of {self.num_examples}, more than skip_bad={self.dataset.skip_bad} allows)"

    def finish(self, manifest_file: Path) -> None:
        """Writes the manifest from what is known of the shards, which all are there."""
        total, shards = Facts(self.tokenizers), {}
        for i, name in enumerate(self.names):
            facts = Facts.of(self._facts_file(i), self.tokenizers)
            total += facts
            shards[name] = {"num_examples": facts.num_examples, "bytes": (self.folder / name).stat().st_size}
        if len(total.skipped) > self.dataset.skip_bad * self.num_examples:
            raise ValueError(f"{total.skipped[0]}{self._limit(len(total.skipped))}")
        label = f"{self.dataset.label} {self.split}"
        if total.skipped:
            count = f"{len(total.skipped)} bad examples of {self.num_examples}"
            print(f"{label}: {count} were skipped, the first: {total.skipped[0]}", flush=True)
        for name, count in total.given.items():
            if count:
                print(f"{label}: {count} examples have ids of {name}, which were taken as they are", flush=True)
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
        write_atomically(manifest_file, json.dumps(manifest, indent=1).encode())
        for pattern in (f".{self.split}-*.tmp", f"..{self.split}-*.tmp"):  # of killed processes
            for left_over in self.folder.glob(pattern):
                left_over.unlink(missing_ok=True)


class Facts:
    """What is known of written records, to be added up over shards."""

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

    def __iadd__(self, other: Facts) -> Facts:
        self.num_examples += other.num_examples
        self.skipped += other.skipped
        for ours, theirs in zip(self._counters(), other._counters(), strict=True):
            ours.update(theirs)
        for name, used in other.used.items():
            self.used[name] |= used
        return self

    def _counters(self) -> tuple[Counter, ...]:
        return self.num_examples_with, self.num_tokens, self.given, self.sets

    def saved(self) -> bytes:
        facts = json.dumps([self.num_examples, self.skipped, *self._counters()])
        return safetensors.numpy.save({n: np.packbits(used) for n, used in self.used.items()}, {"facts": facts})

    @classmethod
    def of(cls, file: Path, tokenizers: Mapping[str, Tokenizer]) -> Facts:
        self = cls(tokenizers)
        with safetensors.safe_open(file, framework="numpy") as stored:
            self.num_examples, self.skipped, *counters = json.loads(stored.metadata()["facts"])
            for name, used in self.used.items():
                used[:] = np.unpackbits(stored.get_tensor(name), count=len(used))
        for ours, theirs in zip(self._counters(), counters, strict=True):
            ours.update(theirs)
        return self
