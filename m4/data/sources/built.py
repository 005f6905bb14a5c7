"""Data sets that are built once: computed by all cores, stored by tfds as ArrayRecord, read back without TensorFlow.

encode(indices) --spawned processes--> tfds, ArrayRecord --BuiltSplit--> raw examples
"""

from __future__ import annotations

import abc
import functools
import io
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from m4.distributed import workers
from m4.files import DIGESTS, check_digests, locked, read_json, shown, write_digests

CHUNK = 64  # examples per task of the process pool


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H W] or [H W 3] as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=4)
    return buffer.getvalue()


def encode_all(encode: Callable[[range], list[dict]], count: int) -> Iterator[dict]:
    """The results of `encode` for the first `count` indices, in order, by all cores; a few chunks wait in memory."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    num_workers = min(len(chunks), os.cpu_count() or 1)
    if num_workers <= 1 or count <= 4 * CHUNK:  # starting processes would take longer than the work
        for chunk in chunks:
            yield from encode(chunk)
        return
    with workers.pool(num_workers) as pool:
        pending = deque()
        for chunk in chunks:
            pending.append(pool.submit(encode, chunk))
            if len(pending) > 2 * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def build(folder: Path, make_builder: Callable[[], Any]) -> None:
    """Builds all splits unless they exist. tfds builds beside the folder and renames: it is whole or absent.

    Waits for another process that builds the same; removes leftovers of killed ones.
    """
    if folder.exists():
        return
    import tensorflow_datasets as tfds

    lock = folder.parent.with_name(f".{folder.parent.name}.lock")
    with locked(lock, f"building {shown(folder)}", wait=True) as is_mine:
        if folder.exists():
            return
        for left in folder.parent.glob(f"incomplete.*_{folder.name}") if is_mine else ():
            shutil.rmtree(left)
        try:
            skip = tfds.download.ComputeStatsMode.SKIP
            make_builder().download_and_prepare(download_config=tfds.download.DownloadConfig(compute_stats=skip))
        except OSError:
            if not folder.exists():  # else another process has built the same data meanwhile
                raise
        write_digests(folder, [path.name for path in folder.iterdir() if path.name != DIGESTS])
        lock.unlink(missing_ok=True)  # its next holder finds the folder


@dataclass(frozen=True, kw_only=True)
class BuiltSplit(abc.ABC):
    """A sequence of raw examples in a built folder; opened when first read, so that it can be sent to workers."""

    folder: Path
    name: str

    images: ClassVar[tuple[str, ...]]  # features stored as PNG
    source: ClassVar[str]  # the class that builds the folder

    @abc.abstractmethod
    def decode(self, stored: dict) -> dict:
        """An example as tfds stores it, with its images decoded, -> a raw example."""

    def __getstate__(self):
        return {"folder": self.folder, "name": self.name}

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        again = f"delete it and call {self.source}.prepare again"
        if not self.folder.exists():
            missing = f"no {self.source.lower()} in {self.folder}"
            raise ValueError(f"{missing}; call {self.source}.prepare with the same fields and data_dir first")
        self._check()
        try:
            builder = tfds.builder_from_directory(self.folder)
        except Exception as error:
            raise ValueError(
                f"{shown(self.folder)} cannot be read ({type(error).__name__}: {error}); {again}"
            ) from error
        skip = {name: tfds.decode.SkipDecoding() for name in self.images}  # PIL decodes them, without TensorFlow
        return builder.as_data_source(self.name, decoders=skip)  # ty: ignore[invalid-argument-type]  no self, a dict: as tfds documents

    def _check(self) -> None:
        """ValueError names a file that has changed: records by their size, all else by its SHA-256. Hashes within guard
        each record as it is read."""
        if not (self.folder / DIGESTS).exists():
            return  # built before version 0.2
        files = read_json(self.folder / DIGESTS)["files"]
        check_digests(self.folder, [name for name in files if ".array_record" not in name])
        for name, expected in files.items():
            path = self.folder / name
            if path.exists() and path.stat().st_size != expected["size"]:
                raise ValueError(
                    f"{shown(path)} is damaged: {path.stat().st_size} bytes, {expected['size']} were written; "
                    f"delete {shown(self.folder)} and call {self.source}.prepare again"
                )

    def _shard(self, index: int) -> str:
        """The file that holds an example."""
        for shard in self._records.dataset_info.splits[self.name].file_instructions:
            if index < shard.take:
                return shard.filename
            index -= shard.take
        raise AssertionError(f"{self.name} has too few examples")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"example {index} of {count} ({self.name} of {self.folder})")
        index = int(index) % count
        try:
            stored = self._records[index]
        except RuntimeError as error:  # it names the kind of damage, but rarely the file
            raise ValueError(
                f"cannot read example {index} from {self._shard(index)} ({error}); "
                f"delete {self.folder} and call {self.source}.prepare again"
            ) from error
        images = {name: np.array(Image.open(io.BytesIO(stored[name]))) for name in self.images}
        return self.decode({**stored, **images})
