"""Processes of several hosts that share the preparation, and see the same files: who they are, how they wait."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from m4.files import fingerprint, shown

logger = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows: processes cannot see whether another one lives
    fcntl = None


# Variables that the processes of one job share, and other jobs on the same data do not.
JOB = ("JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID", "MEGASCALE_COORDINATOR_ADDRESS")
GRACE = 5  # seconds after which a process that has not started is reported
PATIENCE = 300.0  # seconds until a job whose processes do not all start is given up
NAMING = 30.0  # seconds until the name of a host must resolve
GREETING = "m4-roll-call"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """The processes that share the work of preparation, and see the same files."""

    index: int = 0
    """This process, from 0."""
    count: int = 1
    """Processes in all."""
    workers: int = 1
    """Worker processes that this one starts."""

    def __post_init__(self):
        if not 0 <= self.index < self.count or self.workers < 1:
            raise ValueError(f"process {self.index} of {self.count} with {self.workers} workers: that is no team")


class FileBarrier:
    """The team's other processes: waits for what they write, and raises if one of them failed or died meanwhile.

    Each process has a note in data_dir, which it locks while it lives (so no clocks are compared), and into which it
    writes why it failed:

        locked                 it works
        not there              it has not started, or is done
        unlocked, a message    it failed: since this process started, or in an earlier run if it was there before
        unlocked, empty        it died without a message, if it was seen alive
    """

    def __init__(self, data_dir: Path, team: WorkerGroup):
        self.data_dir, self.team = data_dir, team
        self.indices = sorted({*range(team.count)} - {team.index})
        self.lives: set[int] = set()  # those that were seen alive
        self.old: dict[int, str] = {}  # messages of earlier runs

    def _note(self, index: int) -> Path:
        job = [os.environ[name] for name in JOB if os.environ.get(name)]
        suffix = f"-{fingerprint(job)}" if job else ""
        return self.data_dir / f".process-{index}-of-{self.team.count}{suffix}"

    def __enter__(self) -> FileBarrier:
        if self.team.count > 1:
            self.old = {i: message for i in self.indices if (message := self._message(i))}
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._note(self.team.index), os.O_CREAT | os.O_RDWR, 0o666)
            for _ in range(40):  # others check by locking it for a moment
                with contextlib.suppress(OSError):
                    if fcntl:
                        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.05)
            os.ftruncate(self._file, 0)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.team.count > 1:
            if error is None:
                self._note(self.team.index).unlink(missing_ok=True)
            else:  # with the time, so that the same failure in another run differs
                os.pwrite(self._file, shown(f"{kind.__name__}: {error}\0{time.time_ns()}").encode(), 0)
            os.close(self._file)

    def _message(self, index: int) -> str:
        with contextlib.suppress(OSError):
            return self._note(index).read_text(errors="replace")
        return ""

    def _is_locked(self, index: int) -> bool:
        """Whether a process holds its note, and so lives. False also where file systems have no locks."""
        with contextlib.suppress(OSError):
            file = os.open(self._note(index), os.O_RDONLY)
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(file)
        return False

    def _check(self, index: int) -> None:
        """ValueError if a process failed or died since this one started."""
        if self._is_locked(index):
            self.lives.add(index)
            return
        message = self._message(index)
        if message and message != (self.old[index] if index in self.old else ""):
            failure = message.rpartition("\\x00")[0]
            raise ValueError(f"process {index} of {self.team.count} failed with {failure}")
        if index in self.lives and not message and self._note(index).exists() and not self._is_locked(index):
            raise ValueError(f"process {index} of {self.team.count} died without a word; start all processes again")

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Waits until `done()`. Logs for what, and after GRACE, then each minute, which processes have not started."""
        start, times = time.monotonic(), [0, GRACE]
        while not done():
            for index in self.indices:
                self._check(index)
            passed = time.monotonic() - start
            if passed >= times[0]:
                text = f"process {self.team.index} of {self.team.count} waits for {what}"
                missing = [i for i in self.indices if i not in self.lives and not self._is_locked(i)]
                if missing and passed >= GRACE:
                    named = ", ".join(
                        f"{i} (its last run failed with {self._old(i)})" if i in self.old else str(i) for i in missing
                    )
                    text += f"; not started, or not on these files: process {named}"
                logger.info(shown(text))
                times = [*times[1:], passed + 60]
            time.sleep(0.5)

    def _old(self, index: int) -> str:
        return self.old[index].rpartition("\\x00")[0]


# ---- Before there is any connection ----------------------------------------------------------------------------------


def roll_call(address: str, count: int, index: int, *, patience: float = PATIENCE) -> None:
    """Returns when all processes of a job have started: 1, 2, ... report to process 0 at `address`, host:port.

    JAX itself waits silently, and kills the process if one does not start. ValueError for an invalid address, and
    after `patience` seconds.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is {address!r}; allowed: HOST:PORT of process 0, as node0:1234")
    host = host.strip("[]")  # of IPv6
    if count == 1:
        return
    _wait_for_name(host, min(patience, NAMING))
    waiting = _Waiting(index, count, patience)
    if index == 0:
        _collect_reports(int(port), count, waiting)
    else:
        _report((host, int(port)), index, waiting)


@contextlib.contextmanager
def logging_wait(text: str) -> Iterator[None]:
    """Logs `text` after GRACE seconds, then each minute, until the block ends."""
    done = threading.Event()

    def log_repeatedly():
        pause = GRACE
        while not done.wait(pause):
            logger.info(shown(text))
            pause = 60

    thread = threading.Thread(target=log_repeatedly, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _wait_for_name(host: str, patience: float) -> None:
    """Waits until the name of a host resolves, which may take a while where all hosts start at once; else raises."""
    start, is_logged = time.monotonic(), False
    while True:
        try:
            socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return
        except OSError as error:
            text = f"the host {host!r} of JAX_COORDINATOR_ADDRESS is not known ({error.strerror})"
            if time.monotonic() - start > patience:
                raise ValueError(text) from error
            if not is_logged:
                logger.info(shown(f"{text}; waiting for {patience:.0f} seconds"))
            is_logged = True
            time.sleep(1)


class _Waiting:
    """Logs after GRACE seconds, then each minute, which processes are missing; ValueError after `patience` seconds."""

    def __init__(self, index: int, count: int, patience: float):
        self.who, self.patience = f"process {index} of {count}", patience
        self.start, self.next = time.monotonic(), GRACE

    def check(self, missing: str) -> None:
        passed = time.monotonic() - self.start
        if passed > self.patience:
            raise ValueError(f"{self.who} waited {self.patience:.0f} seconds for {missing}; start all processes again")
        if passed >= self.next:
            logger.info(shown(f"{self.who} waits for {missing}"))
            self.next = passed + 60


def _collect_reports(port: int, count: int, waiting: _Waiting) -> None:
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise ValueError(f"port {port} of JAX_COORDINATOR_ADDRESS cannot be used: {error.strerror}") from error
    connections: dict[int, socket.socket] = {}
    with server, contextlib.ExitStack() as stack:
        server.settimeout(0.2)
        while len(connections) < count - 1:
            missing = [str(i) for i in range(1, count) if i not in connections]
            waiting.check(f"process {', '.join(missing)} (JAX_PROCESS_ID) to start")
            with contextlib.suppress(OSError, ValueError):  # no connection, or one of another program
                connection, _ = server.accept()
                stack.enter_context(connection)
                connection.settimeout(2)
                greeting, index, total = connection.recv(100).decode().split()
                if greeting == GREETING and int(total) == count and 0 < int(index) < count:
                    connections[int(index)] = connection
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(b"all")


def _report(address: tuple[str, int], index: int, waiting: _Waiting) -> None:
    host, port = address
    while True:
        waiting.check(f"process 0 at {host}:{port} (JAX_COORDINATOR_ADDRESS), or for those that it waits for")
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=2) as connection:
            connection.settimeout(1)
            connection.sendall(f"{GREETING} {index} {waiting.who.rpartition(' ')[2]}".encode())
            while True:
                with contextlib.suppress(TimeoutError):
                    if connection.recv(10) == b"all":
                        return
                    break  # process 0 is gone: connect to its successor
                waiting.check(f"the processes that process 0 at {host}:{port} waits for")
        time.sleep(0.3)
