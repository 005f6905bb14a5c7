"""Scalars of a run: metrics.jsonl, TensorBoard events, and a progress line with speed and time left."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import tensorboardX

from m4.components import write_atomically


class Metrics:
    """Writes under `workdir`; lines of steps after `first_step` (of a run that was killed) are dropped first."""

    def __init__(self, workdir: Path, *, first_step: int, num_steps: int, tokens_per_step: int):
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= first_step]
            write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())
        self.file = self.path.open("a")
        self.tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self.num_steps, self.tokens_per_step = num_steps, tokens_per_step
        self.first = self.last = (first_step, time.monotonic())

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        scalars = {k: float(v) for k, v in scalars.items() if float(v) == float(v)}  # absent modalities are NaN
        now = time.monotonic()
        seconds = max(now - self.last[1], 1e-9) / max(step - self.last[0], 1)
        self.last = (step, now)
        scalars["tokens_per_s"] = self.tokens_per_step / seconds
        self.file.write(json.dumps({"step": step, **scalars}) + "\n")
        self.file.flush()
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, step)
        average = (now - self.first[1]) / max(step - self.first[0], 1)
        minutes, left = divmod(int(average * (self.num_steps - step)), 60)
        losses = " ".join(f"{k.removeprefix('loss/')} {v:.2f}" for k, v in scalars.items() if k.startswith("loss"))
        speed = f"{scalars['tokens_per_s']:,.0f} tokens/s  {minutes}:{left:02d} left"
        print(f"step {step}/{self.num_steps}  {losses}  {speed}", flush=True)

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the half line of a killed run
        return sys.maxsize
