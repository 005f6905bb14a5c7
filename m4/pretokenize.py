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
from collections.abc import Iterator, Mapping
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
from m4.components import fingerprint, load_tokenizer, save_tokenizer, to_json, tokenizer_hash, write_atomically
from m4.data import Dataset, TokenShards
from m4.modality import Features, Grid, Modalities, Modality, Recipe, Tokenizer

EXAMPLES_PER_SHARD = 2048
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
        if hasattr(dataset.source, "signature"):
            signatures[dataset.label] = dataset.source.signature(data_dir)
    for dataset in datasets:
        if dataset.source is not None:
            dataset.source.prepare(data_dir)
            for split in splits:
                if not len(dataset.source.split(split, data_dir)):
                    raise ValueError(f"split {split!r} of data set {dataset.label} has no examples")
    files = {r.modality.name: _tokenizer_file(r, datasets, data_dir, seed, team) for r in recipes}
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
            key = [
                hashes,
                to_json(dataset.source),
                to_json(dataset.crops),
                dataset.skip_bad,
                seed * bool(dataset.crops),
            ]
            key = fingerprint([*key, signatures[dataset.label] if dataset.label in signatures else ""])
            folder = data_dir / "tokens" / f"{dataset.label}-{key}"
            for split in splits:
                pretokenize(dataset, files, folder, split, data_dir=data_dir, seed=seed, team=team)
        for split in splits:
            _check_tokenizers(folder, split, hashes)
        folders.append(folder)
    return Prepared(tokenizers, files, tuple(folders))


def _check_tokenizers(folder: Path, split: str, hashes: Mapping[str, str]) -> None:
    for name, theirs in TokenShards(folder, split).manifest["tokenizers"].items():
        if name in hashes and hashes[name] != theirs:
            raise ValueError(
                f"the token shards in {folder} were made with another tokenizer of {name} ({theirs}) than this run's "
                f"({hashes[name]}); tokenize the data again, or leave out the data set"
            )


def _tokenizer_file(recipe: Recipe, datasets: Seq[Dataset], data_dir: Path, seed: int, team: Team) -> Path:
    """The tokenizer that finished shards were made with; else the recipe's, fitted by process 0 unless it is there."""
    name = recipe.modality.name
    for dataset in datasets:
        if dataset.tokens and (file := Path(dataset.tokens) / "tokenizers" / f"{name}.safetensors").exists():
            return file
    sources = [[to_json(d.source), to_json(d.crops), d.weight] for d in datasets if d.source is not None]
    file = data_dir / "tokenizers" / f"{name}-{fingerprint([to_json(recipe), sources, seed])}.safetensors"
    if not file.exists() and team.index == 0:
        print(f"fitting tokenizer {name}", flush=True)
        save_tokenizer(recipe.fit(_fitting_examples(recipe, datasets, data_dir, seed), seed=seed), file)
    _wait(file.exists, f"process 0 to fit tokenizer {name} ({file})")
    return file


def _wait(done, what: str) -> None:
    said = False
    while not done():
        if not said:
            print(f"waiting for {what}", flush=True)
        said = True
        time.sleep(0.5)


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
        except ValueError:
            if self.skip_bad:
                return None
            raise
        if hasattr(self.recipe, "signal_of"):  # which may be computed from other signals
            return example if self.recipe.signal_of(example) is not None else None
        return example if self.recipe.modality.signal in example else None

    def reads_some(self) -> bool:
        return any(self._usable(i) is not None for i in range(min(64, len(self))))


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
        raise ValueError(f"no data set has the signal {recipe.modality.signal!r} of modality {recipe.modality.name!r}")
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix([grain.MapDataset.source(part) for part in parts], np.array(weights) / sum(weights))


def pretokenize(
    dataset: Dataset,
    tokenizer_files: Mapping[str, Path],
    folder: Path,
    split: str,
    *,
    data_dir: Path,
    seed: int = 0,
    team: Team = Team(),
) -> None:
    """Writes this process's token shards of one split, then waits until all are there and the manifest is written."""
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
    _wait(
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
        path = self.folder / self.names[shard]
        temporary = self.folder / f".{path.name}.{os.getpid()}.tmp"
        used = {n: np.zeros(t.modality.vocab_size, bool) for n, t in self.tokenizers.items()}
        counts = {n: [0, 0] for n in self.tokenizers}  # examples, tokens
        num_examples, skipped = 0, []
        with contextlib.closing(ArrayRecordWriter(str(temporary), "group_size:1")) as writer:
            for batch in self._read(self.indices(shard)):
                for record in self._encode(batch, skipped):
                    writer.write(safetensors.numpy.save(record))
                    num_examples += 1
                    for name in record.keys() & used.keys():
                        counts[name][0] += 1
                        counts[name][1] += len(record[name])
                        if not isinstance(self.tokenizers[name].modality, Features):
                            used[name][record[name]] = True
                bar.update(len(batch))
        facts = {"num_examples": num_examples, "counts": counts, "skipped": skipped}
        used = {name: np.packbits(bits) for name, bits in used.items()}
        write_atomically(self._facts_file(shard), safetensors.numpy.save(used, {"facts": json.dumps(facts)}))
        os.replace(temporary, path)

    def _read(self, indices: range) -> Iterator[list[tuple[int, Any]]]:
        """Batches of (index, example or the error that it gave); the next is read while one is encoded."""

        def read(index: int):
            try:
                return index, self.examples[index]
            except ValueError as error:
                return index, error

        with ThreadPoolExecutor(4) as pool:
            starts = range(indices.start, indices.stop, EXAMPLES_PER_CALL)
            ahead = None
            for start in starts:
                now = ahead or [pool.submit(read, i) for i in indices[start - indices.start :][:EXAMPLES_PER_CALL]]
                following = indices[start - indices.start + EXAMPLES_PER_CALL :][:EXAMPLES_PER_CALL]
                ahead = [pool.submit(read, i) for i in following]
                yield [future.result() for future in now]

    def _encode(self, batch: list[tuple[int, Any]], skipped: list[str]) -> Iterator[dict[str, np.ndarray]]:
        """Records of the good examples; the first bad one is an error, or is skipped if the data set says so."""
        good = [(i, e) for i, e in batch if not isinstance(e, ValueError)]
        errors = [(i, e) for i, e in batch if isinstance(e, ValueError)]
        try:
            records = encode([e for _, e in good], self.tokenizers)
        except ValueError:  # find the bad ones
            records = []
            for i, example in good:
                try:
                    records += encode([example], self.tokenizers)
                except ValueError as error:
                    errors.append((i, error))
        for index, error in sorted(errors, key=lambda pair: pair[0]):
            message = f"example {index} of {self.dataset.label} {self.split}: {error}"
            skipped.append(message)
            if len(skipped) > self.dataset.skip_bad * self.num_examples:
                raise ValueError(f"{message}{self._limit(len(skipped))}") from error
        yield from records

    def _limit(self, count: int) -> str:
        if not self.dataset.skip_bad:
            return " (skip_bad=0.01 in its Dataset skips up to 1% of such examples)"
        return f" ({count} bad examples of {self.num_examples}, more than skip_bad={self.dataset.skip_bad} allows)"

    def finish(self, manifest_file: Path) -> None:
        """Writes the manifest from what is known of the shards, which all are there."""
        shards, skipped, totals, used = {}, [], {}, {}
        for i, name in enumerate(self.names):
            with safetensors.safe_open(self._facts_file(i), framework="numpy") as file:
                facts = json.loads(file.metadata()["facts"])
                for modality in file.keys():  # noqa: SIM118
                    bits = np.unpackbits(file.get_tensor(modality))
                    used[modality] = used[modality] | bits if modality in used else bits
            shards[name] = {"num_examples": facts["num_examples"], "bytes": (self.folder / name).stat().st_size}
            skipped += facts["skipped"]
            for modality, counts in facts["counts"].items():
                totals[modality] = [a + b for a, b in zip(totals.get(modality, [0, 0]), counts, strict=True)]
        if len(skipped) > self.dataset.skip_bad * self.num_examples:
            raise ValueError(f"{skipped[0]}{self._limit(len(skipped))}")
        if skipped:
            print(
                f"{len(skipped)} bad examples of {self.num_examples} were skipped, the first: {skipped[0]}", flush=True
            )
        manifest = {
            "num_examples": sum(shard["num_examples"] for shard in shards.values()),
            "shards": shards,
            "tokenizers": {name: tokenizer_hash(tokenizer) for name, tokenizer in self.tokenizers.items()},
            "modalities": {
                name: {
                    "num_examples": count,
                    "num_tokens": num_tokens,
                    "codes_used": int(used[name].sum()),
                    "vocab_size": self.tokenizers[name].modality.vocab_size,
                }
                for name, (count, num_tokens) in totals.items()
            },
            "skipped": {"num_examples": len(skipped), "first": skipped[:NUM_NAMED]},
        }
        write_atomically(manifest_file, json.dumps(manifest, indent=1).encode())


def encode(examples: Seq[dict[str, Any]], tokenizers: Mapping[str, Tokenizer]) -> list[dict[str, np.ndarray]]:
    """Raw examples -> stored arrays by modality. ValueErrors name the example's file.

    What an example has under a modality's own name, as a 1-D array of integers, is taken as its ids. A modality whose
    signal an example lacks is left out of its record. The crop, if any, is stored too.
    """
    records: list[dict[str, np.ndarray]] = [{"crop": e["crop"]} if "crop" in e else {} for e in examples]
    for name, tokenizer in tokenizers.items():
        signals: list[tuple[int, Any]] = []
        for i, example in enumerate(examples):
            with _naming(example, name):
                if _is_tokenized(example, tokenizer.modality):
                    records[i][name] = compact(example[name], tokenizer.modality)
                elif (signal := tokenizer.signal_of(example)) is not None:
                    signals.append((i, signal))
        encoded = []
        with _naming(examples[signals[0][0]] if len(signals) == 1 else {}, name):
            encoded = tokenizer.encode([signal for _, signal in signals]) if signals else []
        for (i, _), stored in zip(signals, encoded, strict=True):
            with _naming(examples[i], name):
                records[i][name] = compact(stored, tokenizer.modality)
    return records


@contextlib.contextmanager
def _naming(example: Mapping[str, Any], modality: str):
    try:
        yield
    except ValueError as error:
        text = str(error)
        file = next((str(example[key]) for key in ("id", "file") if key in example), "")
        file = file * (file not in text)
        raise ValueError(": ".join(part for part in (file, modality * (modality not in text), text) if part)) from error


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
