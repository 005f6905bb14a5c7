"""All that comes before training, each stage skipped when it is there: raw data, tokenizers, token shards.

    source --crops, tokenizers--> TOKENS/{split}-00000-of-00010.array_record + {split}.json + tokenizers/*.safetensors

A record holds one example: the stored array of every modality that it has, as safetensors. The unit of work is one
shard, written under a temporary name and renamed, so that a killed job goes on where it was. Any number of processes
may write shards of one split, each its own; the last to finish writes the manifest, without which nobody reads them.
Each stage is kept under a hash of what it depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from m4 import workers
from m4.components import (
    fingerprint,
    load_tokenizer,
    replacing,
    save_tokenizer,
    to_json,
    tokenizer_hash,
    write_atomically,
)
from m4.data import VERSION, Dataset, TokenShards
from m4.modality import Features, Grid, Modalities, Modality, Recipe, Sequence, Tokenizer

EXAMPLES_PER_SHARD = 2048
NUM_PROBES = 256  # places where a data set is searched for a signal
EXAMPLES_PER_CALL = 256  # what a tokenizer gets at once
NUM_NAMED = 100  # skipped examples that the manifest names


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What training needs of the preparation: tokenizers by modality name, and a folder of shards for each data set."""

    tokenizers: dict[str, Tokenizer]
    tokenizer_files: dict[str, Path]
    tokens: tuple[Path, ...]

    def shards(self, split: str) -> list[TokenShards]:
        return [TokenShards(folder, split) for folder in self.tokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Team:
    """Who shares the work: this process is number `index` of `count` (hosts that see the same files).

    `workers` processes are started here.
    """

    index: int = 0
    count: int = 1
    workers: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count or self.workers < 1:
            raise ValueError(f"process {self.index} of {self.count} with {self.workers} workers: that is no team")


def prepare(
    datasets: Seq[Dataset],
    recipes: Seq[Recipe],
    data_dir: str | os.PathLike,
    *,
    seed: int,
    splits: Seq[str] = ("train",),
    team: Team = Team(),
) -> Prepared:
    """Raw data, tokenizers and token shards of a run. ValueError names shards whose tokenizers are not the run's."""
    data_dir = Path(data_dir)
    Modalities([r.modality for r in recipes])  # names the doubles before any work
    signatures = {}
    for dataset in datasets:  # says what is wrong before any work
        for split in splits if dataset.tokens else ():
            TokenShards(Path(dataset.tokens), split)
        has_signature = hasattr(dataset.source, "signature")
        signatures[dataset.label] = dataset.source.signature(data_dir) if has_signature else ""
    with _Others(data_dir, team) as others:
        for dataset in datasets:
            if dataset.source is not None:
                dataset.source.prepare(data_dir)
                for split in splits:
                    if not len(dataset.source.split(split, data_dir)):
                        raise ValueError(f"split {split!r} of data set {dataset.label} has no examples")
        files = {r.modality.name: _tokenizer_file(r, datasets, signatures, data_dir, seed, others) for r in recipes}
        tokenizers = {name: load_tokenizer(path) for name, path in files.items()}
        for recipe in recipes:
            name = recipe.modality.name
            if tokenizers[name].modality != recipe.modality:
                raise ValueError(f"{files[name]} holds {tokenizers[name].modality}, the config says {recipe.modality}")
        hashes = {name: tokenizer_hash(tokenizer) for name, tokenizer in tokenizers.items()}
        folders = []
        for dataset in datasets:
            if dataset.tokens:
                folder = Path(dataset.tokens)
            else:
                source = [to_json(dataset.source), signatures[dataset.label], dataset.skip_bad]
                crops = [to_json(dataset.crops), seed * bool(dataset.crops)]
                key = fingerprint([VERSION, hashes, source, crops])
                folder = data_dir / "tokens" / f"{dataset.label}-{key}"
                for split in splits:
                    pretokenize(dataset, files, folder, split, data_dir=data_dir, seed=seed, others=others)
            for split in splits:
                _check_tokenizers(folder, split, hashes)
            folders.append(folder)
    return Prepared(tokenizers, files, tuple(folders))


class _Others:
    """The team's other processes: waits for what they write, and raises if one of them failed meanwhile."""

    def __init__(self, data_dir: Path, team: Team):
        self.data_dir, self.team = data_dir, team

    def _note(self, index: int) -> Path:
        return self.data_dir / f".process-{index}-of-{self.team.count}"

    def __enter__(self) -> _Others:
        if self.team.count > 1:
            write_atomically(self._note(self.team.index), b"")
            self.began = self._note(self.team.index).stat().st_mtime
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.team.count > 1:
            if error is None:
                self._note(self.team.index).unlink(missing_ok=True)
            else:
                write_atomically(self._note(self.team.index), f"{kind.__name__}: {error}".encode())

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Until `done()`; says each minute what it waits for. ValueError if another process failed since the start."""
        start, said = time.monotonic(), 0
        while not done():
            for index in {*range(self.team.count)} - {self.team.index}:
                with contextlib.suppress(FileNotFoundError):
                    note = self._note(index)
                    if note.stat().st_mtime >= self.began and (message := note.read_text()):
                        raise ValueError(f"process {index} of {self.team.count} failed with {message}")
            if time.monotonic() - start >= 60 * said:
                print(f"process {self.team.index} of {self.team.count} waits for {what}", flush=True)
                said += 1
            time.sleep(0.5)


def _check_tokenizers(folder: Path, split: str, hashes: Mapping[str, str]) -> None:
    for name, theirs in TokenShards(folder, split).manifest["tokenizers"].items():
        if name in hashes and hashes[name] != theirs:
            raise ValueError(
                f"the token shards in {folder} were made with another tokenizer of {name} ({theirs}) than this run's "
                f"({hashes[name]}); tokenize the data again, or leave out the data set"
            )


def _tokenizer_file(
    recipe: Recipe, datasets: Seq[Dataset], signatures: Mapping[str, str], data_dir: Path, seed: int, others: _Others
) -> Path:
    """The tokenizer that finished shards were made with; else the recipe's, fitted by process 0 unless it is there."""
    name = recipe.modality.name
    for dataset in datasets:
        if dataset.tokens and (file := Path(dataset.tokens) / "tokenizers" / f"{name}.safetensors").exists():
            return file
    sources = [
        [to_json(d.source), signatures[d.label], to_json(d.crops), d.weight] for d in datasets if d.source is not None
    ]
    file = data_dir / "tokenizers" / f"{name}-{fingerprint([to_json(recipe), sources, seed])}.safetensors"
    if not file.exists() and others.team.index == 0:
        print(f"fitting tokenizer {name}", flush=True)
        save_tokenizer(recipe.fit(_fitting_examples(recipe, datasets, data_dir, seed), seed=seed), file)
    others.wait(file.exists, f"process 0 to fit tokenizer {name} ({file})")
    return file


class Having(Seq):
    """The examples that have what a recipe reads. One without it, or (if asked) a bad one, is replaced by the next."""

    def __init__(self, examples: Seq[dict[str, Any]], recipe: Recipe, *, skip_bad: bool):
        self.examples, self.recipe, self.skip_bad = examples, recipe, skip_bad

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for i in range(index, index + len(self)):
            if (example := self._usable(i % len(self))) is not None:
                return example
        raise ValueError(f"no example has what the tokenizer of {self.recipe.modality.name} reads")

    def _usable(self, index: int) -> dict[str, Any] | None:
        try:
            example = self.examples[index]
            modality = self.recipe.modality
            if hasattr(self.recipe, "signal_of"):  # which may be computed from other signals
                return example if self.recipe.signal_of(example) is not None else None
            return example if modality.signal in example and not _is_tokenized(example, modality) else None
        except Exception as error:
            if self.skip_bad:
                return None
            raise _named(error, f"example {index}") from error

    def reads_some(self) -> bool:
        """Whether any of some examples, spread over all, has it."""
        places = np.unique(np.linspace(0, len(self) - 1, NUM_PROBES).astype(int))
        return any(self._usable(i) is not None for i in places.tolist())


def raw_examples(dataset: Dataset, split: str, data_dir: Path, seed: int) -> Seq[dict[str, Any]]:
    """What is tokenized of a data set: its source's examples, or aligned crops of them."""
    examples = dataset.source.split(split, data_dir)
    return dataset.crops.of(examples, seed=seed) if dataset.crops else examples


def _fitting_examples(recipe: Recipe, datasets: Seq[Dataset], data_dir: Path, seed: int) -> Seq[dict[str, Any]]:
    """Training examples that have the recipe's signal, of the data sets by their weights."""
    parts, weights = [], []
    for dataset in datasets:
        if dataset.source is not None:
            part = Having(raw_examples(dataset, "train", data_dir, seed), recipe, skip_bad=dataset.skip_bad > 0)
            if len(part) and part.reads_some():
                parts.append(part)
                weights.append(dataset.weight)
    if not parts:
        raise ValueError(
            f"no data set has the signal {recipe.modality.signal!r} of modality {recipe.modality.name!r} (ids without "
            "their tokenizer need m4_tokenizers.stored.IdsRecipe, with it TokenizerFile)"
        )
    if len(parts) == 1:
        return parts[0]
    endless = [grain.MapDataset.source(part).repeat() for part in parts]
    return grain.MapDataset.mix(endless, np.array(weights) / sum(weights))[: sum(map(len, parts))]


def pretokenize(
    dataset: Dataset,
    tokenizer_files: Mapping[str, Path],
    folder: Path,
    split: str,
    *,
    data_dir: Path,
    seed: int = 0,
    others: _Others | None = None,
) -> None:
    """Writes this process's token shards of one split, then waits until all are there and the manifest is written."""
    others = others or _Others(data_dir, Team())
    team = others.team
    manifest_file = folder / f"{split}.json"
    if manifest_file.exists():
        return
    job = _Job(dataset, dict(tokenizer_files), folder, split, data_dir, seed, EXAMPLES_PER_SHARD)
    (folder / "tokenizers").mkdir(parents=True, exist_ok=True)
    for name, file in tokenizer_files.items():
        copy = folder / "tokenizers" / f"{name}.safetensors"
        if not copy.exists():
            write_atomically(copy, file.read_bytes())
    mine = range(team.index, len(job.names), team.count)
    missing = [i for i in mine if not job.written(i)]
    num_left = sum(len(job.indices(i)) for i in mine)
    title = f"tokens: {dataset.label} {split}"
    with tqdm(total=num_left, desc=title, unit="example", file=sys.stdout, mininterval=1) as bar:
        bar.update(num_left - sum(len(job.indices(i)) for i in missing))
        if team.workers > 1 and len(missing) > 1:
            with workers.pool(min(team.workers, len(missing))) as pool:
                for i, _ in zip(missing, pool.map(functools.partial(_write, job), missing), strict=True):
                    bar.update(len(job.indices(i)))
        else:
            for i in missing:
                job.write(i, bar)
    others.wait(
        lambda: manifest_file.exists() or all(job.written(i) for i in range(len(job.names))),
        f"the other processes to write their shards of {folder}",
    )
    if not manifest_file.exists():
        job.finish(manifest_file)


def _write(job: _Job, index: int) -> None:
    with tqdm(disable=True) as bar:
        job.write(index, bar)


@dataclasses.dataclass
class _Job:
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
        facts = _Facts(self.tokenizers)
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

    def _encode(self, batch: list[tuple[int, Any]], facts: _Facts) -> Iterator[dict[str, np.ndarray]]:
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
            error = _named(error, f"example {index} of {self.dataset.label} {self.split}")
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
        total, shards = _Facts(self.tokenizers), {}
        for i, name in enumerate(self.names):
            facts = _Facts.of(self._facts_file(i), self.tokenizers)
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


class _Facts:
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
        self.given.update(name for name, t in self.tokenizers.items() if _is_tokenized(example, t.modality))

    def __iadd__(self, other: _Facts) -> _Facts:
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
    def of(cls, file: Path, tokenizers: Mapping[str, Tokenizer]) -> _Facts:
        self = cls(tokenizers)
        with safetensors.safe_open(file, framework="numpy") as stored:
            self.num_examples, self.skipped, *counters = json.loads(stored.metadata()["facts"])
            for name, used in self.used.items():
                used[:] = np.unpackbits(stored.get_tensor(name), count=len(used))
        for ours, theirs in zip(self._counters(), counters, strict=True):
            ours.update(theirs)
        return self


def encode(examples: Seq[dict[str, Any]], tokenizers: Mapping[str, Tokenizer]) -> list[dict[str, np.ndarray]]:
    """Raw examples -> stored arrays by modality. ValueErrors name the example's file.

    What an example has under a modality's own name, as a 1-D array of integers, is taken as its ids. A modality whose
    signal an example lacks is left out of its record, which must have one at least. The crop, if any, is stored too.
    """
    records: list[dict[str, np.ndarray]] = [{"crop": e["crop"]} if "crop" in e else {} for e in examples]
    for name, tokenizer in tokenizers.items():
        signals: list[tuple[int, Any]] = []
        for i, example in enumerate(examples):
            with _naming(example, name):
                if _is_tokenized(example, tokenizer.modality):
                    records[i][name] = _given(example[name], tokenizer.modality)
                elif (signal := tokenizer.signal_of(example)) is not None:
                    signals.append((i, signal))
        encoded = []
        with _naming(examples[signals[0][0]] if len(signals) == 1 else {}, name):
            encoded = tokenizer.encode([signal for _, signal in signals]) if signals else []
        for (i, _), stored in zip(signals, encoded, strict=True):
            with _naming(examples[i], name):
                records[i][name] = compact(stored, tokenizer.modality)
    for example, record in zip(examples, records, strict=True):
        with _naming(example, ""):
            if not record.keys() - {"crop"}:
                raise ValueError(f"has none of {', '.join(tokenizers)}, but: {', '.join(example) or 'nothing'}")
    return records


@contextlib.contextmanager
def _naming(example: Mapping[str, Any], modality: str):
    try:
        yield
    except Exception as error:
        file = next((str(example[key]) for key in ("id", "file") if key in example), "")
        raise _named(error, file, modality) from error


def _named(error: Exception, *names: str) -> ValueError:
    """The error with what it is about, as far as it does not say so itself."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return ValueError(": ".join([*(name for name in names if name and name not in text), text]))


def _is_tokenized(example: Mapping[str, Any], modality: Modality) -> bool:
    if modality.name not in example or isinstance(modality, Features):
        return False
    value = example[modality.name]
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return True
    if modality.name != modality.signal:
        kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{modality.name} must be a 1-D array of integers (token ids), not {kind}")
    return False


def _given(ids: np.ndarray, modality: Modality) -> np.ndarray:
    """Ids that were made elsewhere, compact. ValueError if they cannot be this modality's."""
    if isinstance(modality, Sequence) and len(ids):
        last_sentinel = modality.first_sentinel + modality.num_sentinels - 1
        if ((ids >= modality.first_sentinel) & (ids <= last_sentinel)).any():
            raise ValueError(f"{modality.name}: ids {modality.first_sentinel}..{last_sentinel} are masking's sentinels")
        if ids[-1] != modality.end_id and len(ids) < modality.max_length:
            raise ValueError(f"{modality.name}: ids end in {ids[-1]}, not in [EOS] ({modality.end_id})")
    return compact(ids, modality)


def compact(stored: np.ndarray, modality: Modality) -> np.ndarray:
    """Ids in the smallest unsigned type that holds the vocabulary; features as `dtype`. ValueError if not ids."""
    if isinstance(modality, Features):
        return np.ascontiguousarray(stored, modality.dtype)
    if len(stored) and not 0 <= stored.min() <= stored.max() < modality.vocab_size:
        raise ValueError(f"{modality.name}: ids {stored.min()}..{stored.max()} outside [0, {modality.vocab_size})")
    if isinstance(modality, Grid) and len(stored) != modality.max_tokens:
        raise ValueError(f"{modality.name}: {len(stored)} ids, the grid has {modality.max_tokens}")
    if not isinstance(modality, Grid) and not 0 < len(stored) <= modality.max_length:
        raise ValueError(f"{modality.name}: {len(stored)} ids, the sequence holds 1 to {modality.max_length}")
    return np.ascontiguousarray(stored, np.min_scalar_type(modality.vocab_size - 1))
