"""Processes of several hosts that share the preparation, and see the same files: who they are, how they wait."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from m4.files import write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class Team:
    """Who shares the work: this process is number `index` of `count` (hosts that see the same files).

    `workers` processes are started here.
    """

    index: int = 0
    count: int = 1
    workers: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count or self.workers < 1:
            raise ValueError(f"process {self.index} of {self.count} with {self.workers} workers: that is no team")


class Others:
    """The team's other processes: waits for what they write, and raises if one of them failed meanwhile."""

    def __init__(self, data_dir: Path, team: Team):
        self.data_dir, self.team = data_dir, team

    def _note(self, index: int) -> Path:
        return self.data_dir / f".process-{index}-of-{self.team.count}"

    def __enter__(self) -> Others:
        if self.team.count > 1:
            write_atomically(self._note(self.team.index), b"")
            self.began = self._note(self.team.index).stat().st_mtime
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.team.count > 1:
            if error is None:
                self._note(self.team.index).unlink(missing_ok=True)
            else:
                write_atomically(self._note(self.team.index), f"{kind.__name__}: {error}".encode())

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Until `done()`; says each minute what it waits for. ValueError if another process failed since the start."""
        start, said = time.monotonic(), 0
        while not done():
            for index in {*range(self.team.count)} - {self.team.index}:
                with contextlib.suppress(FileNotFoundError):
                    note = self._note(index)
                    if note.stat().st_mtime >= self.began and (message := note.read_text()):
                        raise ValueError(f"process {index} of {self.team.count} failed with {message}")
            if time.monotonic() - start >= 60 * said:
                print(f"process {self.team.index} of {self.team.count} waits for {what}", flush=True)
                said += 1
            time.sleep(0.5)
