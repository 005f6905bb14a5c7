"""Worker processes that do not outlive the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def leave_with_parent(*_) -> None:
    """Called in a worker: ends it when its parent is killed, where it would wait for its next task for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def pool(num_workers: int) -> ProcessPoolExecutor:
    """Spawned, not forked: the caller may hold threads (jax, grain), which a fork would leave in an unknown state."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=leave_with_parent)
