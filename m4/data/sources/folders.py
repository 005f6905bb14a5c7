"""Aligned examples from folders of files, one folder per signal; and the base class of `Tars`, of the same layout.

root/rgb/a/0001.png   root/depth/a/0001.npy   root/caption/a/0001.txt   ->  {"rgb": ..., "depth": ..., "caption": ...}
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m4.data.sources.contents import content
from m4.data.sources.files import EXTENSIONS, OTHER, decode, extension_of, extent, is_tokens, kind_of_name
from m4.errors import check, closest
from m4.files import check_name, shown

SPLITS = ("train", "validation", "test")
JUNK = ("thumbs.db", "desktop.ini", "__macosx")  # left by file managers, as are names with a dot in front
KNOWN = {*OTHER, *(extension for extensions in EXTENSIONS.values() for extension in extensions)}  # of files
RESERVED = ("id", "file")  # entries of an example beside its signals


class Stored(NamedTuple):
    """Where a signal of an example is stored: a file, or a member of a tar whose content is at `offset`."""

    signal: str
    container: str  # folder of the signal, or path of the tar
    name: str  # within the container
    offset: int = 0  # bytes
    size: int = 0

    @property
    def path(self) -> str:
        return f"{self.container}/{self.name}"

    @property
    def file(self) -> str:
        """The path as errors name it."""
        return shown(self.path)

    @property
    def id(self) -> str:
        return os.path.splitext(self.name)[0]


def is_junk(name: str) -> bool:
    """Whether any part of a path is hidden, or a file manager's."""
    return any(part.startswith(".") or part.lower() in JUNK for part in name.split("/"))


def subfolders(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if path.is_dir() and not is_junk(path.name)}


@dataclass(frozen=True, kw_only=True)
class Aligned(abc.ABC):
    """The base of `Folders` and `Tars`: which signals and splits exist, and how files become examples."""

    root: str
    """Folder of the data."""
    signals: tuple[str, ...] = ()
    """Signals to read; () is every folder in `root`."""
    allow_missing: bool = False
    """Examples may lack signals; else a missing one is an error."""
    validation_share: float = 0.05
    """Share of ids in the split validation, by their hash, where there are no folders of splits."""
    test_share: float = 0.05
    """Share of ids in the split test, by their hash."""

    num_crops = 1
    splits = SPLITS

    def __post_init__(self):
        object.__setattr__(self, "root", os.fspath(self.root))
        if isinstance(self.signals, str):
            raise ValueError(f"signals is {self.signals!r}, but must be a tuple of names: ({self.signals!r},)")
        object.__setattr__(self, "signals", tuple(self.signals))
        shares = (self.validation_share, self.test_share)
        if not (min(shares) >= 0 and sum(shares) < 1):
            given = f"validation_share {shares[0]} and test_share {shares[1]}"
            raise ValueError(f"{given} are given; allowed: shares of at least 0 that leave some for train")

    @abc.abstractmethod
    def files(self, folder: Path) -> Iterator[str]:
        """Paths, relative to the folder of a signal, of the files on disk that hold it."""

    @abc.abstractmethod
    def stored(self, signal: str, folder: Path, data_dir: str | os.PathLike) -> Iterator[Stored]:
        """All that the folder of a signal holds, in any order."""

    @abc.abstractmethod
    def read(self, stored: Stored) -> bytes:
        """The bytes of one file."""

    def layout(self, data_dir: str | os.PathLike) -> dict[str, dict[str, Path]]:
        """Folders of the signals by split, or of all splits under "" if ids are split by hash.

        ValueError for a root or signal that does not exist, with the closest name. A data_dir within root is no signal.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise ValueError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}")
        if root.resolve() == Path(data_dir).resolve():
            raise ValueError(
                f"root and data_dir are both {root}; choose another data_dir, for what is made of the data"
            )
        folders = {n: path for n, path in subfolders(root).items() if path.resolve() != Path(data_dir).resolve()}
        splits = {name: subfolders(folder) for name, folder in folders.items() if name in SPLITS} or {"": folders}
        others = sorted(folders.keys() - SPLITS)
        if "" not in splits and others:
            raise ValueError(
                f"{root} has {', '.join(others)} beside the splits {', '.join(sorted(splits))}; keep one or the other"
            )
        known = sorted(set().union(*splits.values()))
        if not known:
            raise ValueError(f"{root} has no folders of signals")
        names = self.signals or known
        for name in names:
            if name not in known:
                raise ValueError(f"{root} has no signal {name!r}; {closest(name, known)}")
            if name in RESERVED:
                raise ValueError(f"{root}: a signal must not be named {name!r}, which every example has")
            check_name(name, f"a signal in {shown(root)}")
        for split, signals in splits.items():
            lacking = [name for name in names if name not in signals]
            if lacking and not self.allow_missing:
                raise ValueError(f"{root / split} lacks {lacking[0]!r}; add it or set allow_missing=True")
        return {split: {n: signals[n] for n in names if n in signals} for split, signals in splits.items()}

    def split(self, name: str, data_dir: str | os.PathLike) -> "AlignedSplit":
        """Examples of one split, sorted by id."""
        layout = self.layout(data_dir)
        check("split", name, SPLITS if "" in layout else sorted(layout))
        return AlignedSplit(source=self, name=name, data_dir=os.fspath(data_dir))

    def split_of(self, id: str) -> str:
        """The split of an example by its id alone, so that other files never move it."""
        digest = hashlib.sha256(id.encode(errors="surrogateescape")).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        if position < self.validation_share:
            return "validation"
        return "test" if position < self.validation_share + self.test_share else "train"

    def signature(self, data_dir: str | os.PathLike) -> str:
        """Returns 12 hex digits that change with the name, size or time of any file of the signals, in any split."""
        digest = hashlib.sha256()
        for split, folders in sorted(self.layout(data_dir).items()):
            for signal, folder in sorted(folders.items()):
                for name in sorted(self.files(folder)):
                    line = f"{split}/{signal}/{name}\0"
                    with contextlib.suppress(OSError):  # a link to nothing: an error of its example, when it is read
                        status = (folder / name).stat()
                        line += f"{status.st_size}\0{status.st_mtime_ns}\n"
                    digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class AlignedSplit:
    """A sequence of raw examples, as `decode` reads them; listed when first read, so that it can be sent to workers.

    Besides its signals an example has `id`, and `file`, one of its files, for errors. Reading one raises ValueError
    "FILE: what is wrong" for a signal that is missing (unless allow_missing) or stored twice, for content that `decode`
    refuses and for images of unequal sizes: signals are never shifted against each other.
    """

    source: Aligned
    """The data set."""
    name: str
    """Name of the split."""
    data_dir: str
    """Folder of prepared data, for the list of examples."""
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)
    """Kinds of signals by name, where their tokenizers say so (m4.data.sources.files.KINDS)."""

    def __getstate__(self):
        return {"source": self.source, "name": self.name, "data_dir": self.data_dir, "kinds": self.kinds}

    def reading(self, kinds: dict[str, str]) -> "AlignedSplit":
        """The same examples, with signals of these kinds."""
        return dataclasses.replace(self, kinds=kinds)

    def kind(self, signal: str) -> str:
        return self.kinds[signal] if signal in self.kinds else kind_of_name(signal)

    @functools.cached_property
    def _listed(self) -> tuple[list[tuple[str, list[Stored]]], dict[str, tuple[Stored, Stored]]]:
        """Ids with the files of each, in order; and the result of `_find_halves`."""
        layout = self.source.layout(self.data_dir)
        is_hashed = "" in layout
        grouped: dict[str, list[Stored]] = {}
        for signal, folder in layout["" if is_hashed else self.name].items():
            for stored in self.source.stored(signal, folder, self.data_dir):
                grouped.setdefault(stored.id, []).append(stored)
        items = (item for item in grouped.items() if not is_hashed or self.source.split_of(item[0]) == self.name)
        return sorted(items), self._find_halves(grouped)

    @property
    def _examples(self) -> list[tuple[str, list[Stored]]]:
        return self._listed[0]

    def _find_halves(self, grouped: dict[str, list[Stored]]) -> dict[str, tuple[Stored, Stored]]:
        """Examples that lack signals which another one has whose id differs in Unicode's normal form or in case alone:
        by id, a file of each. Mac OS writes names in another form than others do; both look the same."""
        signals = set(self._signals)
        similar: dict[str, list[str]] = {}
        for id, files in grouped.items():
            if not signals <= {stored.signal for stored in files}:
                similar.setdefault(_normal(_normal(id).casefold()), []).append(id)
        halves = {}
        for ids in similar.values():
            for one, other in itertools.permutations(ids, 2) if len(ids) > 1 else ():
                if not {f.signal for f in grouped[one]} & {f.signal for f in grouped[other]}:
                    halves.setdefault(one, (grouped[one][0], grouped[other][0]))
        return halves

    @functools.cached_property
    def _signals(self) -> tuple[str, ...]:
        """Names that an example must have."""
        return tuple(dict.fromkeys(name for folders in self.source.layout(self.data_dir).values() for name in folders))

    def __len__(self) -> int:
        return len(self._examples) * self.source.num_crops

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"example {index} of {count} ({self.name} of {self.source.root})")
        example, crop = divmod(int(index) % count, self.source.num_crops)
        id, files = self._examples[example]
        by_signal: dict[str, Stored] = {}
        for stored in files:
            if stored.signal in by_signal:
                other = by_signal[stored.signal].file
                raise ValueError(f"{stored.file}: the {stored.signal} of {shown(id)!r} is there twice, also as {other}")
            by_signal[stored.signal] = stored
        if id in self._listed[1]:
            one, other = self._listed[1][id]
            raise ValueError(
                f"{one.file}: the {one.signal} of {ascii(id)} and {other.file}, the {other.signal} of "
                f"{ascii(other.id)}, have names that differ in {_difference(id, other.id)} alone; rename one"
            )
        missing = [signal for signal in self._signals if signal not in by_signal]
        if missing and not self.source.allow_missing:
            raise ValueError(
                f"{files[0].file}: {shown(id)!r} has no {', '.join(missing)}; add it or set allow_missing=True"
            )
        values = {signal: self._value(stored, crop) for signal, stored in by_signal.items()}
        extents = {s: extent(s, by_signal[s].file, value, self.kind(s)) for s, value in values.items()}
        extents = {signal: size for signal, size in extents.items() if size is not None}
        if len(set(extents.values())) > 1:
            sizes = ", ".join(f"{signal} {height} x {width}" for signal, (height, width) in extents.items())
            raise ValueError(f"{files[0].file}: pictures of {shown(id)!r} have unequal sizes (height x width): {sizes}")
        return {**values, "file": files[0].file, "id": shown(id)}

    def _value(self, stored: Stored, crop: int) -> Any:
        try:
            data = self.source.read(stored)
        except (OSError, MemoryError) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it does not fit into memory"
            raise ValueError(f"{stored.file}: cannot be read ({reason})") from error
        kind = self.kind(stored.signal)
        value = decode(stored.signal, stored.file, data, kind)
        num_crops = self.source.num_crops
        if num_crops == 1 or isinstance(value, str):
            return value
        if not is_tokens(stored.signal, stored.file, value, kind):
            raise ValueError(f"{stored.file}: num_crops is {num_crops}, and this is neither tokens nor words")
        if value.ndim != 2 or len(value) != num_crops:
            given = f"tokens of {list(value.shape)}, but num_crops is {num_crops}"
            raise ValueError(f"{stored.file}: {given}; allowed: [{num_crops}, num_tokens]")
        return value[crop]


@dataclass(frozen=True, kw_only=True)
class Folders(Aligned):
    """Files aligned by their path without extension, which is the example's id.

        root/<signal>/<subfolders>/<name>.<ext>             split by a hash of the id
        root/<split>/<signal>/<subfolders>/<name>.<ext>     splits train, validation, test as given

    `m4.data.sources.files.decode` describes what files may hold. Hidden files and those of file managers are left out.
    """

    def files(self, folder: Path) -> Iterator[str]:
        for top, within, names in os.walk(folder, onerror=_refuse, followlinks=True):
            within[:] = [name for name in within if not is_junk(name)]
            for path in (os.path.join(top, name) for name in within):
                if os.path.islink(path) and Path(top).resolve().is_relative_to(Path(path).resolve()):
                    raise ValueError(f"{shown(path)} is a link to a folder that it is in")
            below = Path(top).relative_to(folder).as_posix()
            empty = (n for n in within if extension_of(n) in KNOWN and not os.listdir(os.path.join(top, n)))
            for name in (*names, *empty):  # a folder in a file's place is an error when its example is read
                if not is_junk(name):
                    yield name if below == "." else f"{below}/{name}"

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Checks that every signal has files (ValueError otherwise); writes nothing."""
        for folders in self.layout(data_dir).values():
            for folder in folders.values():
                if next(self.files(folder), None) is None:
                    raise ValueError(f"{folder} has no files")

    def stored(self, signal: str, folder: Path, data_dir: str | os.PathLike) -> Iterator[Stored]:
        container = os.fspath(folder)
        return (Stored(signal, container, name) for name in self.files(folder))

    def read(self, stored: Stored) -> bytes:
        return content(stored.path)


def _difference(id: str, other: str) -> str:
    return "Unicode's normal form" if _normal(id) == _normal(other) else "upper and lower case"


def _normal(id: str) -> str:
    """The one form of all ways to write the same characters, whatever the system thinks that names are encoded in."""
    return unicodedata.normalize("NFC", id.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape"))


def _refuse(error: OSError) -> None:
    """Raises for a folder that os.walk would skip silently."""
    raise ValueError(f"{shown(error.filename)} cannot be listed ({error.strerror})")
