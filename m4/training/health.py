"""Whether a run still learns: it ends where its gradients or parameters stay not finite, and saves none of them."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m4.checkpoints.numbered import Checkpoints, steps_in
from m4.files import write_atomically


class Health:
    """Judges each step by its scalars, as m4.training.trainer.Trainer.step gives them.

    folder: of the run, for not_finite.json. saved: its checkpoints. max_skipped: steps in a row whose gradients are not
    finite that end the run.
    """

    def __init__(self, folder: Path, saved: Checkpoints, *, max_skipped: int):
        self.folder, self.saved, self.max_skipped = folder, saved, max_skipped
        self.addresses = collections.deque(maxlen=max_skipped + 1)

    def reads(self, step: int, first_example: int, num_examples: int) -> None:
        """Which examples of the stream a step takes."""
        self.addresses.append({"step": step, "first_example": first_example, "num_examples": num_examples})

    def check(self, step: int, scalars: Mapping[str, Any]) -> None:
        """ValueError if this step was one too many, or left parameters that are NaN."""
        skipped = int(scalars["skipped_in_a_row"])
        if skipped >= self.max_skipped:
            what = f"gradients were not finite in {self.max_skipped} steps in a row"
        elif math.isnan(float(scalars["param_norm"])):
            what = f"parameters are not finite after step {step}"
        else:
            return
        file = self.folder / "not_finite.json"
        write_atomically(file, json.dumps(list(self.addresses), indent=1).encode())
        raise ValueError(f"{what}; {file} says which examples of the stream they read; {self._go_back(step - skipped)}")

    def may_save(self, step: int, scalars: Mapping[str, Any], *, is_last: bool) -> bool:
        """Whether the state after this step is worth keeping. While steps are skipped it is not yet known to be: the
        next one that is not decides. The last step has no next."""
        skipped = int(scalars["skipped_in_a_row"])
        learned = int(scalars["skipped_steps"]) < step and skipped < self.max_skipped
        return learned and (is_last or not skipped) and math.isfinite(float(scalars["param_norm"]))

    def check_end(self, step: int, scalars: Mapping[str, Any]) -> None:
        """ValueError if nothing was learned in all steps, or the last one left parameters that are not finite."""
        self.check(step, scalars)
        if int(scalars["skipped_steps"]) >= step:
            raise ValueError(f"gradients were not finite in any of {step} steps: all were skipped, nothing was learned")
        if not math.isfinite(param_norm := float(scalars["param_norm"])):
            raise ValueError(
                f"parameters are not finite after step {step} (their norm is {param_norm}), and were not saved; "
                + self._go_back(step)
            )

    def _go_back(self, bad: int) -> str:
        """What there is from before, where the parameters after step `bad` are no good."""
        self.saved.finish()
        steps = steps_in(self.folder / "checkpoints")
        good, late = [s for s in steps if s < bad], [s for s in steps if s >= bad]
        if not steps:
            return "there is no checkpoint"
        if not late:
            return f"the last checkpoint, of step {max(good)}, is from before"
        folders = ", ".join(str(self.folder / "checkpoints" / str(s)) for s in late)
        rest = f"; delete them to go on from step {max(good)}, which is from before" if good else ", and none is older"
        return f"the parameters of {folders} are those at which this began{rest}"
