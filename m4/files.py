"""Files that m4 writes and reads: whole or not at all, on disk before they are named, with a digest of their content.

    replacing, write_atomically    one file: the old one or the whole new one, whatever happens
    replacing_together             several files of a folder that belong together, e.g. an exported model
    replacing_folder               a whole folder, e.g. all files of one generated sample
    write_json, read_json          JSON of m4's own, with a SHA-256 of its content under "sha256"
    parse_json, decode_text        users' files: strict, with errors that say what is wrong
    locked                         a folder that one process may use at a time

Digests find damage (a flipped bit, a truncated file, a swapped name), not forgery.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows: no temporaries are removed as leftovers, and nothing is locked
    fcntl = None

DIGESTS = "digests.json"
FORMAT = 2  # of JSON with a digest, under "m4", so that damage to the digest's key is noticed too
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{12}|\d{1,10})\.tmp")  # the latter: versions before 0.2
SURROGATE = re.compile("[\ud800-\udfff]")

# Characters that names from files may not have: they become paths, rows of tables and keys of JSON.
UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|\ud800-\udfff]|^\.|^~|^ | $|^$')
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


# ---- Names ----------------------------------------------------------------------------------------------------------


def shown(name: str | os.PathLike) -> str:
    """A name that can be printed, and written in one field of a table, with control characters and bytes that are not
    UTF-8 escaped."""
    text = os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if unicodedata.category(c)[0] != "C" else repr(c)[1:-1] for c in text)


def check_name(name: Any, what: str) -> None:
    """ValueError unless a name (of a signal, modality, tokenizer or sample) from a file is safe as part of a path."""
    if not isinstance(name, str) or UNSAFE.search(name) or RESERVED.fullmatch(name) or len(name.encode()) > 200:
        allowed = "letters, digits and such signs as _ - . @ + between them, 200 bytes at most"
        raise ValueError(f"{what} has the name {ascii(name)[:80]}, which is not safe in a path; allowed: {allowed}")


# ---- One file -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, of this writer alone, which replaces it if the block succeeds.

    The content is on disk before it has the name, and the name is on disk before this returns. The temporary is locked
    while its writer lives, so that `remove_leftovers` removes those of dead writers only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _temporary(path)
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds this path to an OSError that names no file, as those of writing to an open one (a full disk)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file; readers see the old one or the whole new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(folder: Path) -> list[Path]:
    """Deletes and returns the temporaries of `replacing` in a folder whose writers were killed."""
    removed = []
    if fcntl is None or not folder.is_dir():
        return removed
    for path in folder.iterdir():
        if not TEMPORARY.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # locked: its writer lives
            file = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
            finally:
                os.close(file)
    return removed


def _temporary(path: Path, *, is_folder: bool = False) -> tuple[Path, int]:
    """A new file (or folder) beside `path`, and a descriptor that locks it as long as it is open."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        if is_folder:
            temporary.mkdir()
            lock = os.open(temporary, os.O_RDONLY)
        else:
            lock = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # `remove_leftovers` of another process holds it: try another name
            os.close(lock)
            continue
        except OSError:  # a file system without locks
            pass
        if temporary.exists():
            return temporary, lock
        os.close(lock)


def sync(path: Path) -> None:
    """Flushes the content of a file, or the names in a folder, to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(file)
    except OSError:
        if not path.is_dir():  # some file systems do not sync folders
            raise
    finally:
        os.close(file)


# ---- Digests --------------------------------------------------------------------------------------------------------


def fingerprint(value: Any) -> str:
    """12 hex digits of the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path, names: list[str]) -> None:
    """Writes digests.json: size and SHA-256 of these files of a folder (paths within it)."""
    files = {n: {"size": (folder / n).stat().st_size, "sha256": digest(folder / n)} for n in sorted(names)}
    write_json(folder / DIGESTS, {"files": files})


def check_digests(folder: Path, names: list[str] | None = None) -> bool:
    """Whether a folder has digests.json; ValueError names a file that is missing or has changed.

    `names`: the files that are about to be read (default: all that are listed); each must be listed.
    """
    if not (folder / DIGESTS).exists():
        return False  # written before version 0.2
    files = read_json(folder / DIGESTS)["files"]
    for name in files if names is None else names:
        if name not in files:
            raise ValueError(f"{folder / name} is not in {folder / DIGESTS}: it was not written with the other files")
        expected, file = files[name], folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, which {folder / DIGESTS} lists")
        if file.stat().st_size != expected["size"]:
            raise ValueError(f"{file} is damaged: {file.stat().st_size} bytes, {expected['size']} were written")
        if digest(file) != expected["sha256"]:
            raise ValueError(f"{file} is damaged: its SHA-256 is not that of what was written")
    return True


@contextlib.contextmanager
def replacing_together(folder: str | os.PathLike, *, with_digests: bool = True) -> Iterator[Path]:
    """A temporary folder whose files replace those of `folder` together, with their digests; other files stay.

    If killed before the new digests are written, the old files are whole; if killed later, `check_digests` names a file
    of the other set. So readers get the old set or the new one, never a mixture. Without digests each file is whole,
    but a mixture goes unnoticed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary, lock = _temporary(folder / "new", is_folder=True)
    try:
        yield temporary
        names = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
        if with_digests:
            write_digests(temporary, names)
        for name in names:
            sync(temporary / name)
        # Digests first: from here on, any file that is still an old one is an error.
        for name in (*([DIGESTS] if with_digests else []), *names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, folder / name)
            sync((folder / name).parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path`, which replaces it if the block succeeds; the old folder is deleted.

    If killed at any time, `path` is the old folder, the whole new one, or missing, but never a mixture.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _temporary(path, is_folder=True)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            sync(file)
        if os.path.lexists(path):
            old, old_lock = _temporary(path, is_folder=True)
            try:
                os.replace(path, old / "old")
                try:
                    os.replace(temporary, path)
                except BaseException:
                    os.replace(old / "old", path)
                    raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
                os.close(old_lock)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


# ---- JSON and text --------------------------------------------------------------------------------------------------


def decode_text(data: bytes) -> str:
    """UTF-8 without its byte-order mark. ValueError for other encodings, also those that only a NUL shows."""
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        wide = " Is it UTF-16? Save it as UTF-8." if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(
            f"not UTF-8: byte {error.start} is 0x{data[error.start]:02x} ({error.reason}).{wide}"
        ) from error
    if "\0" in text:
        raise ValueError(f"not a text: character {text.index(chr(0))} is NUL. Is it UTF-16? Save it as UTF-8.")
    return text


def parse_json(data: bytes | str) -> Any:
    """A JSON value. ValueError for invalid JSON, repeated keys, numbers that are not finite, half surrogate pairs,
    and nesting that is too deep for Python."""
    try:
        text = decode_text(data) if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
        check_strings(value)
        return value
    except RecursionError as error:
        raise ValueError("not JSON that can be read: it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def write_json(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """A JSON object with the SHA-256 of its content, atomically; `read_json` returns the object.

    The keys "m4" and "sha256" are reserved.
    """
    value = {**value, "m4": FORMAT}
    text = json.dumps({**value, "sha256": _json_digest(value)}, indent=1)
    write_atomically(path, text.encode())


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a file of `write_json`, or of a version before 0.2, without digest. ValueError names the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read: {error.strerror}") from error
    try:
        value = json.loads(decode_text(data), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"{shown(path)}: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{shown(path)} is damaged, it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{shown(path)} is damaged: a JSON object is expected, not {type(value).__name__}")
    expected = value.pop("sha256", None)
    if (expected is not None or "m4" in value) and expected != _json_digest(value):
        raise ValueError(f"{shown(path)} is damaged or was edited: its SHA-256 is not {str(expected)[:64]}")
    value.pop("m4", None)
    return value


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {ascii(twice)} is there twice in one object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:40]} is beyond what a float can hold")
    return value


def check_strings(value: Any) -> None:
    """ValueError for a text (also within JSON) that no UTF-8 can hold: JSON can escape half of a surrogate pair."""
    if isinstance(value, str):
        if not value.isascii() and SURROGATE.search(value):
            raise ValueError(f"the text {ascii(value)[:60]} has half a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_strings(key)
            check_strings(item)
    elif isinstance(value, list):
        for item in value:
            check_strings(item)


# ---- Locks ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: str | os.PathLike, what: str, *, wait: bool = False) -> Iterator[bool]:
    """Locks the file `path` for this process during the block. ValueError names the holder; with `wait`, a line in the
    log names it each minute until the lock is free.

    The system releases it when its holder dies, however that happens. Yields False where file systems have no locks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    start, num_lines = time.monotonic(), 0
    try:
        while (is_mine := _lock(file)) is None:
            holder = shown(os.pread(file, 200, 0).decode("utf-8", "replace") or "another process")
            if not wait:
                raise ValueError(f"{what} is in use by {holder}; wait for it, stop it, or choose another folder")
            if time.monotonic() - start >= 60 * num_lines:
                logger.info(shown(f"waiting for {holder}, which is at {what}"))
                num_lines += 1
            time.sleep(0.2)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield is_mine
    finally:
        os.close(file)


def _lock(file: int) -> bool | None:
    """Locks an open file for this process: None if another holds it, False where locks are not supported."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return bool(fcntl)
    except BlockingIOError:
        return None
    except OSError:  # a file system without locks
        return False
