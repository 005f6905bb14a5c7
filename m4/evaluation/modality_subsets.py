"""What a frozen encoder knows from any subset of signals, and its accuracy when others are missing at test time.

    matrix        linear probes of a label on pooled embeddings (m4.features): rows are subsets of the training samples'
                  signals ("drawn": a random one for each sample), columns subsets of the test samples' signals
    missingness   one signal is missing in half of the samples, all others are always present
                      random    whatever the label
                      by label  in 9 of 10 samples of half of the classes, in 1 of 10 of the others
                      flipped   by label in training, in tests the other way round
                  "presence" is a probe that only knows whether the signal is present

B samples, D width, S subsets
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from m4.checkpoints.runs import TrainedModel
from m4.data.sources.files import read_for
from m4.errors import check, need
from m4.evaluation.base import Evaluator, Report
from m4.evaluation.probes import LABELS, labels_of, linear
from m4.inference.sampler import Sampler
from m4.representations.embed import embed
from m4.tokens.packing import pack

logger = logging.getLogger(__name__)

Subset = tuple[str, ...]
DECAY = 1e-2  # weight decay of the probes
OFTEN = 0.9  # share of samples that lack a signal, in classes that often lack it
MOST_SIGNALS = 5  # they have 31 subsets


def subsets_of(signals: Sequence[str]) -> list[Subset]:
    """All but the empty one, small ones first."""
    return [s for n in range(1, len(signals) + 1) for s in itertools.combinations(signals, n)]


def embeddings(
    sampler: Sampler, examples: Sequence[Mapping[str, Any]], subsets: Sequence[Subset]
) -> dict[Subset, Float[np.ndarray, "B D"]]:
    """Pooled embeddings of each subset's signals."""
    names = sorted({name for subset in subsets for name in subset})
    records = sampler.encode({name: [e[name] for e in examples] for name in names})
    pooled = {}
    for subset in tqdm(subsets, desc="embeddings", unit="subset"):
        members = {sampler.modalities.as_input(name).name for name in subset}
        rows = [pack([{m: r[m] for m in r if m in members}], [0], sampler.modalities) for r in records]
        pooled[subset] = embed(sampler, rows).pooled
    return pooled


def matrix(
    train: Mapping[Subset, Float[np.ndarray, "B D"]],
    labels: Int[np.ndarray, " B"],
    test: Mapping[Subset, Float[np.ndarray, "b D"]],
    truth: Int[np.ndarray, " b"],
    rng: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """Accuracies, {training subset, test subset}."""
    every = np.stack(list(train.values()))
    drawn = every[rng.integers(len(every), size=len(labels)), np.arange(len(labels))]
    columns, result = np.concatenate(list(test.values())), {}
    for name, x in [*((" + ".join(s), x) for s, x in train.items()), ("drawn", drawn)]:
        right = linear(x, labels, columns, DECAY).reshape(len(test), -1) == truth
        result[name] = {" + ".join(s): float(r.mean()) for s, r in zip(test, right, strict=True)}
    return result


def present(
    labels: Int[np.ndarray, " B"], how: str, num_classes: int, rng: np.random.Generator
) -> Bool[np.ndarray, " B"]:
    """In which samples a signal is present. `how`: see the head of this file."""
    often_missing = (labels < num_classes / 2) != (how == "flipped")
    share = np.where(often_missing, OFTEN, 1 - OFTEN) if how != "random" else 0.5
    return rng.random(len(labels)) >= share


def missingness(
    train: Mapping[Subset, Float[np.ndarray, "B D"]],
    labels: Int[np.ndarray, " B"],
    test: Mapping[Subset, Float[np.ndarray, "b D"]],
    truth: Int[np.ndarray, " b"],
    rng: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """Accuracies, {missing signal, or its presence alone: {"random", "by label", "flipped"}}."""
    whole, num_classes, result = max(train, key=len), int(labels.max()) + 1, {}
    for signal in whole if len(whole) > 1 else ():
        rest = tuple(name for name in whole if name != signal)
        rows: dict[str, dict[str, float]] = {signal: {}, f"presence of {signal}": {}}
        for hows in (("random",), ("by label", "flipped")):  # a probe is fitted on the first, and tested on each
            has_train = present(labels, hows[0], num_classes, rng)
            has_test = [present(truth, how, num_classes, rng) for how in hows]
            cases = ((has_train, train), *((has, test) for has in has_test))
            mixed = [np.where(has[:, None], e[whole], e[rest]) for has, e in cases]
            alone = [has[:, None].astype(float) for has in (has_train, *has_test)]
            for row, (x, *tests) in zip(rows.values(), (mixed, alone), strict=True):
                right = linear(x, labels, np.concatenate(tests), DECAY).reshape(len(hows), -1) == truth
                row |= dict(zip(hows, right.mean(1).tolist(), strict=True))
        result |= rows
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subsets(Evaluator):
    """A label predicted from every subset of signals, with probes of every other, and with signals missing at random or
    depending on the label.

    Samples are those of the first data set's source. Probes are fitted on its validation split, which no training
    shows, and tested on its test split.
    """

    label: str = "number of objects"
    """A label of m4.evaluation.probes.LABELS."""
    num_train: int = 512
    """Samples that are fitted on."""
    num_test: int = 1000
    """Samples that are scored."""

    name = "subsets"

    def __post_init__(self):
        check("label", self.label, LABELS)

    def check(self) -> None:
        need("matplotlib", "plots", "the figure of modality subsets")

    def run(self, trained: TrainedModel, report: Report, seed: int) -> dict[str, Any]:
        """subsets.json, .md and .png. ValueError if the samples have no such label."""
        sampler, source = Sampler(trained.model, trained.tokenizers), trained.config.datasets[0].source
        if source is None:
            raise ValueError(f"subsets need raw examples, and {trained.config.datasets[0].label} has token shards only")
        source.prepare(trained.config.data_dir)
        parts = []
        for split, count in (("validation", self.num_train), ("test", self.num_test)):
            examples = read_for(source.split(split, trained.config.data_dir), trained.tokenizers.values())
            parts.append([examples[i] for i in range(min(count, len(examples)))])
        if not all(parts):
            raise ValueError(f"{[*map(len, parts)]} examples for training and tests; some of each are needed")
        has = set.intersection(*({n for n, x in e.items() if x is not None} for part in parts for e in part))
        signals = list(dict.fromkeys(m.signal for m in sampler.modalities if m.is_input and m.signal in has))
        if not signals:
            raise ValueError(f"no input signal of the model is in every example; they have {', '.join(sorted(has))}")
        if len(signals) > MOST_SIGNALS:
            logger.info(
                f"left out, for {MOST_SIGNALS} signals have {2**MOST_SIGNALS - 1} subsets: {signals[MOST_SIGNALS:]}"
            )
            signals = signals[:MOST_SIGNALS]
        values = [labels_of(self.label, part, type(source).__name__) for part in parts]
        classes = sorted(set(values[0]))
        known = [i for i, x in enumerate(values[1]) if x in classes]
        if not known:
            raise ValueError(f"no test example has a value of {self.label!r} that a training example has")
        labels, truth = (np.array([classes.index(x) for x in xs]) for xs in (values[0], [values[1][i] for i in known]))
        subsets = subsets_of(signals)
        train, test = (embeddings(sampler, part, subsets) for part in (parts[0], [parts[1][i] for i in known]))
        rng = np.random.default_rng(seed)
        results = {
            "label": self.label,
            "num_train": len(labels),
            "num_test": len(truth),
            "most frequent": float((truth == np.bincount(labels).argmax()).mean()),
            "matrix": matrix(train, labels, test, truth, rng),
            "missingness": missingness(train, labels, test, truth, rng),
        }
        report.write(results, table(results), {"": figure(results)})
        return results


def table(results: Mapping[str, Any]) -> str:
    """Markdown: the matrix, then the accuracies with missing signals."""
    lines = [
        f"Accuracy of {results['label']}, {results['num_train']} training and {results['num_test']} test samples; the "
        f"most frequent class: {results['most frequent']:.3f}.",
        "",
    ]
    for corner, part in (("train \\ test", "matrix"), ("missing", "missingness")):
        rows = results[part]
        names = list(next(iter(rows.values()))) if rows else []
        lines += [f"| {corner} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(f'{x:.3f}' for x in row.values())} |" for name, row in rows.items()]
        lines.append("")
    return "\n".join(lines)


def figure(results: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure  # seconds to import, used here alone

    rows = results["matrix"]
    values = np.array([[*row.values()] for row in rows.values()])
    drawing = Figure(figsize=(3 + 0.45 * values.shape[1], 3 + 0.35 * len(values)), layout="tight")
    axis = drawing.subplots()
    shown = axis.imshow(values, vmin=results["most frequent"], vmax=1)
    axis.set(xlabel="signals in tests", ylabel="signals in training", title=f"accuracy of {results['label']}")
    axis.set_xticks(range(values.shape[1]), list(next(iter(rows.values()))), rotation=90)
    axis.set_yticks(range(len(values)), list(rows))
    drawing.colorbar(shown)
    return drawing
