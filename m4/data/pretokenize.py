"""All that comes before training, each stage skipped when its result exists: raw data, tokenizers, token shards.

    source --crops, tokenizers--> TOKENS/{split}-00000-of-00010.array_record + {split}.json + tokenizers/*.safetensors

A record holds one example: the stored array of every modality that it has, as safetensors. The unit of work is one
shard, written under a temporary name and renamed, so that a killed job goes on where it was. Any number of processes
may write shards of one split, each its own; the last to finish writes the manifest, without which nobody reads them.
Each stage is kept under a hash of what it depends on.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from m4.data.dataset import Dataset
from m4.data.shard_writer import ShardWriter, limit, raw_examples
from m4.data.token_shards import VERSION, TokenShards
from m4.distributed import workers
from m4.distributed.worker_group import FileBarrier, WorkerGroup
from m4.files import fingerprint, locked, remove_leftovers, shown, write_atomically
from m4.registry import to_json
from m4.tokens.modality import Modalities
from m4.tokens.records import is_tokenized, name_of, named_error
from m4.tokens.tokenizer import Examples, Recipe, Tokenizer, load_tokenizer, save_tokenizer, tokenizer_hash

logger = logging.getLogger(__name__)

EXAMPLES_PER_SHARD = 2048
NUM_PROBES = 256  # places where a data set is searched for a signal


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The results of the preparation: tokenizers by modality name, and a folder of shards for each data set."""

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
    team: WorkerGroup = WorkerGroup(),  # noqa: B008 (frozen)
) -> Prepared:
    """Raw data, tokenizers and token shards of a run. ValueError names shards whose tokenizers are not the run's."""
    data_dir = Path(data_dir)
    Modalities([r.modality for r in recipes])  # reports duplicate names before any work
    with FileBarrier(data_dir, team) as others:
        signatures = {}
        for dataset in datasets:  # reports errors of token shards and sources before any work
            for split in splits if dataset.tokens else ():
                TokenShards(Path(dataset.tokens), split)
            has_signature = hasattr(dataset.source, "signature")
            signatures[dataset.label] = dataset.source.signature(data_dir) if has_signature else ""
        for folder in (data_dir, *(data_dir / name for name in ("tokenizers", "tar_indexes", "texts"))):
            remove_leftovers(folder)  # of killed processes
        for dataset in datasets:
            if dataset.source is not None:
                dataset.source.prepare(data_dir)
                for split in splits:
                    if not len(dataset.source.split(split, data_dir)):
                        raise ValueError(f"split {split!r} of data set {dataset.label} has no examples")
        files = {
            r.modality.name: _tokenizer_file(r, datasets, signatures, data_dir, seed, others, recipes) for r in recipes
        }
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
                _check_tokenizers(folder, split, hashes, files)
            folders.append(folder)
    return Prepared(tokenizers, files, tuple(folders))


def _check_tokenizers(folder: Path, split: str, hashes: Mapping[str, str], files: Mapping[str, Path]) -> None:
    for name, shards_hash in TokenShards(folder, split).manifest["tokenizers"].items():
        if name in hashes and hashes[name] != shards_hash:
            if files[name] == _beside(folder, name):
                raise ValueError(
                    f"{shown(files[name])} is damaged or was replaced: the token shards beside it were made with "
                    f"another tokenizer ({shards_hash}) than it holds ({hashes[name]})"
                )
            raise ValueError(
                f"the token shards in {folder} were made with another tokenizer of {name} ({shards_hash}) than this "
                f"run's ({hashes[name]}); tokenize the data again, or leave out the data set"
            )


def _tokenizer_file(
    recipe: Recipe, datasets: Seq[Dataset], signatures: Mapping[str, str], data_dir: Path, seed: int,
    others: FileBarrier, recipes: Seq[Recipe],
) -> Path:  # fmt: skip
    """The tokenizer that finished shards were made with; else the recipe's, fitted by process 0 unless it exists."""
    name = recipe.modality.name
    for dataset in datasets:
        if dataset.tokens and (file := _beside(Path(dataset.tokens), name)).exists():
            return file
    sources = [
        [to_json(d.source), signatures[d.label], to_json(d.crops), d.weight] for d in datasets if d.source is not None
    ]
    file = data_dir / "tokenizers" / f"{name}-{fingerprint([to_json(recipe), sources, seed])}.safetensors"
    if not file.exists() and others.team.index == 0:
        lock = file.with_name(f".{file.stem}.lock")
        with locked(lock, f"fitting tokenizer {name}", wait=True):
            if not file.exists():
                logger.info(shown(f"fitting tokenizer {name}"))
                save_tokenizer(_fitted(recipe, datasets, data_dir, seed, recipes), file)
            lock.unlink(missing_ok=True)  # its next holder finds the file
    others.wait(file.exists, f"process 0 to fit tokenizer {name} ({file})")
    return file


def _beside(folder: Path, name: str) -> Path:
    """The file of a modality's tokenizer beside token shards."""
    return folder / "tokenizers" / f"{name}.safetensors"


class ExamplesWithSignal(Seq):
    """The examples that have what a recipe reads. One without it, or a bad one that may be skipped, is replaced by the
    next.

    An example is bad if it cannot be read, or if the recipe's `check` refuses it, as its tokenizer would when shards
    are written. ValueError names the first, or that which exceeds the share `skip_bad` of all examples.
    """

    def __init__(self, examples: Examples, recipe: Recipe, *, skip_bad: float, label: str = ""):
        self.examples, self.recipe, self.skip_bad, self.label = examples, recipe, skip_bad, label
        self.skipped: dict[int, str] = {}
        self._checked = np.zeros(len(examples), bool)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:  # ty: ignore[incompatible-method-override]  never a slice
        for i in range(index, index + len(self)):
            if (example := self._usable(i % len(self))) is not None:
                return example
        raise ValueError(f"no example has what the tokenizer of {self.recipe.modality.name} reads")

    def _usable(self, index: int) -> dict[str, Any] | None:
        if index in self.skipped:
            return None
        example = {}
        try:
            example = self.examples[index]
            signal = self._signal(example)
            check = getattr(self.recipe, "check", None)
            if signal is not None and not self._checked[index] and check is not None:
                check(signal)
                self._checked[index] = True
            return example if signal is not None else None
        except Exception as error:
            modality = self.recipe.modality.name if example else ""
            named = named_error(error, f"example {index}{self.label}", name_of(example, "file", "id"), modality)
            self.skipped[index] = str(named)
            if len(self.skipped) > self.skip_bad * len(self):
                raise ValueError(f"{named}{limit(self.skip_bad, len(self.skipped), len(self))}") from error
            return None

    def _signal(self, example: dict[str, Any]) -> Any | None:
        modality = self.recipe.modality
        signal_of = getattr(self.recipe, "signal_of", None)
        if signal_of is not None:  # the signal may be computed from other signals
            return signal_of(example)
        return example[modality.signal] if modality.signal in example and not is_tokenized(example, modality) else None

    def reads_some(self) -> bool:
        """Whether any of up to NUM_PROBES examples, evenly spread over all, has the signal."""
        places = np.unique(np.linspace(0, len(self) - 1, NUM_PROBES).astype(int))
        return any(self._usable(i) is not None for i in places.tolist())


def _fitted(recipe: Recipe, datasets: Seq[Dataset], data_dir: Path, seed: int, recipes: Seq[Recipe]) -> Tokenizer:
    """A new tokenizer; logs how many bad examples were skipped."""
    name, parts = recipe.modality.name, []
    examples = _fitting_examples(recipe, datasets, data_dir, seed, parts, recipes=recipes)
    try:
        tokenizer = recipe.fit(examples, seed=seed)
    except ValueError as error:
        raise named_error(error, f"fitting tokenizer {name}") from error
    for part in parts:
        if part.skipped:
            first = part.skipped[min(part.skipped)]
            logger.info(
                shown(
                    f"tokenizer {name}{part.label}: {len(part.skipped)} bad examples were skipped, the first: {first}"
                )
            )
    return tokenizer


def _fitting_examples(
    recipe: Recipe,
    datasets: Seq[Dataset],
    data_dir: Path,
    seed: int,
    used: list[ExamplesWithSignal] | None = None,
    *,
    recipes: Seq[Recipe] = (),
) -> Examples:
    """Training examples that have the recipe's signal, mixed by the data sets' weights; `used` receives the parts."""
    parts, weights = [], []
    for dataset in datasets:
        if dataset.source is not None:
            label, raw = f" of {dataset.label} train", raw_examples(dataset, "train", data_dir, seed, recipes)
            part = ExamplesWithSignal(raw, recipe, skip_bad=dataset.skip_bad, label=label)
            if len(part) and part.reads_some():
                parts.append(part)
                weights.append(dataset.weight)
    if not parts:
        raise ValueError(
            f"no data set has the signal {recipe.modality.signal!r} of modality {recipe.modality.name!r} (ids without "
            "their tokenizer need m4_tokenizers.modalities.stored.IdsRecipe, with it TokenizerFile)"
        )
    if used is not None:
        used += parts
    if len(parts) == 1:
        return parts[0]
    import grain  # here, for --help to come fast

    endless = [grain.MapDataset.source(part).repeat() for part in parts]
    mixed: Any = grain.MapDataset.mix(endless, np.array(weights) / sum(weights))  # its types let elements be missing
    return mixed[: sum(map(len, parts))]


def pretokenize(
    dataset: Dataset,
    tokenizer_files: Mapping[str, Path],
    folder: Path,
    split: str,
    *,
    data_dir: Path,
    seed: int = 0,
    others: FileBarrier | None = None,
) -> None:
    """Writes this process's token shards of one split, then waits until all exist and the manifest is written."""
    others = others or FileBarrier(data_dir, WorkerGroup())
    team = others.team
    manifest_file = folder / f"{split}.json"
    if manifest_file.exists():
        return
    writer = ShardWriter(dataset, dict(tokenizer_files), folder, split, data_dir, seed, EXAMPLES_PER_SHARD)
    what, lock = f"token shards of {shown(folder)}", folder / f".{split}-{team.index}-of-{team.count}.lock"
    with locked(lock, f"writing {what}", wait=True):  # of another run on the same data
        if not manifest_file.exists():
            _write_own_shards(writer, team)
        done = set()

        def all_written() -> bool:
            done.update(i for i in range(len(writer.names)) if i not in done and writer.written(i))
            return manifest_file.exists() or len(done) == len(writer.names)

        others.wait(all_written, f"the other processes to write their shards of {shown(folder)}")
        if not manifest_file.exists():
            writer.finish(manifest_file)
        lock.unlink(missing_ok=True)  # its next holder finds the manifest


def _write_own_shards(writer: ShardWriter, team: WorkerGroup) -> None:
    """Writes the shards of this process that are missing or not whole."""
    for folder in (writer.folder, writer.folder / "tokenizers"):
        remove_leftovers(folder)
    for name, file in writer.tokenizer_files.items():
        copy, content = _beside(writer.folder, name), file.read_bytes()
        if not copy.exists() or tokenizer_hash(load_tokenizer(copy)) != tokenizer_hash(writer.tokenizers[name]):
            write_atomically(copy, content)
    # Every count-th shard, so that all processes have about equal work.
    mine = range(team.index, len(writer.names), team.count)
    missing = [i for i in mine if not writer.written(i, whole=True)]
    num_mine = sum(len(writer.indices(i)) for i in mine)
    title = f"tokens: {writer.dataset.label} {writer.split}".encode("ascii", "backslashreplace").decode()
    with tqdm(total=num_mine, desc=title, unit="example", file=sys.stdout, mininterval=1) as bar:
        bar.update(num_mine - sum(len(writer.indices(i)) for i in missing))
        if team.workers > 1 and len(missing) > 1:
            with workers.pool(min(team.workers, len(missing))) as pool:
                for i, _ in zip(missing, pool.map(functools.partial(_write, writer), missing), strict=True):
                    bar.update(len(writer.indices(i)))
        else:
            for i in missing:
                writer.write(i, bar)


def _write(writer: ShardWriter, index: int) -> None:
    with tqdm(disable=True) as bar:
        writer.write(index, bar)
