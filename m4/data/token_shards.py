"""Token shards of one split: random access to stored arrays, after the files were verified.

    {split}.json                           the manifest: of each shard its examples, bytes and SHA-256; written last
    {split}-00000-of-00010.array_record    records, one example each; a hash in the file guards each as it is read
    .{split}.verified.json                 which files were verified, by size, times and inode

Before anything is read, the SHA-256 of every shard is compared with the manifest's: that finds swapped, replaced and
damaged files. It is done once for each file, and again when its size, time or inode change. What changes without that
(a disk that rots) is found when a record is read, by the file's own hashes.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from m4.errors import closest
from m4.files import check_name, digest, read_json, shown, write_json

VERSION = 2  # of token shards: raised whenever the same data and tokenizers give others
NUM_THREADS = 4  # threads that verify files
WORTH_A_BAR = 2**30  # bytes: checking fewer takes a second
_verified: dict[str, list[int]] = {}  # of this process: for folders that cannot be written to


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A shard for grain's reader, with its number of examples, so that errors name the right shard."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


class TokenShards:
    """Random access to the stored arrays of one split; sent to a worker process as its folder's name.

    ValueError for a manifest or shard that is missing, damaged, swapped or of another size or count, which it names.
    Manifests of versions before 0.2 have no SHA-256: their shards are checked by size and number of records.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = Path(folder), split
        self.file = self.folder / f"{split}.json"
        if not self.file.exists():
            finished = sorted(p.stem for p in self.folder.glob("[!.]*.json"))
            raise ValueError(f"{shown(folder)} has no finished split {split!r}; {closest(split, finished)}")
        self.manifest = read_json(self.file)
        _check_manifest(self.manifest, self.file)
        self.shards = self.manifest["shards"]
        self.paths = [self.folder / name for name in self.shards]
        self.first = [0, *itertools.accumulate(shard["num_examples"] for shard in self.shards.values())]
        self._verify()

    @property
    def contents(self) -> dict[str, Any]:
        """The part of the manifest that decides which example has which index."""
        return {k: self.manifest[k] for k in ("num_examples", "tokenizers", "sets")}

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "_records"}

    @functools.cached_property
    def _records(self):
        import grain  # here, for --help to come fast

        whole = [_Whole(str(p), s["num_examples"]) for p, s in zip(self.paths, self.shards.values(), strict=True)]
        return grain.sources.ArrayRecordDataSource(whole)

    def __len__(self) -> int:
        return self.first[-1]

    def where(self, index: int) -> str:
        """The record and shard of an example, for errors."""
        shard = bisect.bisect_right(self.first, index) - 1
        return f"record {index - self.first[shard]} of token shard {shown(self.paths[shard])}"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} ({self.split} of {self.folder})")
        try:
            return safetensors.numpy.load(self._records[index])
        except Exception as error:
            raise ValueError(
                f"{self.where(index)} cannot be read ({error}); delete it and {self.split}.json beside it"
            ) from error

    def _verify(self) -> None:
        """Checks the size, number of records and SHA-256 of each shard that was not verified before."""
        record = self.folder / f".{self.split}.verified.json"
        known = {}
        with contextlib.suppress(ValueError):  # missing or damaged: all are verified
            known = read_json(record)
        stamps = {}
        for path, shard in zip(self.paths, self.shards.values(), strict=True):
            if not path.is_file():
                raise ValueError(f"token shard {shown(path)} is missing; delete {shown(self.file)} to write it again")
            status = path.stat()
            if status.st_size != shard["bytes"]:
                raise ValueError(
                    f"token shard {shown(path)} has {status.st_size} bytes instead of {shard['bytes']}; "
                    f"delete it and {shown(self.file)} to write it again"
                )
            # Shards of version 0.1 have no digest.
            times = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            stamps[path.name] = [status.st_size, *times, shard["num_examples"], shard.get("sha256", "")]
        new = [
            path
            for path in self.paths
            if stamps[path.name] not in (known.get(path.name), _verified.get(os.path.abspath(path)))
        ]
        num_bytes = sum(self.shards[path.name]["bytes"] for path in new)
        with (
            ThreadPoolExecutor(NUM_THREADS) as pool,
            tqdm(
                total=num_bytes, desc=f"verifying {shown(self.folder.name)} {self.split}", unit="B", unit_scale=True,
                file=sys.stdout, mininterval=1, disable=num_bytes < WORTH_A_BAR, ascii=True,
            ) as bar,
        ):  # fmt: skip
            for path, _ in zip(new, pool.map(self._verify_shard, new), strict=True):
                bar.update(self.shards[path.name]["bytes"])
        _verified.update({os.path.abspath(path): stamps[path.name] for path in new})
        if new:
            with contextlib.suppress(OSError):  # a read-only folder: each process verifies it
                write_json(record, stamps)

    def _verify_shard(self, path: Path) -> None:
        shard = self.shards[path.name]
        again = f"delete it and {shown(self.file)} to write it again"
        if "sha256" in shard and digest(path) != shard["sha256"]:
            raise ValueError(f"token shard {shown(path)} is damaged or not that of this place: {again}")
        count = num_records(path)
        if count != shard["num_examples"]:
            expected = shard["num_examples"]
            raise ValueError(f"token shard {shown(path)} has {count} records instead of {expected}; {again}")


def num_records(shard: Path) -> int:
    """How many records an ArrayRecord file holds. ValueError if it is none."""
    try:
        reader = ArrayRecordReader(str(shard))
        try:
            return reader.num_records()
        finally:
            reader.close()
    except Exception as error:
        raise ValueError(f"token shard {shown(shard)} cannot be read ({str(error).splitlines()[0][:200]})") from error


def _check_manifest(manifest: dict[str, Any], file: Path) -> None:
    """ValueError unless a manifest is complete and its counts agree."""
    if manifest.get("version") != VERSION:
        raise ValueError(f"{shown(file)} was written by another version of m4; tokenize the data again")
    kinds = {"num_examples": int, "shards": dict, "tokenizers": dict, "sets": list}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise ValueError(f"{shown(file)} is no manifest of token shards: {key} is not there, or no {kind.__name__}")
    if not manifest["shards"]:
        raise ValueError(f"{shown(file)} names no shards; delete it to write them again")
    for name, shard in manifest["shards"].items():
        check_name(name, f"a shard in {shown(file)}")
        lowest = {"num_examples": 0, "bytes": 1}
        for key, low in lowest.items():
            if not isinstance(shard, dict) or type(shard.get(key)) is not int or shard[key] < low:
                raise ValueError(f"{shown(file)}: {key} of shard {name} must be a whole number of at least {low}")
    for name in manifest["tokenizers"]:
        check_name(name, f"a modality in {shown(file)}")
    counted = {"its shards": sum(shard["num_examples"] for shard in manifest["shards"].values())}
    try:
        counted["its sets of modalities"] = sum(group["num_examples"] for group in manifest["sets"])
        assert all(isinstance(name, str) for group in manifest["sets"] for name in group["modalities"])
    except (TypeError, KeyError, AssertionError) as error:
        raise ValueError(f"{shown(file)}: sets is no list of modalities and numbers of examples") from error
    for what, count in counted.items():
        if count != manifest["num_examples"]:
            raise ValueError(f"{shown(file)} is wrong: {manifest['num_examples']} examples, but {what} have {count}")
