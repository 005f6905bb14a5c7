"""Text without images, to train on beside them: one document a line, plain or JSON, read in place.

    files --prepare, once--> an index: one row of int64 a document --Texts.split--> one line read at a time

An example needs its own line alone in memory; a split needs 8 bytes a document.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from m4.errors import check, closest
from m4.files import digest, fingerprint, read_json, replacing, shown, write_json

VERSION = 2  # of the index: raise it whenever the same files give another
SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl")
FILE, LINE, START, LENGTH, DRAW = range(5)  # columns: file's index, line (from 1), bytes, hash of the text
DRAWS = 2**62
BOM = b"\xef\xbb\xbf"
OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
HEAD = 4096  # first bytes of a file, in which a NUL shows another encoding
CHUNK = 2**20  # bytes read at once


def parse(data: bytes, where: str, field: str | None) -> str:
    """The document in a line; with a `field`, the line is a JSON object that holds it.

    ValueError "where: what is wrong" for one that is not UTF-8, not such an object, or empty.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start + 1} of the line ({error.reason})") from error
    if "\0" in text:
        raise ValueError(f"{where}: not a text: character {text.index(chr(0)) + 1} of the line is NUL")
    if field is not None:

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if [key for key, _ in pairs].count(field) > 1:
                raise ValueError(f"the key {field!r} is there twice in one object")
            return dict(pairs)

        try:
            record = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a line must hold a JSON object, but this one is a {type(record).__name__}")
        if field not in record:
            raise ValueError(f"{where}: no key {field!r}; {closest(field, list(record))}")
        text = record[field]
        if not isinstance(text, str):
            raise ValueError(f"{where}: {field!r} has type {type(text).__name__}, but must be a string")
        if any("\ud800" <= c <= "\udfff" for c in text):  # JSON can escape what no text can hold
            raise ValueError(f"{where}: {field!r} has half a surrogate pair")
    text = text.strip()
    if not text:
        raise ValueError(f"{where}: the text is empty")
    return text


def lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Where each line of a file begins, in bytes, and the line. Lines end in LF, CR LF or, as on old Macs, in CR alone.

    ValueError names a file that is UTF-16 or UTF-32, by its mark or by NULs in its head, and one whose lines end now
    in CR, now in LF.
    """
    num_cr, num_lf, is_cr = 0, 0, False  # a CR before an LF does not count
    with open(path, "rb") as file:
        head = file.read(HEAD)
        for mark, encoding in OTHER_MARKS.items():
            if head.startswith(mark):
                raise ValueError(f"{shown(path)} is {encoding}, by its first bytes; save it as UTF-8")
        if b"\0" in head:
            raise ValueError(f"{shown(path)} is not UTF-8: byte {head.index(0)} is NUL. Is it UTF-16? Save it as UTF-8")
        file.seek(0)
        while data := file.read(CHUNK):
            num_cr += data.count(b"\r") - data.count(b"\r\n") - (is_cr and data.startswith(b"\n"))
            num_lf += data.count(b"\n")
            is_cr = data.endswith(b"\r")
        file.seek(0)
        if num_cr > num_lf > 0:
            raise ValueError(
                f"{shown(path)} has {num_cr} lines that end in CR, as on old Macs, and {num_lf} that end in LF; "
                "give all the same end"
            )
        start = 0
        for line in _until_cr(file) if num_cr and not num_lf else file:
            yield start, line
            start += len(line)


def _until_cr(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while data := file.read(CHUNK):
        *whole, rest = (rest + data).split(b"\r")
        yield from (line + b"\r" for line in whole)
    if rest:
        yield rest


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents of .txt files (one a line) and .jsonl files (one JSON object a line). UTF-8; empty lines are skipped.

    The hash of a whole document, not its line number, decides its split: duplicates are never in two splits, and none
    moves when files grow, are sorted or are concatenated. An unreadable line is hashed unchanged, and raises when read.
    """

    files: tuple[str, ...]
    """Paths, or patterns such as "corpus/*.jsonl"; files count in the order given, those of a pattern by name."""
    signal: str = "caption"
    """Name of the texts' signal."""
    field: str = "text"
    """Key of a JSON object that holds the text."""
    validation_share: float = 0.01
    """Share of documents in the split validation."""
    test_share: float = 0.01
    """Share of documents in the split test."""
    max_chars: int = 2000
    """Characters to which longer documents are truncated."""

    splits = SPLITS

    def __post_init__(self):
        if isinstance(self.files, str) or not self.files:
            raise ValueError(f"files is {self.files!r}, but must be one or more paths, as ('corpus/*.txt',)")
        if not (self.validation_share >= 0 and self.test_share >= 0 and self.validation_share + self.test_share < 1):
            given = f"validation_share {self.validation_share} and test_share {self.test_share}"
            raise ValueError(f"{given} are given, but must not be negative, and leave a share for training")
        if self.signal == "file":
            raise ValueError("signal must not be 'file', which tells where a text stands")
        if self.max_chars < 1:
            raise ValueError(f"max_chars is {self.max_chars}, but must be at least 1")

    def paths(self) -> list[str]:
        """All files, none twice; ValueError for one that is missing, empty or of another kind."""
        paths = {}
        for given in self.files:
            matches = [given] if os.path.isfile(given) else sorted(glob.glob(given, recursive=True))
            if not matches:
                nearby = [str(path) for path in Path(given).parent.glob("*")]
                match = difflib.get_close_matches(given, nearby, n=1)
                raise ValueError(f"no file {given}" + (f". Did you mean {match[0]!r}?" if match else ""))
            paths |= dict.fromkeys(matches)
        for path in paths:
            if not os.path.isfile(path):
                raise ValueError(f"{shown(path)} is not a file")
            if Path(path).suffix not in SUFFIXES:
                raise ValueError(
                    f"{shown(path)} has the ending {Path(path).suffix!r}; {closest(Path(path).suffix, SUFFIXES)}"
                )
            if not os.path.getsize(path):
                raise ValueError(f"{shown(path)}:1: the file is empty")
        return list(paths)

    def signature(self, data_dir: str | os.PathLike) -> str:
        """12 hex digits over the path, size and time of every file."""
        stats = [(path, os.stat(path)) for path in self.paths()]
        return fingerprint([[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats])

    def index(self, data_dir: str | os.PathLike) -> Path:
        """File of the index: edited files, and another `field`, have another."""
        key = fingerprint([VERSION, self.signature(data_dir), self.field])
        return Path(data_dir) / "texts" / f"{key}.int64"

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Writes the index unless it is there, whole: under a temporary name, then renamed."""
        index = self.index(data_dir)
        with contextlib.suppress(ValueError):  # missing or damaged
            _check_index(index)
            return
        with replacing(index) as temporary:
            with open(temporary, "wb") as out:
                for row in self._rows():
                    out.write(struct.pack("=5q", *row))
            write_json(_digest_of(index), {"size": temporary.stat().st_size, "content": digest(temporary)})

    def _rows(self) -> Iterator[tuple[int, ...]]:
        for number, path in enumerate(self.paths()):
            line, empty = 0, True
            for line, (start, data) in enumerate(lines(path), start=1):
                skipped = len(BOM) if line == 1 and data.startswith(BOM) else 0
                text = data[skipped:].strip()
                if text:
                    empty = False
                    try:
                        hashed = parse(text, "", self.field if path.endswith(".jsonl") else None).encode()
                    except ValueError:
                        hashed = text
                    draw = int.from_bytes(hashlib.sha256(hashed).digest()[:8]) % DRAWS
                    yield number, line, start + skipped, len(data) - skipped, draw
            if empty:
                raise ValueError(f"{shown(path)}:{line}: the file has no line with text")

    def split(self, name: str, data_dir: str | os.PathLike) -> "TextSplit":
        check("split", name, SPLITS)
        return TextSplit(texts=self, name=name, paths=tuple(self.paths()), index=self.index(data_dir))


def _digest_of(index: Path) -> Path:
    return index.with_suffix(".json")


def _check_index(index: Path) -> None:
    """ValueError unless an index exists with the content that was written."""
    if not index.exists() or not _digest_of(index).exists():
        raise ValueError(f"no index {shown(index)}; call Texts.prepare with the same fields and data_dir first")
    expected = read_json(_digest_of(index))
    if index.stat().st_size != expected["size"] or digest(index) != expected["content"]:
        raise ValueError(f"{shown(index)} is damaged; call Texts.prepare again")


@dataclass(frozen=True, kw_only=True)
class TextSplit:
    """A sequence of {signal: str, "file": "path:line"}; lines are read on access."""

    texts: Texts
    name: str
    paths: tuple[str, ...]
    index: Path

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("texts", "name", "paths", "index")}

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """int64 [documents 5], not in memory."""
        _check_index(self.index)
        return np.memmap(self.index, np.int64, "r").reshape(-1, 5)

    @functools.cached_property
    def _documents(self) -> np.ndarray:
        """int64 [documents of this split]: their rows in the table."""
        test, validation = self.texts.test_share, self.texts.validation_share
        bounds = {"test": (0, test), "validation": (test, test + validation), "train": (test + validation, 1)}
        low, high = (int(bound * DRAWS) for bound in bounds[self.name])
        draws = self._table[:, DRAW]
        return np.flatnonzero((low <= draws) & (draws < high))

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, str]:
        """ValueError "path:line: what is wrong" for a document that cannot be read."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"text {index} of {count} ({self.name})")
        row = self._table[self._documents[index]].tolist()
        path = self.paths[row[FILE]]
        with open(path, "rb") as file:  # anew for each, since there may be more files than a process may hold open
            file.seek(row[START])
            data = file.read(row[LENGTH])
        where = f"{shown(path)}:{row[LINE]}"
        text = parse(data.strip(), where, self.texts.field if path.endswith(".jsonl") else None)
        return {self.texts.signal: text[: self.texts.max_chars].rstrip(), "file": where}
