"""Scalars of a run: metrics.jsonl, TensorBoard (and Weights & Biases), and a progress line with speed and time left."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import statistics
import struct
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]  made at import
from tensorboardX.record_writer import masked_crc32c

from m4.files import naming, write_atomically
from m4.registry import FreeToChange
from m4.training.flops import mfu

logger = logging.getLogger(__name__)

NUM_RECENT = 50  # logged losses that a spike is told from
SPIKE = 8.0  # times their median absolute deviation above their median


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig(FreeToChange):
    """What a run shows of its training, and how often."""

    log_every: int = 20
    """Steps between lines of metrics."""
    gallery_every: int = 0
    """Steps between pictures of generated samples; 0 makes them at the end only."""
    profile: tuple[int, int] = (0, 0)
    """First and last step of a profile for TensorBoard or Perfetto; 0 0 is none."""
    wandb: str = ""
    """Project of Weights & Biases that metrics are sent to; "" is none."""

    def __post_init__(self):
        if self.gallery_every < 0:
            raise ValueError(f"gallery_every={self.gallery_every} must be at least 0")
        if not 0 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile={self.profile} must be the first and the last step, in this order")


class Metrics:
    """Writes under `workdir`; lines of steps after `first_step` (of a run that was killed) are dropped first.

    `flops_per_step` of the model, and `peak_flops` of all devices together, give the MFU (None: there is none, as on
    CPUs). In a job of several processes the first one writes. wandb: the name of a Weights & Biases project, "" = none.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        num_steps: int,
        tokens_per_step: int,
        flops_per_step: float,
        peak_flops: float | None,
        wandb: str = "",
    ):
        self.writes = jax.process_index() == 0
        self.num_steps, self.tokens_per_step = num_steps, tokens_per_step
        self.flops_per_step, self.peak_flops = flops_per_step, peak_flops
        self.first = self.last = (first_step, time.monotonic())
        self.waited, self.recent = 0.0, deque(maxlen=NUM_RECENT)
        if not self.writes:
            return
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= first_step]
            write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())
        self.events = EventFile(workdir / "tensorboard", first_step)
        self.file = self.path.open("a")
        self.wandb = _wandb(wandb, workdir) if wandb else None

    def wait_for(self, stream: Any) -> Any:
        """The stream's next batch; the time until it is there counts as waited for input."""
        start = time.monotonic()
        batch = next(stream)
        self.waited += time.monotonic() - start
        return batch

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """Scalars of a step, and the speed since the last that was written. A note says when the loss has jumped."""
        scalars = {k: float(v) for k, v in scalars.items() if float(v) == float(v)}  # absent modalities are NaN
        now = time.monotonic()
        seconds = max(now - self.last[1], 1e-9)
        step_s = seconds / max(step - self.last[0], 1)
        self.last = (step, now)
        scalars["tokens_per_s"] = self.tokens_per_step / step_s
        if (share := mfu(self.flops_per_step, step_s, self.peak_flops)) is not None:
            scalars["mfu"] = share
        scalars["input_wait"] = min(self.waited / seconds, 1.0)
        scalars["memory_gib"] = memory_bytes() / 2**30
        self.waited = 0.0
        notes = self._notes(scalars)
        if not self.writes:
            return
        with naming(self.path):
            self.file.write(json.dumps({"step": step, **scalars, **({"notes": notes} if notes else {})}) + "\n")
            self.file.flush()
        self.events.scalars(step, scalars)
        if self.wandb:
            self.wandb.log(scalars, step=step)
        average = (now - self.first[1]) / max(step - self.first[0], 1)
        minutes, left = divmod(int(average * (self.num_steps - step)), 60)
        losses = " ".join(f"{k.removeprefix('loss/')} {v:.2f}" for k, v in scalars.items() if k.startswith("loss"))
        use = f"mfu {scalars['mfu']:.0%}  " if "mfu" in scalars else ""
        speed = f"{scalars['tokens_per_s']:,.0f} tokens/s  {use}{minutes}:{left:02d} left"
        logger.info(f"step {step}/{self.num_steps}  {losses}  {speed}")
        for note in notes:
            logger.info(f"step {step}: {note}")

    def _notes(self, scalars: dict[str, float]) -> list[str]:
        notes, loss = [], scalars.get("loss", float("nan"))  # `write` leaves out what is NaN
        if len(self.recent) >= 10:
            middle = statistics.median(self.recent)
            spread = max(statistics.median(abs(x - middle) for x in self.recent), 0.002 * abs(middle))
            if not loss <= middle + SPIKE * spread:
                notes.append(f"the loss jumped to {loss:.3f} (median of the last {len(self.recent)}: {middle:.3f})")
        if loss == loss:
            self.recent.append(loss)
        if scalars.get("skipped_in_a_row"):
            notes.append(f"gradients were not finite: {scalars['skipped_in_a_row']:.0f} steps in a row were skipped")
        return notes

    def picture(self, step: int, name: str, image: Any) -> None:
        """A gallery, uint8 [H W 3], for TensorBoard."""
        if self.writes:
            self.events.picture(step, name, image)

    def close(self) -> None:
        if not self.writes:
            return
        with naming(self.path):
            self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()
        self.events.close()
        if self.wandb:
            self.wandb.finish()


class EventFile:
    """TensorBoard's events of a run from `first_step` on, written by the caller itself: a full disk is its OSError.

    tensorboardX's own writer is a thread. When a full disk ends it, its queue fills up, and a run waits there for ever.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.file = self.path.open("ab")
        try:
            self._write(Event(file_version="brain.Event:2"))
            # TensorBoard drops what a killed run wrote of later steps.
            self._write(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self.path.unlink()
            raise

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write(*(Event(step=step, summary=summary.scalar(k, v)) for k, v in scalars.items()))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """uint8 [H W 3]"""
        self._write(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

    def close(self) -> None:
        with naming(self.path):
            self.file.close()

    def _write(self, *events: Event) -> None:
        """As records: length, its checksum, content, its checksum."""
        with naming(self.path):
            for event in events:
                event.wall_time = time.time()
                data = event.SerializeToString()
                length = struct.pack("<Q", len(data))
                for part in (length, data):
                    self.file.write(part + struct.pack("<I", masked_crc32c(part)))
            self.file.flush()


def memory_bytes() -> int:
    """The most that a local device has held; of a CPU, the most that this process has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wandb(project: str, workdir: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"wandb={project!r} needs Weights & Biases: pip install wandb") from error
    return wandb.init(project=project, name=workdir.name, dir=str(workdir), id=workdir.name, resume="allow")


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the half line of a killed run
        return sys.maxsize
