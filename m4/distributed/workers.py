"""Worker processes that do not outlive the process that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from m4.command_line import log_to_output, logs_to_output


def leave_with_parent(*_) -> None:
    """Called in a worker: ends it when its parent is killed; else it would wait for its next task for ever."""

    parent = multiprocessing.parent_process()
    assert parent is not None, "this process is no worker"

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def start_worker(log: bool, *_) -> None:
    """Called first in a worker: it logs as its parent does (`log`) and ends with it."""
    if log:
        log_to_output()
    leave_with_parent()


@contextlib.contextmanager
def pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes: a fork would leave the threads of its parent (jax, grain) in an unknown state.

    ValueError if one of them is killed.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            num_workers, mp_context=context, initializer=start_worker, initargs=(logs_to_output(),)
        ) as executor:
            yield executor
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of {num_workers} worker processes died without a word; is there too little memory for so many?"
        ) from error
