"""All that comes before training, each stage skipped when it is there: raw data, tokenizers, token shards.

    source --crops, tokenizers--> TOKENS/{split}-00000-of-00010.array_record + {split}.json + tokenizers/*.safetensors

A record holds one example: the stored array of every modality that it has, as safetensors. The unit of work is one
shard, written under a temporary name and renamed, so that a killed job goes on where it was. Any number of processes
may write shards of one split, each its own; the last to finish writes the manifest, without which nobody reads them.
Each stage is kept under a hash of what it depends on.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from m4 import workers
from m4.components import load_tokenizer, save_tokenizer, to_json, tokenizer_hash
from m4.data import VERSION, Dataset, TokenShards
from m4.files import fingerprint, write_atomically
from m4.modality import Modalities, Recipe, Tokenizer
from m4.records import is_tokenized, named_error
from m4.shards import Job, raw_examples
from m4.team import Others, Team

EXAMPLES_PER_SHARD = 2048
NUM_PROBES = 256  # places where a data set is searched for a signal


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What training needs of the preparation: tokenizers by modality name, and a folder of shards for each data set."""

    tokenizers: dict[str, Tokenizer]
    tokenizer_files: dict[str, Path]
    tokens: tuple[Path, ...]

    def shards(self, split: str) -> list[TokenShards]:
        return [TokenShards(folder, split) for folder in self.tokens]


def prepare(
    datasets: Seq[Dataset],
    recipes: Seq[Recipe],
    data_dir: str | os.PathLike,
    *,
    seed: int,
    splits: Seq[str] = ("train",),
    team: Team = Team(),  # noqa: B008 (frozen)
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
    with Others(data_dir, team) as others:
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
                signals = [[*dataset.signals]] if dataset.signals else []
                key = fingerprint([VERSION, hashes, source, crops, *signals])
                folder = data_dir / "tokens" / f"{dataset.label}-{key}"
                for split in splits:
                    pretokenize(dataset, files, folder, split, data_dir=data_dir, seed=seed, others=others)
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


def _tokenizer_file(
    recipe: Recipe, datasets: Seq[Dataset], signatures: Mapping[str, str], data_dir: Path, seed: int, others: Others
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
            return example if modality.signal in example and not is_tokenized(example, modality) else None
        except Exception as error:
            if self.skip_bad:
                return None
            raise named_error(error, f"example {index}") from error

    def reads_some(self) -> bool:
        """Whether any of some examples, spread over all, has it."""
        places = np.unique(np.linspace(0, len(self) - 1, NUM_PROBES).astype(int))
        return any(self._usable(i) is not None for i in places.tolist())


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
    others: Others | None = None,
) -> None:
    """Writes this process's token shards of one split, then waits until all are there and the manifest is written."""
    others = others or Others(data_dir, Team())
    team = others.team
    manifest_file = folder / f"{split}.json"
    if manifest_file.exists():
        return
    job = Job(dataset, dict(tokenizer_files), folder, split, data_dir, seed, EXAMPLES_PER_SHARD)
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


def _write(job: Job, index: int) -> None:
    with tqdm(disable=True) as bar:
        job.write(index, bar)
