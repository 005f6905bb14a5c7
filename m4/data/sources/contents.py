"""Reads files that others gave: ordinary files alone, since a FIFO would block and /dev/zero never ends, and no more
than memory holds."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from m4.files import shown

MAX_BYTES = 2**32  # of a file that is read whole


def content(file: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of an ordinary file. ValueError "FILE: why it is not read"."""
    size = check_regular(file).st_size
    if size > max_bytes:
        raise ValueError(f"{shown(file)}: it has {size:,} bytes; allowed: at most {max_bytes:,}")
    try:
        return Path(file).read_bytes()
    except (OSError, MemoryError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it does not fit into memory"
        raise ValueError(f"{shown(file)}: cannot be read ({reason})") from error


def check_regular(file: str | os.PathLike) -> os.stat_result:
    """The status (os.stat) of an ordinary file; ValueError for anything else under that path."""
    status = status_of(file)
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise ValueError(f"{shown(file)}: {kinds[kind] if kind in kinds else 'a device'}; allowed: files")
    return status


def status_of(file: str | os.PathLike) -> os.stat_result:
    try:
        return os.stat(file)
    except OSError as error:
        raise ValueError(f"{shown(file)}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL in its name
        raise ValueError(f"{shown(file)}: cannot be read ({error})") from error
