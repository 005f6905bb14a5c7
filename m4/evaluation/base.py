"""Evaluations of a trained model: each a frozen dataclass in a file of its own, found by its name.

    python -m m4 evaluate RUN --suite NAME        those of the config's `evaluators` with this name, else one by default

A user's own class is found where a config has an instance of it, or by an entry point of the group `m4.components`.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import json
import logging
import pkgutil
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import m4.evaluation
from m4.checkpoints.runs import TrainedModel, load_run
from m4.errors import check_seed, closest
from m4.files import replacing, write_atomically
from m4.pictures import write_png
from m4.registry import FreeToChange, components

logger = logging.getLogger(__name__)


class Report:
    """Writes what an evaluation found into a folder: NAME.json, NAME.md, and pictures."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.started = folder, name, time.monotonic()

    def write(self, results: Mapping[str, Any], table: str, pictures: Mapping[str, Any] = {}) -> None:
        """`pictures`: uint8 [H W 3] or a figure of matplotlib, by the end of its file's name ("" or "_prompts")."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"{self.name}.json", json.dumps(results, indent=1).encode())
        write_atomically(self.folder / f"{self.name}.md", table.encode())
        for end, picture in pictures.items():
            file = self.folder / f"{self.name}{end}.png"
            if hasattr(picture, "savefig"):
                with replacing(file) as temporary:
                    picture.savefig(temporary, dpi=120, format="png")
            else:
                write_png(file, picture)
        names = ", ".join((".json", ".md", *(f"{end}.png" for end in pictures)))
        seconds = time.monotonic() - self.started
        logger.info(f"{table}\n{self.folder}/{self.name}{names} in {seconds:.0f} s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(FreeToChange, abc.ABC):
    """One way to score a trained model. Only `run` must be defined."""

    name: ClassVar[str]
    """What `--suite` calls it, and its files are called."""
    after_training: ClassVar[bool] = False
    """Whether a run ends with it, and shows its `samples` along the way."""

    def check(self) -> None:
        """ValueError for what is missing, before the model is loaded."""

    def check_config(self, config: Any) -> None:
        """ValueError for what does not fit the config of a run, before any work."""

    def check_data(self, config: Any) -> None:
        """ValueError for what cannot be scored on a run's data, before its first step. Prepares the sources."""

    def samples(self, config: Any, model: Any, tokenizers: Mapping[str, Any], step: int) -> np.ndarray | None:
        """A picture of what a model in training generates, uint8 [H W 3]."""

    @abc.abstractmethod
    def run(self, trained: TrainedModel, report: Report, seed: int) -> dict[str, Any]:
        """Results, which it has written by `report`."""

    @classmethod
    def run_all(cls, evaluators: Seq[Any], trained: TrainedModel, report: Report, seed: int) -> dict[str, Any]:
        """Several of a config with the same name, one after the other; the second is NAME_2, and so on."""
        results = {}
        for i, evaluator in enumerate(evaluators, 1):
            own = report if i == 1 else Report(report.folder, f"{report.name}_{i}")
            results[own.name] = evaluator.run(trained, own, seed)
        return results[report.name] if len(evaluators) == 1 else results


def evaluate(
    workdir: str | Path, evaluators: Evaluator | Seq[Evaluator] | str, out: str | Path = "", *, seed: int = 0
) -> dict[str, Any]:
    """Scores a trained model (see `load_run`) by evaluators of one name, or those that a name stands for, into `out`
    (default: `workdir`)."""
    check_seed(seed)
    if isinstance(evaluators, str):
        known = evaluator_classes()
        default = [known[evaluators]()] if evaluators in known else []
        for evaluator in default:
            evaluator.check()  # what it needs is named before the model is read
        trained = load_run(workdir)
        own = [e for e in trained.config.evaluators if e.name == evaluators]
        for evaluator in own:
            evaluator.check()
        given = own or default
        if not given:
            names = sorted({*known, *(e.name for e in trained.config.evaluators)})
            raise ValueError(f"no evaluation {evaluators!r}; {closest(evaluators, names)}")
    else:
        given = [evaluators] if isinstance(evaluators, Evaluator) else [*evaluators]
        if len({e.name for e in given}) != 1:
            raise ValueError(f"evaluators={given} must be at least one, and of one name")
        for evaluator in given:
            evaluator.check()
        trained = load_run(workdir)
    return type(given[0]).run_all(given, trained, Report(Path(out or workdir), given[0].name), seed)


def evaluator_classes() -> dict[str, type]:
    """By name: those of this room, and of other packages by their entry points."""
    classes = {}
    for info in pkgutil.iter_modules(m4.evaluation.__path__):
        module = importlib.import_module(f"m4.evaluation.{info.name}")
        classes |= {cls.name: cls for cls in vars(module).values() if _is_evaluator(cls)}
    for entry in components().values():
        if not entry.module.startswith(("m4.", "m4_tokenizers.")) and _is_evaluator(cls := entry.load()):
            classes[cls.name] = cls
    return classes


def _is_evaluator(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Evaluator) and hasattr(cls, "name")
