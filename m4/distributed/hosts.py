"""Joining the processes of a job, and stopping them together."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax

from m4.distributed.worker_group import logging_wait, roll_call


def join_processes() -> None:
    """Joins the processes of a job of several: those of Slurm, Open MPI or a TPU slice find each other, others through
    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Alone it does nothing.

    After some seconds, then each minute, each process logs which others are missing. ValueError for variables that are
    invalid or incomplete, and after five minutes without the others.
    """
    e = os.environ
    if jax.distributed.is_initialized():
        return
    if "JAX_COORDINATOR_ADDRESS" in e:
        values = {}
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            given = e[name] if name in e else ""
            if not given.isdecimal():
                raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, but {name} is {given!r}; it must be a number too")
            values[name] = int(given)
        count, index = values["JAX_NUM_PROCESSES"], values["JAX_PROCESS_ID"]
        if not index < count:
            raise ValueError(f"JAX_PROCESS_ID is {index}; allowed: 0 to JAX_NUM_PROCESSES - 1, which is {count - 1}")
        roll_call(e["JAX_COORDINATOR_ADDRESS"], count, index)
        jax.distributed.initialize(e["JAX_COORDINATOR_ADDRESS"], count, index)
        return
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        if name in e:
            raise ValueError(f"{name} is set, but JAX_COORDINATOR_ADDRESS is not; set it to HOST:PORT of process 0")
    many_tasks = any(int(e.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    if many_tasks or "," in e.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in e:
        with logging_wait("waiting for the other processes of the job (Slurm, Open MPI or a TPU slice) to start"):
            jax.distributed.initialize()


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], str]]:
    """A function of the step that returns why the job must end after it: "SIGTERM", "Ctrl-C", or "" (go on). A second
    Ctrl-C ends the job at once.

    With several processes any may receive SIGTERM; Ctrl-C ends them at once.
    """
    if jax.process_count() > 1:  # JAX has its own handler, and the processes agree on the step
        from jax.experimental import multihost_utils

        yield lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""
        return
    received = []

    def on_signal(number, frame):
        received.append("Ctrl-C" if number == signal.SIGINT else "SIGTERM")
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: received[0] if received else ""
    finally:  # later stages, such as the evaluation, have no steps to end after
        for number, handler in before.items():
            signal.signal(number, handler)
