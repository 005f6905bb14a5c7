"""What commands print, and how they end: errors that users can fix are one sentence on stderr, never a traceback."""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import logging
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

LOGGERS = ("m4", "m4_tokenizers")
MAX_NOTICES = 5  # of one kind
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def parser_of(verb: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m m4 VERB`; the description keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"python -m m4 {verb}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


class Output(logging.Handler):
    """Writes the library's log records as bare lines: information to stdout, warnings and errors to stderr, unbuffered.

    Characters that the stream cannot show are escaped. A closed pipe raises BrokenPipeError, as `print` does.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        encoding = stream.encoding or "utf-8"
        print(self.format(record).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def log_to_output() -> None:
    """Prints the logs of m4 and m4_tokenizers as lines of this process's output. Programs that import m4 do not call
    this: they configure `logging` themselves."""
    if logs_to_output():
        return
    output = Output()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(output)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def logs_to_output() -> bool:
    """Whether `log_to_output` was called in this process: its workers should do the same."""
    return any(isinstance(handler, Output) for handler in logging.getLogger(LOGGERS[0]).handlers)


@contextlib.contextmanager
def ends_with_a_sentence() -> Iterator[None]:
    """Runs a command within. ValueError and OSError: `error: ...`, exit code 1. Ctrl-C: a line, 130. A closed reader of
    the output (`| head`): nothing, 1."""
    _single_precision()
    log_to_output()
    try:
        with _plain_notices():
            yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError as error:
        if not _output_is_closed():
            _end(f"error: {error_sentence(error)}", 1)
        sys.exit(1)
    except (ValueError, OSError) as error:
        _end(f"error: {error_sentence(error)}", 1)
    except MemoryError as error:
        _end(f"error: out of memory. {error}".strip(), 1)
    except Exception as error:
        if (cause := system_error(error)) is None:
            raise
        _end(f"error: {error_sentence(cause)}", 1)


def system_error(error: BaseException, path: str = "") -> OSError | None:
    """The OSError of a full disk behind an error of another library (of shards or checkpoints), else None. `path`: the
    file that was written, where the text does not name it."""
    if isinstance(error, OSError):
        return error
    for code in FULL:
        if os.strerror(code) in str(error):
            named = re.search(r"writing ([^;]+);", str(error))
            return OSError(code, os.strerror(code), path or (named[1] if named else None))
    return None


@contextlib.contextmanager
def _plain_notices() -> Iterator[None]:
    """Prints notices (UserWarning) as lines without the place in the code: the first `MAX_NOTICES` of each kind, then
    the number of all others."""
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    before = warnings.formatwarning

    def line(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        if not issubclass(category, UserWarning):
            return before(message, category, filename, lineno, line)
        counts[filename, lineno] += 1
        return f"notice: {message}\n" if counts[filename, lineno] <= MAX_NOTICES else ""

    warnings.formatwarning = line  # ty: ignore[invalid-assignment]  the documented way to change the format
    try:
        yield
    finally:
        warnings.formatwarning = before
        if more := sum(max(0, count - MAX_NOTICES) for count in counts.values()):
            print(f"{more} more notice(s) like these", file=sys.stderr, flush=True)


@contextlib.contextmanager
def finishing(*closers: Callable[[], None], kept: Callable[[], str]) -> Iterator[None]:
    """Calls all `closers` at the end, in this order, whatever happens. After an error, those of closers and the text of
    `kept` are only printed, so that the first error is raised."""
    try:
        yield
    except BaseException:
        for close in (*closers, lambda: print(kept(), file=sys.stderr, flush=True)):
            try:
                close()
            except Exception as error:  # of any kind: the first error is the one to report
                print(f"then: {error_sentence(error)}", file=sys.stderr, flush=True)
        raise
    for close in closers:
        close()


def error_sentence(error: BaseException) -> str:
    """The text of an error; an OSError's begins with the file: "runs/a/metrics.jsonl: No space left on device"."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    names = " -> ".join(os.fsdecode(x) for x in (error.filename, error.filename2) if isinstance(x, str | bytes))
    advice = "; make room and give the same command again" if error.errno in FULL else ""
    return f"{names}: {error.strerror}{advice}" if names else f"{error.strerror}{advice}"


def _single_precision() -> None:
    """Disables JAX_ENABLE_X64: commands and their worker processes compute in float32 and bfloat16."""
    if os.environ.pop("JAX_ENABLE_X64", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        print("JAX_ENABLE_X64 is ignored: m4 computes in float32 and bfloat16", file=sys.stderr, flush=True)
        if "jax" in sys.modules:  # it has read the variable by now
            sys.modules["jax"].config.update("jax_enable_x64", False)


def _end(message: str, code: int) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _output_is_closed() -> bool:
    """Whether nobody reads the output any more; if so, the rest of it is discarded silently."""
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
        poll.register(output, 0)  # errors are always reported
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            return False
    except (AttributeError, OSError, ValueError):  # no poll on this system, no file
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
