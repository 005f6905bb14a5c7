"""Scores a trained model in several directions, each beside its trivial baseline and its tokenizer's bound.

normalised = (value - baseline) / (bound - baseline)     0 = trivial, 1 = as good as the tokenizer allows
    shuffled   = the same predictions scored against other examples: what the value owes to no input at all
    before     = of a fine-tuned model: what the one that it began from reaches, normalised, in directions that it knows
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

from m4.checkpoints.runs import TrainedModel, load_run
from m4.data.sources.files import read_for
from m4.errors import check_seed
from m4.files import digest, read_json, remove_leftovers, write_atomically, write_json
from m4.inference.guidance import Guidance
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage
from m4.model.encoder_decoder import Model
from m4.model.parameters import parameters
from m4.pictures import contact_sheet, write_png
from m4.registry import to_json
from m4.tokens.tokenizer import Examples, tokenizer_hash

logger = logging.getLogger(__name__)

NUM_BASELINE = 2000  # training examples that the trivial baselines see
FILES = ("metrics.json", "gallery.png")
NUM_LOOKED_AT = 100  # examples for each that is wanted, where most lack a signal
NUM_PROBED = 8  # examples of a split that tell which signals a data set has


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
    measure: Any
    """How it is compared with the truth (m4.evaluation.measures)."""
    guidance: Guidance | None = None
    """Classifier-free guidance of the target; None leaves it out."""
    through: tuple[Stage, ...] = ()
    """Stages that are generated first, from the inputs alone, for the target to see (a layout before an image)."""
    dataset: str = ""
    """Name of the data set whose raw examples are scored; "" is the first that has the signals."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        return *self.through, Stage(target=self.target, scheme=self.scheme, guidance=self.guidance)


def evaluate(workdir: str | Path, out: str | Path = "", *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Scores a trained model (see `load_run`); writes metrics.json and gallery.png into `out` (default: `workdir`).

    The first split of `eval_splits` gives DIRECTION and the pictures, each further one DIRECTION_SPLIT. Returns at once
    when both files are there as they were written, and were made from the same weights, tokenizers, data and config.
    """
    check_seed(seed)
    workdir = Path(workdir)
    out = Path(out or workdir)
    run = load_run(workdir)
    config = run.config
    if not config.evaluations:
        raise ValueError(f"the config of {workdir} names no evaluations")
    sampler, before = Sampler(run.model, run.tokenizers), _began_from(config)
    made_from = _made_from(run, before, seed)
    stamp = out / ".evaluated.json"
    if (results := _made_before(out, stamp, made_from)) is not None:
        logger.info(table(results))
        return results
    started = time.monotonic()
    check_evaluations(config)
    results, sheets = {}, []
    for directions, splits, train in examples_of(config):
        scores, predictions = score_all(sampler, directions, splits, train, seed)
        results |= scores
        first, *_ = splits
        sheets.append(gallery(splits[first], predictions, directions, sampler))
        if before is None:
            continue
        known = [d for d in directions if _knows(before, d)]
        for key, result in score_all(before, known, splits, train, seed, "before, ")[0].items():
            scores[key]["before"] = result["normalised"]
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)  # of killed processes
    stamp.unlink(missing_ok=True)  # first: a kill between two of these leaves nothing that is taken for whole
    write_png(out / "gallery.png", stacked(sheets))
    write_atomically(out / "metrics.json", json.dumps(results, indent=1).encode())
    write_json(stamp, {"made_from": made_from, "files": {name: digest(out / name) for name in FILES}})
    logger.info(f"{table(results)}\n{out}/metrics.json, {out}/gallery.png in {time.monotonic() - started:.0f} s")
    return results


def _made_from(run: TrainedModel, before: Sampler | None, seed: int) -> dict[str, Any]:
    """What decides the scores, as JSON."""
    c = run.config
    # A source over files says when they change; others are functions of their fields.
    sources = [d.source for d in c.datasets if d.source is not None]
    signatures = [s.signature(c.data_dir) if hasattr(s, "signature") else "" for s in sources]
    return {
        "step": run.step, "seed": seed, "num_samples": c.num_eval_samples, "splits": list(c.eval_splits),
        "directions": to_json(c.evaluations), "datasets": to_json(c.datasets), "signatures": signatures,
        "model": model_digest(run.model, run.tokenizers),
        "before": model_digest(before.model, before.tokenizers) if before is not None else "",
    }  # fmt: skip


def model_digest(model: Model, tokenizers: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of all that a model computes with: its config, parameters and tokenizers."""
    found = hashlib.sha256(json.dumps([to_json(model.config), to_json(list(model.modalities))]).encode())
    for name, x in sorted(parameters(nnx.state(model, nnx.Param)).items()):
        found.update(f"{name} {x.dtype} {x.shape}".encode())
        found.update(np.ascontiguousarray(x).tobytes())
    for name, tokenizer in sorted(tokenizers.items()):
        found.update(f"{name} {tokenizer_hash(tokenizer)}".encode())
    return found.hexdigest()


def _made_before(out: Path, stamp: Path, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """Results that were made from the same, if their files are as they were written."""
    try:
        found = read_json(stamp)
        # Through JSON, for its lists are tuples here.
        same = "files" in found and found["made_from"] == json.loads(json.dumps(made_from))
        same = same and all(digest(out / name) == found["files"][name] for name in FILES)
    except (ValueError, OSError):  # none, of an older version, or damaged: they are made again
        return None
    return json.loads((out / "metrics.json").read_text()) if same else None


def check_evaluations(config: Any) -> None:
    """ValueError, before any step, for an evaluation whose measure cannot score the truth itself on the config's data:
    signals that these lack, or nothing known in them. Prepares the sources."""
    for label, directions, splits, training in _sources_of(config, config.eval_splits):
        wanted = _signals_of(directions)
        for d in directions:
            for name, split in splits.items():
                # Those that are scored, if the first few do not do: perhaps nothing is known of these alone.
                for count, num_train in ((NUM_PROBED, NUM_PROBED), (config.num_eval_samples, NUM_BASELINE)):
                    examples, train = _head(split, count, wanted), _head(training, num_train, wanted)
                    if (error := _measure_error(d, examples, train)) is None:
                        break
                if error is not None:
                    raise ValueError(
                        f"evaluation {d.name}: {type(d.measure).__name__} cannot score {d.target} on the {name} split "
                        f"of data set {label}: {error}"
                    ) from error


def _measure_error(d: ConditionalTask, examples: Sequence[Any], train: Sequence[Any]) -> Exception | None:
    """Why a measure cannot score the truth on these examples."""
    if not examples or not train:
        has_all = " and ".join(sorted(_signals_of([d])))
        return ValueError(f"no {'training ' * bool(examples)}example has all of {has_all}")
    try:
        d.measure.score([e[d.target] for e in examples], examples)
        d.measure.baseline(train, examples)
    except KeyError as error:
        has = ", ".join(sorted({*examples[0]} - {"id", "file"}))
        return ValueError(f"it needs {error} in raw examples, which have {has}; use another measure")
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        return error
    return None


def _sources_of(
    config: Any, names: Sequence[str]
) -> Iterator[tuple[str, list[ConditionalTask], dict[str, Sequence[Any]], Sequence[Any]]]:
    """(label, directions to score on it, its splits of these names, its training split) of each data set with some.

    ValueError for directions that no data set has raw examples for.
    """
    left = list(config.evaluations)
    for label, source in [(d.label, d.source) for d in config.datasets if d.source is not None]:
        if not any(d.dataset in ("", label) for d in left):
            continue
        source.prepare(config.data_dir)
        try:
            splits = {name: read_for(source.split(name, config.data_dir), config.tokenizers) for name in names}
        except ValueError:  # it has no such split
            continue
        some = [split[i] for split in splits.values() for i in range(min(NUM_PROBED, len(split)))]
        has = set.intersection(*({*e} for e in some)) if some else set()
        here = [d for d in left if _signals_of([d]) <= has and d.dataset in ("", label)]
        left = [d for d in left if d not in here]
        if here:
            yield label, here, splits, read_for(source.split("train", config.data_dir), config.tokenizers)
    if left:
        wanted = "; ".join(f"{d.name}: {', '.join((*d.inputs, d.target))}" for d in left)
        raise ValueError(f"no data set has raw examples with the signals of these evaluations: {wanted}")


def _signals_of(directions: Sequence[ConditionalTask]) -> set[str]:
    return {name for d in directions for name in (*d.inputs, d.target)}


def examples_of(
    config: Any, names: Sequence[str] = (), num_train: int = NUM_BASELINE
) -> list[tuple[list[ConditionalTask], dict[str, list[Any]], list[Any]]]:
    """What to score on what: directions; raw examples of each split (default: a config's `eval_splits`); those of
    training that baselines may see. Examples that lack a signal of a direction are left out.

    ValueError for directions that no data set has raw examples for.
    """
    groups = []
    for _, directions, splits, training in _sources_of(config, names or config.eval_splits):
        wanted = _signals_of(directions)
        heads = {k: _head(s, config.num_eval_samples, wanted, f"{k} examples") for k, s in splits.items()}
        train = _head(training, num_train, wanted, "training examples (baselines)")
        groups.append((directions, heads, train))
    return groups


def score_all(
    sampler: Sampler, directions: Sequence[ConditionalTask], splits: Mapping[str, Any], train: Sequence[Any], seed: int,
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
        logger.info(f"no scores from before: {error}")
        return None


def _knows(sampler: Sampler, direction: ConditionalTask) -> bool:
    try:
        for name in direction.inputs:
            sampler.modalities.as_input(name)
        for stage in direction.stages:
            sampler.modalities.as_target(stage.target)
    except ValueError:
        return False
    return True


def sample_gallery(config: Any, model: Any, tokenizers: Mapping[str, Any], step: int, *, count: int = 6) -> np.ndarray:
    """Pictures of what a model makes of the first validation examples; also in FOLDER/galleries/STEP.png."""
    sampler, sheets = Sampler(model, dict(tokenizers)), []
    few = dataclasses.replace(config, num_eval_samples=count)
    for directions, splits, _ in examples_of(few, ["validation"], 0):
        examples = splits["validation"]
        predictions = {
            d.name: sampler({name: [e[name] for e in examples] for name in d.inputs}, d.stages, seed=0)[d.target]
            for d in directions
        }
        sheets.append(gallery(examples, predictions, directions, sampler, rows=count))
    picture = stacked(sheets)
    write_png(config.folder / "galleries" / f"{step:07d}.png", picture)
    return picture


def _head(split: Examples, count: int, wanted: set[str], what: str = "") -> list[Any]:
    """The first examples that have all signals wanted, at most `count`. `what`: of a progress bar."""
    found, total = [], min(count, len(split))
    with tqdm(
        total=total, desc=f"reading {what}", unit="example", file=sys.stdout, mininterval=1, disable=not what
    ) as bar:
        for i in range(min(len(split), NUM_LOOKED_AT * count)):
            if len(found) == total:
                break
            example = split[i]
            if all(name in example and example[name] is not None for name in wanted):
                found.append(example)
                bar.update()
    return found


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


def stacked(sheets: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 pictures one below the other, white beside the narrower ones."""
    width = max(x.shape[1] for x in sheets)
    return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in sheets])


def gallery(examples, predictions, directions: Sequence[ConditionalTask], sampler: Sampler, *, rows: int = 10):
    """uint8 picture: rows = samples; columns = the inputs and truths, then the prediction of each direction."""
    signals = list(dict.fromkeys(name for d in directions for name in (*d.inputs, d.target)))
    targets = {name for m in sampler.modalities if m.is_target for name in (m.name, m.signal)}
    tokenizers = {s: sampler.tokenizer(s) if s in targets else sampler.input_tokenizer(s) for s in signals}
    columns = [(f"{s} (truth)", s, [e[s] for e in examples]) for s in signals]
    columns += [(d.name.replace("_", " "), d.target, predictions[d.name]) for d in directions]
    tiles = [
        {title: tokenizers[s].draw(values[r], image=e["rgb"] if "rgb" in e else None) for title, s, values in columns}
        for r, e in enumerate(examples[:rows])
    ]
    return contact_sheet([("", row) for row in tiles])
