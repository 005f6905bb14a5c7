"""Whether one group of a sample's signals finds another group of the same sample by the encoder's pooled embeddings.

    found     ranks of the right answers among all samples, by cosine similarity of embeddings less their group's mean
    shuffled  the same ranking, scored with the right answers of other samples: the score of hubs and duplicates
    chance    the exact mean over all orders of the samples

    recall@k  share of queries with a right answer among the first k
    MRR       mean of 1 / rank of the first right answer, 1 at best
    rank      mean rank of the first right answer, from 0 (first) to 1 (last)

N samples, D width
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from m4.checkpoints.runs import TrainedModel
from m4.data.sources.files import read_for
from m4.errors import closest
from m4.evaluation.base import Evaluator, Report
from m4.evaluation.few_shot import summary
from m4.inference.sampler import Sampler
from m4.pictures import contact_sheet, labelled
from m4.representations.embed import features
from m4.representations.nearest import retrieve

logger = logging.getLogger(__name__)

COUNTS = (1, 5, 10)  # k of recall@k
NUM_DRAWN, NUM_HITS = 4, 5  # queries of each direction in the picture, and their first hits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluator):
    """Two groups of signals of the same samples; each is a query for the other."""

    a: tuple[str, ...] = ("rgb",)
    """Signals of the first group."""
    b: tuple[str, ...] = ("audio",)
    """Signals of the second group, none of them in the first."""
    source: Any = None
    """Raw examples; None is the run's first data set."""
    split: str = "test"
    """Split that is searched."""
    num_samples: int = 1000
    """Samples that are searched: the first that have signals of both groups."""
    label: str = ""
    """Name in raw examples, such as a digit's class: all samples with the query's value of it are right answers. "" is
    its own sample alone."""

    name = "retrieval"

    def __post_init__(self):
        if not self.a or not self.b or {*self.a} & {*self.b}:
            raise ValueError(f"retrieval: a={self.a} and b={self.b} must name signals, and none of them twice")
        if self.num_samples < 2:
            raise ValueError(f"retrieval: num_samples={self.num_samples} must be at least 2")

    def run(self, trained: TrainedModel, report: Report, seed: int) -> dict[str, Any]:
        return self.run_all((self,), trained, report, seed)

    @classmethod
    def run_all(cls, evaluators: Seq[Retrieval], trained: TrainedModel, report: Report, seed: int) -> dict[str, Any]:
        """Several in one table: retrieval.json, .md and .png."""
        sampler, results, rows = Sampler(trained.model, trained.tokenizers), {}, []
        for r in evaluators:
            source = r.source or trained.config.datasets[0].source
            if source is None:
                raise ValueError(
                    "retrieval needs raw examples, and the run's data set has token shards only; give a source"
                )
            examples = r.read(sampler, source, trained.config.data_dir)
            embeddings = {}
            for group, names in r.groups.items():
                progress = functools.partial(tqdm, desc=f"embeddings of {group}", unit="batch", file=sys.stdout)
                signals = {name: [e[name] for e in examples] for name in names}
                pooled = features(sampler, signals, progress=progress).pooled
                embeddings[group] = pooled - pooled.mean(axis=0)  # as the contrastive loss compares them
            right = r.right(examples)
            for query, answer in (r.groups, reversed(r.groups)):
                name = f"{query} -> {answer}" + (f", same {r.label}" if r.label else "")
                if name in results:
                    raise ValueError(f"retrieval: {name!r} is asked twice; evaluate the second one by itself")
                results[name], best = measure(embeddings[query], embeddings[answer], right)
                rows += draw(sampler, name, (r.groups[query], r.groups[answer]), examples, best, right)
        report.write(results, table(results), {"": contact_sheet(rows)})
        return results

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        return {" + ".join(names): names for names in (self.a, self.b)}

    def read(self, sampler: Sampler, source: Any, data_dir: str) -> list[dict[str, Any]]:
        """Raw examples. ValueError for names that neither the model nor the examples know."""
        tokenizers = {name: sampler.input_tokenizer(name) for name in (*self.a, *self.b)}
        source.prepare(data_dir)
        split, examples = read_for(source.split(self.split, data_dir), sampler.tokenizers.values()), []
        for i in tqdm(range(len(split)), desc="reading examples", unit="example", file=sys.stdout, mininterval=1):
            example = split[i]
            signals = {name: t.signal_of(example) for name, t in tokenizers.items()}
            if all(any(signals[n] is not None for n in names) for names in (self.a, self.b)):
                if self.label and self.label not in example:
                    raise ValueError(f"retrieval: unknown label {self.label!r}; {closest(self.label, [*example])}")
                examples.append({**example, **signals})
            if len(examples) == self.num_samples:
                break
        if len(examples) < 2:
            raise ValueError(f"retrieval: {len(examples)} examples of {self.split!r} have both of {list(self.groups)}")
        return examples

    def right(self, examples: Seq[Mapping[str, Any]]) -> Bool[np.ndarray, "N N"]:
        """Which samples are right answers to which."""
        if not self.label:
            return np.eye(len(examples), dtype=bool)
        labels = np.array([str(e[self.label]) for e in examples])
        return labels[:, None] == labels[None]


def first_right(best: Int[np.ndarray, "N N"], right: Bool[np.ndarray, "N N"]) -> Int[np.ndarray, " N"]:
    """Index of each query's first right answer in its ranking. best: samples from the most similar on."""
    return np.take_along_axis(right, best, axis=1).argmax(1)


def figures(places: Int[np.ndarray, " n"], count: int) -> dict[str, Float[np.ndarray, " n"]]:
    """Figures of each query, by name. places: of first right answers among `count` samples, from 0."""
    recalls = {f"recall@{k}": (places < k).astype(float) for k in COUNTS}
    return {**recalls, "MRR": 1 / (places + 1), "rank": places / (count - 1)}


def by_chance(right: Bool[np.ndarray, "N N"]) -> dict[str, float]:
    """Means of `figures` over all orders of the samples. With one right answer of N, recall@k is k / N."""
    count, place = len(right), np.arange(len(right))
    of_place, expected = figures(place, count), []
    for num_right in right.sum(1):
        # Probability that none of the first i samples is right; its decrease is that of a first right answer at i.
        none_right = np.cumprod(np.append(1, np.maximum(count - num_right - place, 0) / (count - place)))
        expected.append([(-np.diff(none_right) * x).sum() for x in of_place.values()])
    return dict(zip(of_place, np.mean(expected, axis=0).tolist(), strict=True))


def shuffled_partners(count: int, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """For each sample another one: the next in one random ring of all."""
    order, partner = rng.permutation(count), np.zeros(count, int)
    partner[order] = np.roll(order, 1)
    return partner


def measure(
    queries: Float[np.ndarray, "N D"], gallery: Float[np.ndarray, "N D"], right: Bool[np.ndarray, "N N"]
) -> tuple[dict[str, dict[str, dict[str, Any]]], Int[np.ndarray, "N N"]]:
    """{found, shuffled, chance: {figure: {"mean", "sem", "num_queries"}}}, and each query's ranking, best first."""
    count = len(right)
    best, _ = retrieve(queries, gallery, k=count)
    others = right[:, shuffled_partners(count, np.random.default_rng(0))]
    rows = {
        name: {k: summary(x) for k, x in figures(first_right(best, answers), count).items()}
        for name, answers in (("found", right), ("shuffled", others))
    }
    chance = {k: {"mean": x, "sem": 0.0, "num_queries": count} for k, x in by_chance(right).items()}
    return {**rows, "chance": chance}, best


def draw(
    sampler: Sampler, name: str, groups: tuple[Seq[str], Seq[str]], examples: Seq[Mapping[str, Any]],
    best: Int[np.ndarray, "N N"], right: Bool[np.ndarray, "N N"],
) -> list[tuple[str, dict[str, np.ndarray]]]:  # fmt: skip
    """Rows of a contact sheet: a query's first signal, and those of its first hits."""

    def tile(i: int, names: Seq[str], text: str) -> np.ndarray:
        signal = next(n for n in names if examples[i][n] is not None)
        image = examples[i]["rgb"] if "rgb" in examples[i] else None
        return labelled(sampler.input_tokenizer(signal).draw(examples[i][signal], image=image), text)

    rows, places = [], first_right(best, right)
    for i in range(min(NUM_DRAWN, len(examples))):
        hits = {
            f"hit {k + 1}": tile(j, groups[1], "right" if right[i, j] else "wrong")
            for k, j in enumerate(best[i, :NUM_HITS])
        }
        rows.append((f"right at {places[i] + 1}, {name}", {"query": tile(i, groups[0], ""), **hits}))
    return rows


def table(results: Mapping[str, Any]) -> str:
    """Markdown: two rows and chance for each direction, a column for each figure."""
    names = list(next(iter(results.values()))["found"])
    lines = [f"| direction | of | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for direction, rows in results.items():
        for answers, cells in rows.items():
            errors = [f" ± {cells[n]['sem']:.3f}" if answers != "chance" else "" for n in names]
            values = [f"{cells[n]['mean']:.3f}{error}" for n, error in zip(names, errors, strict=True)]
            lines.append(f"| {direction} | {answers} | {' | '.join(values)} |")
    counts = {rows["found"][names[0]]["num_queries"] for rows in results.values()}
    lines.append(f"\nMeans and standard errors over {' or '.join(map(str, sorted(counts)))} samples.")
    return "\n".join(lines) + "\n"
