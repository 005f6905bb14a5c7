"""Aligned examples from tars, one folder of shards per signal: read in place, never extracted.

root/rgb/shard-00000.tar    (a/0001.png, a/0002.png, ...)
root/depth/shard-00000.tar  (a/0001.npy, a/0002.npy, ...)    ->  {"rgb": ..., "depth": ...}, ...
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from m4.data.sources.contents import check_regular, status_of
from m4.data.sources.folders import Aligned, Stored, is_junk
from m4.errors import closest
from m4.files import fingerprint, read_json, shown, write_json

VERSION = 2  # of the index: raise it whenever the same tar gives another, or is refused
CHUNK = 2**20  # bytes read at once
BLOCK = tarfile.BLOCKSIZE  # bytes; headers and contents of members start at multiples


def expand(pattern: str) -> list[str]:
    """Names that a pattern stands for: "shard-{008..010}" -> shard-008, shard-009, shard-010; also lists, {a,b}."""
    choices = []
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):  # what is within braces has an odd index
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if i % 2 == 0 and not {"{", "}"} & set(part):
            choices.append([part])
        elif i % 2 and bounds and int(bounds[1]) <= int(bounds[2]):
            width = len(bounds[1]) if bounds[1].startswith("0") else 0
            choices.append([str(n).zfill(width) for n in range(int(bounds[1]), int(bounds[2]) + 1)])
        elif i % 2 and "," in part:
            choices.append(part.split(","))
        else:
            raise ValueError(f"shards is {pattern!r}; allowed: ranges like {{00000..00009}} and lists like {{a,b}}")
    return ["".join(parts) for parts in itertools.product(*choices)]


def members(tar: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size in bytes of each file in a tar; ValueError names the tar and what is wrong with it.

        header | content | header | content | zeros: 512 bytes at least, and nothing else up to the end of the file

    tarfile would silently skip what follows the zeros: members of a second archive that was appended to the first, or
    those behind a damaged header.
    """
    check_regular(tar)
    file = shown(tar)
    try:
        with tarfile.open(tar, "r:") as opened:
            infos = opened.getmembers()
        end = max((info.offset_data + -(-info.size // BLOCK) * BLOCK for info in infos), default=0)
        num_zeros, other = _zeros_from(tar, end)
    except Exception as error:  # damaged headers give errors of many kinds
        given = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: cannot be read as an uncompressed tar, is it truncated? ({given})") from error
    files = []
    for info in infos:
        path = PurePosixPath(info.name)  # without "./" in front
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{file}: member {info.name!r} points outside of the tar; allowed: relative names")
        if not (info.isdir() or info.isreg()) or info.issparse():
            kind = "a link" if info.islnk() or info.issym() else "a sparse file" if info.issparse() else "a device"
            raise ValueError(f"{file}: member {info.name!r} is {kind}; allowed: files")
        if info.size < 0:
            raise ValueError(f"{file}: member {info.name!r} has the size {info.size}")
        if info.isreg() and not is_junk(path.as_posix()):
            files.append((path.as_posix(), info.offset_data, info.size))
    if num_zeros < BLOCK:  # tarfile silently stops at a header that is damaged or truncated
        raise ValueError(f"{file}: truncated or damaged at byte {end}, where zeros should mark its end")
    if other is not None:
        raise ValueError(
            f"{file}: its end is marked at byte {end}, but more follows at byte {other}: a lost header, or archives "
            "that were joined (then join them with tar --concatenate, or give each its own file)"
        )
    return files


def _zeros_from(file: Path, start: int) -> tuple[int, int | None]:
    """How many zeros follow `start` in a file, and where the first other byte is, if there is one."""
    with open(file, "rb") as opened:
        opened.seek(start)
        place = start
        while data := opened.read(CHUNK):
            if rest := data.lstrip(b"\0"):
                other = place + len(data) - len(rest)
                return other - start, other
            place += len(data)
    return place - start, None


@dataclass(frozen=True, kw_only=True)
class Tars(Aligned):
    """Members aligned by their name without extension, which is the example's id, over all shards.

        root/<signal>/<shard>.tar             split by a hash of the id
        root/<split>/<signal>/<shard>.tar     splits train, validation, test as given

    Each signal needs the same shards, and each shard the same members, unless `allow_missing` is set.
    """

    shards: str = ""
    """Shards to read, such as "shard-{00000..00009}", of which each split folder reads those that it has; "" is all."""
    num_crops: int = 1
    """Examples per id: each takes its row of tokens [num_crops, num_tokens] and repeats all else. With 1, tokens are
    read as stored."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_crops < 1:
            raise ValueError(f"num_crops is {self.num_crops}, but must be at least 1")
        self._wanted()

    def _wanted(self) -> list[str]:
        return [f"{name.removesuffix('.tar')}.tar" for name in expand(self.shards)] if self.shards else []

    def files(self, folder: Path) -> Iterator[str]:
        wanted = set(self._wanted())
        for path in sorted(folder.glob("*.tar")):
            if not is_junk(path.name) and (not wanted or path.name in wanted):
                yield path.name

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Checks shards and members, and keeps an index of every tar under data_dir."""
        layout = self.layout(data_dir)
        tar_names = {
            folder: sorted(p.name for p in folder.glob("*.tar")) for fs in layout.values() for folder in fs.values()
        }
        for folder, names in tar_names.items():
            if not names:
                raise ValueError(f"{folder} has no .tar files")
        known = sorted(set().union(*tar_names.values()))
        for name in self._wanted():
            if name not in known:
                raise ValueError(f"no signal of {self.root} has the shard {name!r}; {closest(name, known)}")
        shards = {folder: set(self.files(folder)) for folder in tar_names}
        for folders in layout.values():
            for one, other in itertools.permutations(folders.values(), 2):
                lacking = sorted(shards[one] - shards[other])
                if lacking and not self.allow_missing:
                    raise ValueError(f"{other} has no {lacking[0]}, which {one} has; add it or set allow_missing=True")
        tars = [folder / name for folder, names in shards.items() for name in sorted(names)]
        new = [tar for tar in tars if not self._index(tar, data_dir).exists()]
        for tar in tqdm(new, desc="indexing", unit="tar", file=sys.stdout, mininterval=1, disable=not new, ascii=True):
            self._members(tar, data_dir)

    def stored(self, signal: str, folder: Path, data_dir: str | os.PathLike) -> Iterator[Stored]:
        for shard in self.files(folder):
            tar = folder / shard
            for name, offset, size in self._members(tar, data_dir):
                yield Stored(signal, os.fspath(tar), name, offset, size)

    def read(self, stored: Stored) -> bytes:
        with open(stored.container, "rb") as file:  # opened anew, so that threads share no position
            file.seek(stored.offset)
            data = file.read(stored.size)
        if len(data) != stored.size:
            raise ValueError(f"{stored.file}: {len(data)} bytes instead of {stored.size}; the tar has changed")
        return data

    def _index(self, tar: Path, data_dir: str | os.PathLike) -> Path:
        status = status_of(tar)
        key = fingerprint([VERSION, os.path.abspath(tar), status.st_size, status.st_mtime_ns])
        return Path(data_dir) / "tar_indexes" / f"{tar.stem[:40]}-{key}.json"

    def _members(self, tar: Path, data_dir: str | os.PathLike) -> list[tuple[str, int, int]]:
        """`members`, from the index if it is whole."""
        index = self._index(tar, data_dir)
        if index.exists():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: it is written again
                return [(name, offset, size) for name, offset, size in read_json(index)["members"]]
        listed = members(tar)
        write_json(index, {"members": listed})
        return listed
