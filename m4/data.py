"""Raw examples -> token shards -> a resumable stream of masked batches.

    source --tokenizers--> TOKENS/{split}-00000-of-00010.array_record + manifest.json --grain--> MaskedBatch

A record holds one example: the stored array of every modality that it has, as safetensors. Each preparation stage is
kept under a hash of what it depends on, and is skipped when its output is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from m4.components import closest, fingerprint, load_tokenizer, save_tokenizer, to_json, write_atomically
from m4.masking import Masking
from m4.modality import Features, Modalities, Modality, Recipe, Tokenizer
from m4.tokens import MaskedBatch

EXAMPLES_PER_SHARD = 2048
EXAMPLES_PER_CALL = 256  # what a tokenizer gets at once


class Source(Protocol):
    """Aligned raw examples: a frozen dataclass, so that its fields identify its data."""

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Renders, downloads or checks what is needed; returns at once when it is there."""

    def split(self, name: str, data_dir: str | os.PathLike) -> Seq[dict[str, Any]]:
        """Raw examples of "train", "validation", "test" or another split that the source has."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What training needs of the preparation: tokenizers by modality name, and a folder of token shards."""

    tokenizers: dict[str, Tokenizer]
    tokenizer_files: dict[str, Path]
    tokens: Path


def prepare(
    source: Source,
    recipes: Seq[Recipe],
    data_dir: str | os.PathLike,
    *,
    seed: int,
    splits: Seq[str] = ("train",),
) -> Prepared:
    """All that comes before training, each stage skipped when it is done: raw data, tokenizers, token shards."""
    data_dir = Path(data_dir)
    Modalities([r.modality for r in recipes])  # names the doubles before any work
    source.prepare(data_dir)
    tokenizers, files = {}, {}
    for recipe in recipes:
        name = recipe.modality.name
        key = fingerprint([to_json(recipe), to_json(source), seed])
        files[name] = data_dir / "tokenizers" / f"{name}-{key}.safetensors"
        if not files[name].exists():
            print(f"fitting tokenizer {name}", flush=True)
            tokenizer = recipe.fit(source.split("train", data_dir), seed=seed)
            save_tokenizer(tokenizer, files[name])
        tokenizers[name] = load_tokenizer(files[name])
        if tokenizers[name].modality != recipe.modality:
            raise ValueError(f"{files[name]} holds {tokenizers[name].modality}, the config says {recipe.modality}")
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in files.items()}
    tokens = data_dir / "tokens" / fingerprint([hashes, to_json(source)])
    for split in splits:
        pretokenize(source.split(split, data_dir), tokenizers, tokens, split, tokenizer_hashes=hashes)
    return Prepared(tokenizers, files, tokens)


def pretokenize(
    examples: Seq[dict[str, Any]],
    tokenizers: Mapping[str, Tokenizer],
    folder: Path,
    split: str,
    *,
    tokenizer_hashes: Mapping[str, str],
) -> None:
    """Writes the token shards of one split; shards that are there stay, so that a killed job goes on where it was."""
    manifest_file = folder / f"{split}.json"
    if manifest_file.exists():
        return
    if not len(examples):
        raise ValueError(f"split {split!r} has no examples")
    folder.mkdir(parents=True, exist_ok=True)
    num_shards = -(-len(examples) // EXAMPLES_PER_SHARD)
    names = [f"{split}-{i:05d}-of-{num_shards:05d}.array_record" for i in range(num_shards)]
    with tqdm(total=len(examples), desc=f"tokens: {split}", unit="example", file=sys.stdout, mininterval=1) as bar:
        for i, name in enumerate(names):
            indices = range(i * EXAMPLES_PER_SHARD, min((i + 1) * EXAMPLES_PER_SHARD, len(examples)))
            if not (folder / name).exists():
                temporary = folder / f".{name}.{os.getpid()}.tmp"
                writer = ArrayRecordWriter(str(temporary), "group_size:1")
                with contextlib.closing(writer):
                    for first in range(indices.start, indices.stop, EXAMPLES_PER_CALL):
                        batch = [examples[j] for j in range(first, min(first + EXAMPLES_PER_CALL, indices.stop))]
                        for record in encode(batch, tokenizers):
                            writer.write(safetensors.numpy.save(record))
                        bar.update(len(batch))
                os.replace(temporary, folder / name)
            else:
                bar.update(len(indices))
    manifest = {
        "num_examples": len(examples),
        "shards": {name: (folder / name).stat().st_size for name in names},
        "tokenizers": dict(tokenizer_hashes),
    }
    write_atomically(manifest_file, json.dumps(manifest, indent=1).encode())


def encode(examples: Seq[dict[str, Any]], tokenizers: Mapping[str, Tokenizer]) -> list[dict[str, np.ndarray]]:
    """Raw examples -> stored arrays by modality; a modality whose signal an example lacks is left out of its record."""
    records: list[dict[str, np.ndarray]] = [{} for _ in examples]
    for name, tokenizer in tokenizers.items():
        signals = [tokenizer.signal_of(example) for example in examples]
        present = [i for i, signal in enumerate(signals) if signal is not None]
        for i, stored in zip(present, tokenizer.encode([signals[i] for i in present]), strict=True):
            records[i][name] = compact(stored, tokenizer.modality)
    return records


def compact(stored: np.ndarray, modality: Modality) -> np.ndarray:
    """Token ids in the smallest unsigned type that holds the vocabulary; features as they are."""
    if isinstance(modality, Features):
        return np.ascontiguousarray(stored)
    if len(stored) and not 0 <= stored.min() <= stored.max() < modality.vocab_size:
        raise ValueError(f"{modality.name}: ids {stored.min()}..{stored.max()} outside [0, {modality.vocab_size})")
    return np.ascontiguousarray(stored, np.min_scalar_type(modality.vocab_size - 1))


class TokenShards:
    """Random access to the stored arrays of one split."""

    def __init__(self, folder: Path, split: str):
        manifest = folder / f"{split}.json"
        if not manifest.exists():
            finished = sorted(p.stem for p in folder.glob("*.json"))
            raise ValueError(f"{folder} has no finished split {split!r}; {closest(split, finished)}")
        content = json.loads(manifest.read_text())
        self.paths = [folder / name for name in content["shards"]]
        for path, size in zip(self.paths, content["shards"].values(), strict=True):
            if not path.exists():
                raise ValueError(f"token shard {path} is missing; delete {manifest} to write it again")
            if path.stat().st_size != size:
                raise ValueError(
                    f"token shard {path} has {path.stat().st_size} bytes instead of {size}; "
                    f"delete it and {manifest} to write it again"
                )
        self.records = grain.sources.ArrayRecordDataSource([str(p) for p in self.paths])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            return safetensors.numpy.load(self.records[index])
        except Exception as error:
            shard = self.paths[int(index) // EXAMPLES_PER_SHARD]
            raise ValueError(f"record {int(index) % EXAMPLES_PER_SHARD} of {shard} cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class Mask:
    """The masking of one example under a generator of its own: (seed, position in the stream) decides everything."""

    masking: Masking
    modalities: Modalities

    def __call__(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> MaskedBatch:
        return self.masking(example, self.modalities, rng)


def batches(
    tokens: Path,
    split: str,
    masking: Masking,
    modalities: Modalities,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Any:
    """An endless, reshuffled, exactly resumable iterator of numpy MaskedBatch (this process's share of each batch).

    Its state is one integer (`get_state`, `set_state`), good for any number of processes. Call `close` when done.
    """
    masking.check(modalities)
    shards = TokenShards(tokens, split)
    if len(shards) < batch_size:
        raise ValueError(f"split {split!r} has {len(shards)} examples, fewer than one batch of {batch_size}")
    stream = grain.MapDataset.source(shards).seed(seed).shuffle().repeat().random_map(Mask(masking, modalities))
    options = grain.sharding.ShardOptions(shard_index=process_index, shard_count=process_count, drop_remainder=True)
    return iter(
        grain.experimental.ElasticIterator(
            stream,
            batch_size,
            options,
            read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size),
        )
    )
