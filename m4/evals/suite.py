"""Scores a trained model in several directions, each beside its trivial baseline and its tokenizer's bound.

normalised = (value - baseline) / (bound - baseline)     0 = trivial, 1 = as good as the tokenizer allows
    shuffled   = the same predictions scored against other examples: what the value owes to no input at all
    before     = of a fine-tuned model: what the one that it began from reaches, normalised, in directions that it knows
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from m4.checkpoints import load_run
from m4.components import to_json, write_atomically
from m4.pictures import contact_sheet, write_png
from m4.sampler import Sampler
from m4.sampling import Guidance, Stage

NUM_BASELINE = 2000  # training examples that the trivial baselines see


class Measure(Protocol):
    metric: str

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """{"value": ..., further figures} of predicted signals against raw examples; higher value = better."""

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The score of the best prediction that does not look at the input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """One conditional task: input signals -> target signal by `scheme`, scored by `measure`.

    `guidance`: of the target's stage. `through`: what is generated on the way, from the inputs alone, for the target
    to see (a layout before a picture).
    """

    name: str
    inputs: tuple[str, ...]
    target: str
    scheme: Any
    measure: Any
    guidance: Guidance | None = None
    through: tuple[Stage, ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        return *self.through, Stage(target=self.target, scheme=self.scheme, guidance=self.guidance)


def evaluate(workdir: str | Path, out: str | Path = "", *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Scores a trained model (see `load_run`); writes metrics.json and gallery.png into `out` (default: `workdir`).

    The first split of `eval_splits` gives DIRECTION and the pictures, each further one DIRECTION_SPLIT. Returns at once
    when both files are there and were made from the same checkpoint and config.
    """
    workdir = Path(workdir)
    out = Path(out or workdir)
    run = load_run(workdir)
    config = run.config
    made_from = {
        "step": run.step, "seed": seed, "num_samples": config.num_eval_samples, "splits": list(config.eval_splits),
        "directions": to_json(config.evaluations),
    }  # fmt: skip
    if not config.evaluations:
        raise ValueError(f"the config of {workdir} names no evaluations")
    stamp = out / ".evaluated.json"
    if stamp.exists() and json.loads(stamp.read_text()) == made_from and (out / "gallery.png").exists():
        results = json.loads((out / "metrics.json").read_text())
        print(table(results), flush=True)
        return results
    started = time.monotonic()
    splits, train = examples_of(config)
    sampler = Sampler(run.model, run.tokenizers)
    first, *_ = splits
    results, predictions = score_all(sampler, config.evaluations, splits, train, seed)
    if (before := _began_from(config)) is not None:
        known = [d for d in config.evaluations if _knows(before, d)]
        for key, result in score_all(before, known, splits, train, seed, "before, ")[0].items():
            results[key]["before"] = result["normalised"]
    out.mkdir(parents=True, exist_ok=True)
    write_png(out / "gallery.png", gallery(splits[first], predictions, config.evaluations, sampler))
    write_atomically(out / "metrics.json", json.dumps(results, indent=1).encode())
    write_atomically(stamp, json.dumps(made_from).encode())
    print(f"{table(results)}\n{out}/metrics.json, {out}/gallery.png in {time.monotonic() - started:.0f} s", flush=True)
    return results


def examples_of(config: Any) -> tuple[dict[str, list[Any]], list[Any]]:
    """Raw examples of each of a config's `eval_splits`, and those of training that baselines may see."""
    source = config.datasets[0].source
    if source is None:
        raise ValueError(f"evaluation needs raw examples, and {config.datasets[0].label} has token shards only")
    source.prepare(config.data_dir)
    splits = {
        name: _head(source.split(name, config.data_dir), config.num_eval_samples, f"{name} examples")
        for name in config.eval_splits
    }
    return splits, _head(source.split("train", config.data_dir), NUM_BASELINE, "training examples (baselines)")


def score_all(
    sampler: Sampler, directions: Sequence[Direction], splits: Mapping[str, Any], train: Sequence[Any], seed: int,
    when: str = "",
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Figures of every direction on every split, and what was predicted for the first split."""
    first, *_ = splits
    results, predictions = {}, {}
    for direction in directions:
        for split, examples in splits.items():
            key = direction.name if split == first else f"{direction.name}_{split}"
            options = {"desc": when + key, "unit": "batch", "file": sys.stdout, "mininterval": 1}
            inputs = {name: [e[name] for e in examples] for name in direction.inputs}
            made = sampler(inputs, direction.stages, seed=seed, progress=functools.partial(tqdm, **options))
            tokenizer = sampler.tokenizer(direction.target)
            rebuilt = tokenizer.decode(tokenizer.encode([e[direction.target] for e in examples]))
            results[key] = _result(direction.measure, made[direction.target], rebuilt, train, examples)
            predictions.setdefault(direction.name, made[direction.target])
    return results, predictions


def _began_from(config: Any) -> Sampler | None:
    """The model that a fine-tuned one began from, if it is (still) one with tokenizers."""
    if not config.init_from:
        return None
    try:
        return Sampler.load(config.init_from)
    except ValueError as error:
        print(f"no scores from before: {error}", flush=True)
        return None


def _knows(sampler: Sampler, direction: Direction) -> bool:
    signals = {*direction.inputs, *(stage.target for stage in direction.stages)}
    return signals <= {name for m in sampler.modalities for name in (m.signal, m.name)}


def sample_gallery(config: Any, model: Any, tokenizers: Mapping[str, Any], step: int, *, count: int = 6) -> np.ndarray:
    """Pictures of what a model makes of the first validation examples; also in FOLDER/galleries/STEP.png."""
    source, sampler = config.datasets[0].source, Sampler(model, dict(tokenizers))
    split = source.split("validation", config.data_dir)
    examples = [split[i] for i in range(min(count, len(split)))]
    predictions = {
        d.name: sampler({name: [e[name] for e in examples] for name in d.inputs}, d.stages, seed=0)[d.target]
        for d in config.evaluations
    }
    picture = gallery(examples, predictions, config.evaluations, sampler, rows=count)
    write_png(config.folder / "galleries" / f"{step:07d}.png", picture)
    return picture


def _head(split: Sequence[Any], count: int, what: str) -> list[Any]:
    indices = range(min(count, len(split)))
    return [split[i] for i in tqdm(indices, desc=f"reading {what}", unit="example", file=sys.stdout, mininterval=1)]


def _result(measure: Measure, predictions, rebuilt, train, examples) -> dict[str, Any]:
    score, bound = measure.score(predictions, examples), measure.score(rebuilt, examples)
    shuffled = measure.score([*predictions[1:], predictions[0]], examples)["value"]
    baseline = measure.baseline(train, examples)
    value, low, high = (x["value"] for x in (score, baseline, bound))
    others = {k: {"value": v, "baseline": baseline[k], "bound": bound[k]} for k, v in score.items() if k != "value"}
    return {
        "value": value,
        "baseline": low,
        "bound": high,
        "normalised": (value - low) / (high - low) if high != low else 0.0,
        "shuffled": shuffled,
        "metric": measure.metric,
        "num_samples": len(examples),
        **({"also": others} if others else {}),
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


def gallery(examples, predictions, directions: Sequence[Direction], sampler: Sampler, *, rows: int = 10):
    """uint8 picture: rows = samples; columns = the inputs and truths, then the prediction of each direction."""
    signals = list(dict.fromkeys(name for d in directions for name in (*d.inputs, d.target)))
    columns = [(f"{s} (truth)", s, [e[s] for e in examples]) for s in signals]
    columns += [(d.name.replace("_", " "), d.target, predictions[d.name]) for d in directions]
    return contact_sheet(
        [
            ("", {title: sampler.tokenizer(s).draw(values[r], image=e["rgb"]) for title, s, values in columns})
            for r, e in enumerate(examples[:rows])
        ]
    )
