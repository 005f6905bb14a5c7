"""Scores a trained model on conditional tasks, each beside its trivial baseline and its tokenizer's bound.

normalised = (value - baseline) / (bound - baseline)     0 = trivial, 1 = as good as the tokenizer allows
    shuffled   = the same predictions scored against other examples: the score that needs no input at all
    before     = for a fine-tuned model: the normalised score of the model that it began from, in tasks that it knows
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from tqdm import tqdm

from m4.checkpoints.runs import TrainedModel
from m4.data.sources.files import read_for
from m4.errors import closest
from m4.evaluation.base import Evaluator, Report
from m4.evaluation.gallery import gallery, stacked
from m4.files import digest, read_json, remove_leftovers, write_atomically, write_json
from m4.inference.guidance import Guidance
from m4.inference.prompts import check_plan
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage
from m4.model.encoder_decoder import Model
from m4.model.parameters import parameters
from m4.pictures import write_png
from m4.registry import to_json
from m4.tokens.tokenizer import Examples, tokenizer_hash

logger = logging.getLogger(__name__)

NUM_BASELINE = 2000  # training examples that the trivial baselines see
NUM_SHOWN = 6  # rows of samples of a model in training
NUM_LOOKED_AT = 100  # examples read, at most, for each one that has all signals
NUM_PROBED = 8  # examples of a split from which the signals of a data set are known


@runtime_checkable
class Measure(Protocol):
    metric: str

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """{"value": ..., further figures} of predicted signals against raw examples; higher value = better."""

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The score of the best prediction that does not look at the input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionalTask:
    """One conditional task: input signals -> target signal."""

    name: str
    """Name in tables and files."""
    inputs: tuple[str, ...]
    """Given signals."""
    target: str
    """Predicted signal."""
    scheme: Any
    """How the target is generated: MaskGIT, ROAR or Autoregressive of m4.inference."""
    metric: Any
    """How it is compared with the truth (m4.evaluation.measures)."""
    guidance: Guidance | None = None
    """Classifier-free guidance of the target; None leaves it out."""
    intermediate: tuple[Stage, ...] = ()
    """Stages that are generated first, from the inputs alone, as inputs of the target (a layout before an image)."""
    dataset: str = ""
    """Name of the data set whose raw examples are scored; "" is the first that has the signals."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        return *self.intermediate, Stage(target=self.target, scheme=self.scheme, guidance=self.guidance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionalGeneration(Evaluator):
    """Generation of one signal from others, on held-out examples."""

    tasks: tuple[ConditionalTask, ...] = ()
    """What is generated from what. Each task is scored on the first data set that has its signals."""
    splits: tuple[str, ...] = ("test",)
    """Splits that are scored. Pictures are made of the first."""
    num_samples: int = 512
    """Examples of each split that are scored, at most."""

    name = "directions"
    after_training = True

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1")
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits={self.splits} must be different names, at least one")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks must have different names, and have {names}")

    def check_config(self, config: Any) -> None:
        if not self.tasks:
            raise ValueError("ConditionalGeneration needs tasks, at least one")
        labels = [dataset.label for dataset in config.datasets]
        for task in self.tasks:
            try:
                check_plan(task.stages, task.inputs, config.modalities)
            except ValueError as error:
                raise ValueError(f"evaluation {task.name}: {error}") from error
            if task.dataset and task.dataset not in labels:
                near = closest(task.dataset, labels)
                raise ValueError(f"evaluation {task.name}: no data set {task.dataset!r}; {near}")
        known = getattr(config.datasets[0].source, "splits", ())
        for split in self.splits if isinstance(known, tuple) and known else ():  # a mapping renames some splits
            if split not in known:
                raise ValueError(f"splits of evaluations: {labels[0]} has no split {split!r}; {closest(split, known)}")

    def check_data(self, config: Any) -> None:
        """ValueError for a task whose metric cannot score the truth itself on the config's data, which lack signals or
        hold no known values."""
        for label, tasks, splits, training in self._sources(config, self.splits):
            wanted = _signals_of(tasks)
            for task in tasks:
                for name, split in splits.items():
                    # A few examples are quick to read; if they have no known values, all that are scored are tried.
                    for count, num_train in ((NUM_PROBED, NUM_PROBED), (self.num_samples, NUM_BASELINE)):
                        examples, train = _head(split, count, wanted), _head(training, num_train, wanted)
                        if (error := _metric_error(task, examples, train)) is None:
                            break
                    if error is not None:
                        raise ValueError(
                            f"evaluation {task.name}: {type(task.metric).__name__} cannot score {task.target} on the "
                            f"{name} split of data set {label}: {error}"
                        ) from error

    def run(self, trained: TrainedModel, report: Report, seed: int) -> dict[str, Any]:
        """Scores by task, and metrics.json and gallery.png in the report's folder.

        Scores are named TASK on the first of the `splits`, which the gallery shows, and TASK_SPLIT on the others.
        Returns at once if both files exist unchanged, and are of the same weights, tokenizers, data and config.
        """
        config, out = trained.config, report.folder
        if not self.tasks:
            raise ValueError(f"the config of {config.name} has no tasks of ConditionalGeneration in its evaluators")
        number = report.name.removeprefix(self.name)  # "" of the first of a config, "_2" of the next
        files = f"metrics{number}.json", f"gallery{number}.png"
        sampler, before = Sampler(trained.model, trained.tokenizers), _began_from(config)
        made_from, stamp = self._made_from(trained, before, seed), out / f".evaluated{number}.json"
        if (results := _made_before(out, stamp, files, made_from)) is not None:
            logger.info(table(results))
            return results
        self.check_data(config)
        results, sheets = {}, []
        for tasks, splits, train in self.examples(config):
            scores, predictions = score_all(sampler, tasks, splits, train, seed)
            results |= scores
            first, *_ = splits
            sheets.append(gallery(splits[first], predictions, tasks, sampler))
            if before is None:
                continue
            known = [task for task in tasks if _knows(before, task)]
            for key, result in score_all(before, known, splits, train, seed, "before, ")[0].items():
                scores[key]["before"] = result["normalised"]
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)  # of killed processes
        stamp.unlink(missing_ok=True)  # first, so that no stamp vouches for files of a killed run
        write_png(out / files[1], stacked(sheets))
        write_atomically(out / files[0], json.dumps(results, indent=1).encode())
        write_json(stamp, {"made_from": made_from, "files": {name: digest(out / name) for name in files}})
        seconds = time.monotonic() - report.started
        logger.info(f"{table(results)}\n{out}/{files[0]}, {out}/{files[1]} in {seconds:.0f} s")
        return results

    def samples(self, config: Any, model: Any, tokenizers: Mapping[str, Any], step: int) -> np.ndarray:
        """Predictions for the first validation examples; also in FOLDER/galleries/STEP.png."""
        sampler, sheets = Sampler(model, dict(tokenizers)), []
        few = dataclasses.replace(self, num_samples=NUM_SHOWN)
        for tasks, splits, _ in few.examples(config, ["validation"], 0):
            examples = splits["validation"]
            predictions = {
                t.name: sampler({name: [e[name] for e in examples] for name in t.inputs}, t.stages, seed=0)[t.target]
                for t in tasks
            }
            sheets.append(gallery(examples, predictions, tasks, sampler, rows=NUM_SHOWN))
        picture = stacked(sheets)
        write_png(config.folder / "galleries" / f"{step:07d}.png", picture)
        return picture

    def examples(
        self, config: Any, names: Sequence[str] = (), num_train: int = NUM_BASELINE
    ) -> list[tuple[list[ConditionalTask], dict[str, list[Any]], list[Any]]]:
        """For each data set of a config: tasks; raw examples of each split (default: `splits`); training examples for
        baselines. Examples that lack a signal of a task are left out.

        ValueError for tasks that no data set has raw examples for.
        """
        groups = []
        for _, tasks, splits, training in self._sources(config, names or self.splits):
            wanted = _signals_of(tasks)
            heads = {k: _head(s, self.num_samples, wanted, f"{k} examples") for k, s in splits.items()}
            train = _head(training, num_train, wanted, "training examples (baselines)")
            groups.append((tasks, heads, train))
        return groups

    def _sources(
        self, config: Any, names: Sequence[str]
    ) -> Iterator[tuple[str, list[ConditionalTask], dict[str, Sequence[Any]], Sequence[Any]]]:
        """(label, tasks to score on it, its splits of these names, its training split) of each data set with tasks.

        Each task belongs to the first data set that has its signals. ValueError for tasks that no data set has raw
        examples for.
        """
        remaining = list(self.tasks)
        for label, source in [(d.label, d.source) for d in config.datasets if d.source is not None]:
            if not any(task.dataset in ("", label) for task in remaining):
                continue
            source.prepare(config.data_dir)
            try:
                splits = {name: read_for(source.split(name, config.data_dir), config.tokenizers) for name in names}
            except ValueError:  # it has no such split
                continue
            probed = [split[i] for split in splits.values() for i in range(min(NUM_PROBED, len(split)))]
            has = set.intersection(*({*e} for e in probed)) if probed else set()
            tasks = [task for task in remaining if _signals_of([task]) <= has and task.dataset in ("", label)]
            remaining = [task for task in remaining if task not in tasks]
            if tasks:
                yield label, tasks, splits, read_for(source.split("train", config.data_dir), config.tokenizers)
        if remaining:
            wanted = "; ".join(f"{task.name}: {', '.join((*task.inputs, task.target))}" for task in remaining)
            raise ValueError(f"no data set has raw examples with the signals of these evaluations: {wanted}")

    def _made_from(self, run: TrainedModel, before: Sampler | None, seed: int) -> dict[str, Any]:
        """All that the scores depend on, as JSON."""
        c = run.config
        # The signature of a source over files changes when they do; other sources are functions of their fields.
        sources = [d.source for d in c.datasets if d.source is not None]
        signatures = [s.signature(c.data_dir) if hasattr(s, "signature") else "" for s in sources]
        return {
            "step": run.step, "seed": seed, "num_samples": self.num_samples, "splits": list(self.splits),
            "directions": to_json(self.tasks), "datasets": to_json(c.datasets), "signatures": signatures,
            "model": model_digest(run.model, run.tokenizers),
            "before": model_digest(before.model, before.tokenizers) if before is not None else "",
        }  # fmt: skip


def model_digest(model: Model, tokenizers: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a model's config, parameters and tokenizers."""
    sha256 = hashlib.sha256(json.dumps([to_json(model.config), to_json(list(model.modalities))]).encode())
    for name, x in sorted(parameters(nnx.state(model, nnx.Param)).items()):
        sha256.update(f"{name} {x.dtype} {x.shape}".encode())
        sha256.update(np.ascontiguousarray(x).tobytes())
    for name, tokenizer in sorted(tokenizers.items()):
        sha256.update(f"{name} {tokenizer_hash(tokenizer)}".encode())
    return sha256.hexdigest()


def _made_before(out: Path, stamp: Path, files: tuple[str, str], made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """Results that depend on the same, if their files are unchanged."""
    try:
        earlier = read_json(stamp)
        # As JSON, where tuples are lists.
        same = "files" in earlier and earlier["made_from"] == json.loads(json.dumps(made_from))
        same = same and all(digest(out / name) == earlier["files"][name] for name in files)
    except (ValueError, OSError):  # no stamp, of an older version, or damaged: evaluate again
        return None
    return json.loads((out / files[0]).read_text()) if same else None


def _metric_error(task: ConditionalTask, examples: Sequence[Any], train: Sequence[Any]) -> Exception | None:
    """Why a metric cannot score the truth on these examples."""
    if not examples or not train:
        has_all = " and ".join(sorted(_signals_of([task])))
        return ValueError(f"no {'training ' * bool(examples)}example has all of {has_all}")
    try:
        task.metric.score([e[task.target] for e in examples], examples)
        task.metric.baseline(train, examples)
    except KeyError as error:
        has = ", ".join(sorted({*examples[0]} - {"id", "file"}))
        return ValueError(f"it needs {error} in raw examples, which have {has}; use another measure")
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        return error
    return None


def _signals_of(tasks: Sequence[ConditionalTask]) -> set[str]:
    return {name for task in tasks for name in (*task.inputs, task.target)}


def score_all(
    sampler: Sampler, tasks: Sequence[ConditionalTask], splits: Mapping[str, Any], train: Sequence[Any], seed: int,
    prefix: str = "",
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Figures of every task on every split, and predictions for the first split."""
    first, *_ = splits
    results, predictions = {}, {}
    for task in tasks:
        for split, examples in splits.items():
            key = task.name if split == first else f"{task.name}_{split}"
            options = {"desc": prefix + key, "unit": "batch", "file": sys.stdout, "mininterval": 1}
            inputs = {name: [e[name] for e in examples] for name in task.inputs}
            generated = sampler(inputs, task.stages, seed=seed, progress=functools.partial(tqdm, **options))
            tokenizer = sampler.tokenizer(task.target)
            rebuilt = tokenizer.decode(tokenizer.encode([e[task.target] for e in examples]))
            results[key] = _result(task.metric, generated[task.target], rebuilt, train, examples)
            predictions.setdefault(task.name, generated[task.target])
    return results, predictions


def _began_from(config: Any) -> Sampler | None:
    """The model that a fine-tuned one began from, if that still exists with its tokenizers."""
    if not config.init_from:
        return None
    try:
        return Sampler.load(config.init_from)
    except ValueError as error:
        logger.info(f"no scores from before: {error}")
        return None


def _knows(sampler: Sampler, task: ConditionalTask) -> bool:
    try:
        for name in task.inputs:
            sampler.modalities.as_input(name)
        for stage in task.stages:
            sampler.modalities.as_target(stage.target)
    except ValueError:
        return False
    return True


def _head(split: Examples, count: int, wanted: set[str], what: str = "") -> list[Any]:
    """The first examples that have all `wanted` signals, at most `count`. `what`: title of a progress bar."""
    complete, total = [], min(count, len(split))
    with tqdm(
        total=total, desc=f"reading {what}", unit="example", file=sys.stdout, mininterval=1, disable=not what
    ) as bar:
        for i in range(min(len(split), NUM_LOOKED_AT * count)):
            if len(complete) == total:
                break
            example = split[i]
            if all(name in example and example[name] is not None for name in wanted):
                complete.append(example)
                bar.update()
    return complete


def _result(measure: Measure, predictions, rebuilt, train, examples) -> dict[str, Any]:
    score, upper_bound = measure.score(predictions, examples), measure.score(rebuilt, examples)
    shuffled = measure.score([*predictions[1:], predictions[0]], examples)["value"]
    baseline = measure.baseline(train, examples)
    value, low, high = (x["value"] for x in (score, baseline, upper_bound))
    further = {
        k: {"value": v, "baseline": baseline[k], "bound": upper_bound[k]} for k, v in score.items() if k != "value"
    }
    return {
        "value": value,
        "baseline": low,
        "bound": high,
        "normalised": (value - low) / (high - low) if high != low else 0.0,
        "shuffled": shuffled,
        "metric": measure.metric,
        "num_samples": len(examples),
        **({"also": further} if further else {}),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    width = max(16, 2 + max(map(len, results)))
    columns = {"value": 8, "baseline": 10, "bound": 8, "normalised": 12, "shuffled": 10}
    columns |= {"before": 8} if any("before" in r for r in results.values()) else {}
    rows = [f"{'direction':<{width}}" + "".join(f"{c:>{w}}" for c, w in columns.items()) + "  metric"]
    for name, r in results.items():
        figures = "".join(f"{r[c]:>{w}.3f}" if c in r else " " * w for c, w in columns.items())
        rows.append(f"{name:<{width}}{figures}  {r['metric']} ({r['num_samples']} samples)")
    return "\n".join(rows)
