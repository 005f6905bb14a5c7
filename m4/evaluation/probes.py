"""What a frozen encoder knows of an image: labels predicted from pooled embeddings by neighbours and a linear map.

    embeddings      of the trained encoder (m4.features)
    random encoder  of the same encoder before any training
    raw pixels      no encoder at all

Everything is fitted on training images with known labels, and scored on others. B samples, D features, C classes
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax
from tqdm import tqdm

from m4.checkpoints.runs import TrainedModel
from m4.data.sources.stamps import Stamps
from m4.errors import check
from m4.evaluation.base import Evaluator, Report
from m4.in_context.tasks.image_cache import KINDS, image_cache
from m4.inference.sampler import Sampler
from m4.model.encoder_decoder import Model
from m4.representations.embed import features
from m4.training.trainer import random_key

logger = logging.getLogger(__name__)

LABELS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "shape": lambda e: e["objects"][0]["shape"],
    "colour": lambda e: e["objects"][0]["colour"],
    "size": lambda e: e["objects"][0]["size"],
    "number of objects": lambda e: len(e["objects"]),
    "category": lambda e: e["boxes"]["label"][0],
}

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the linear probe's weight decay, chosen on a fifth of the training images


def labels_of(label: str, examples: Seq[Mapping[str, Any]], what: str) -> list[Any]:
    """Values of a label in raw examples. `what`: their source in errors, ValueError if an example lacks the label."""
    try:
        return [LABELS[label](e) for e in examples]
    except KeyError as error:
        raise ValueError(f"examples of {what} have no {error} to read {label!r} from") from error
    except (IndexError, TypeError) as error:
        raise ValueError(f"an example of {what} has nothing to read {label!r} from: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A label of images, fitted on some of them and scored on others."""

    label: str
    """Label that is predicted from embeddings."""
    same: str = ""
    """Signal that is equal in several images of one thing, such as "caption", whose answers are not independent:
    standard errors count things then, not images. "" if no two are."""
    source: Any = KINDS
    """Raw examples, with annotations of their objects."""
    train: str = "heldout"
    """Split that is fitted on."""
    test: str = "heldout"
    """Split that is scored."""
    num_train: int = 2000
    """Images that are fitted on."""
    num_test: int = 1000
    """Images that are scored."""

    def __post_init__(self):
        check("label", self.label, LABELS)

    @property
    def name(self) -> str:
        return f"{type(self.source).__name__.lower()}: {self.label}"

    def read(self, data_dir: str | os.PathLike) -> tuple[tuple[np.ndarray, np.ndarray], list, list, list]:
        """Images [B H W 3] for training and for tests, which do not overlap; labels of both; and the thing that each
        test image shows."""
        self.source.prepare(data_dir)
        try:
            parts = {split: image_cache(self.source, split, data_dir) for split in (self.train, self.test)}
        except KeyError as error:
            raise ValueError(f"{self.name} needs {error} in every raw example") from error
        first = self.num_train if self.train == self.test else 0
        ranges = (self.train, slice(0, self.num_train)), (self.test, slice(first, first + self.num_test))
        annotations = [parts[s].annotations[r] for s, r in ranges]
        if not all(map(len, annotations)):
            counts = [*map(len, annotations)]
            raise ValueError(f"{self.name}: {counts} examples for training and tests; some of each are needed")
        labels = [labels_of(self.label, part, type(self.source).__name__) for part in annotations]
        if self.same and not all(self.same in e for e in annotations[1]):
            has = ", ".join(annotations[1][0])
            raise ValueError(f"{self.name}: same={self.same!r} is not in every example; it has {has}")
        things = [e[self.same] if self.same else i for i, e in enumerate(annotations[1])]
        train, test = (parts[s].rgb[r] for s, r in ranges)
        return (train, test), labels[0], labels[1], things


def whitened(
    train: Float[np.ndarray, "B D"], test: Float[np.ndarray, "b D"], size: int = 128
) -> tuple[Float[np.ndarray, "B d"], Float[np.ndarray, "b d"]]:
    """The first principal components (at most `size`), each with variance one in training."""
    mean = train.mean(0)
    variances, directions = np.linalg.eigh(np.cov((train - mean).T.astype(np.float64)))
    variances, directions = variances[::-1][:size], directions[:, ::-1][:, :size]
    scaled = directions / np.sqrt(np.maximum(variances, 0) + 1e-3 * variances.mean())
    return (train - mean) @ scaled, (test - mean) @ scaled


def neighbours(
    train: Float[np.ndarray, "B D"], labels: Int[np.ndarray, " B"], test: Float[np.ndarray, "b D"], k: int = 10
) -> Int[np.ndarray, " b"]:
    """The most frequent class among the k nearest by cosine similarity of whitened vectors.

    Without whitening a few directions, such as the light's, decide what is near, in embeddings and pixels alike.
    """
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in whitened(train, test)]
    nearest = np.argsort(-(unit[1] @ unit[0].T), axis=1, kind="stable")[:, :k]
    return np.array([np.bincount(row).argmax() for row in labels[nearest]])


def linear(
    train: Float[np.ndarray, "B D"], labels: Int[np.ndarray, " B"], test: Float[np.ndarray, "b D"], decay: float
) -> Int[np.ndarray, " b"]:
    """Multinomial logistic regression on standardised features; `decay` / 2 times the squared weights is added."""
    mean, scale = train.mean(0), np.maximum(train.std(0), 1e-6)
    x, y = ((a - mean) / scale for a in (train, test))
    x, y = (np.concatenate([a, np.ones((len(a), 1))], axis=1).astype(np.float64) for a in (x, y))
    truth, shape = np.eye(labels.max() + 1)[labels], (x.shape[1], labels.max() + 1)

    def loss(flat):
        weights = flat.reshape(shape)
        log = log_softmax(x @ weights, axis=1)
        gradient = x.T @ (np.exp(log) - truth) / len(x) + decay * weights
        return -(log * truth).sum() / len(x) + decay / 2 * (weights**2).sum(), gradient.ravel()

    weights = minimize(loss, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return (y @ weights.reshape(shape)).argmax(1)


def clustered(right: Float[np.ndarray, " B"], things: np.ndarray) -> dict[str, float | int]:
    """Mean, and its standard error if answers about one thing are not independent (Liang & Zeger 1986)."""
    _, cluster = np.unique(things, return_inverse=True)
    sums = np.bincount(cluster, right - right.mean())
    count = len(sums)
    sem = (count / max(count - 1, 1) * (sums**2).sum()) ** 0.5 / len(right)
    return {"mean": float(right.mean()), "sem": float(sem), "num_things": count}


def accuracies(train, labels, test, truth, things) -> dict[str, dict[str, float | int]]:
    """{"k-NN", "linear": accuracy and its standard error}; the linear probe's decay is chosen on a held-out fifth."""
    n = len(train) * 4 // 5
    chosen = max(STRENGTHS, key=lambda s: (linear(train[:n], labels[:n], train[n:], s) == labels[n:]).mean())
    predicted = {"k-NN": neighbours(train, labels, test), "linear": linear(train, labels, test, chosen)}
    return {name: clustered(np.asarray(answers == truth, float), things) for name, answers in predicted.items()}


def default_probes() -> tuple[Probe, ...]:
    """Attributes of kinds that no training of scenes shows, and categories of cut-outs, if these are installed."""
    scenes = tuple(Probe(label=name) for name in ("shape", "colour", "size"))
    stamps = Stamps(max_objects=1, num_train=6000, num_validation=8, num_test=3000)
    category = Probe(
        label="category", source=stamps, train="train", test="test", num_train=6000, num_test=3000, same="caption"
    )
    return (*scenes, category)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probes(Evaluator):
    """Labels predicted from the frozen encoder's embeddings, by nearest neighbours and by a linear map."""

    probes: tuple[Probe, ...] = ()
    """What is probed; () is all that the packaged data know."""

    name = "probes"

    def run(self, trained: TrainedModel, report: Report, seed: int) -> dict[str, Any]:
        """probes.json and probes.md."""
        random = Model(
            trained.config.model, trained.model.modalities, rngs=nnx.Rngs(random_key(trained.config.seed + 1))
        )
        encoders = {
            "embeddings": Sampler(trained.model, trained.tokenizers),
            "random encoder": Sampler(random, trained.tokenizers),
        }
        results: dict[str, Any] = {}
        encoded: dict[Any, Any] = {}  # images and their embeddings, which several labels share
        for probe in self.probes or default_probes():
            key = dataclasses.replace(probe, label="category")
            try:
                images, *labels, things = probe.read(trained.config.data_dir)
            except ValueError as error:
                if self.probes:
                    raise
                logger.info(f"{probe.name} is left out: {error}")
                continue
            if key not in encoded:
                # Means of 4 x 4 raw pixels: a linear probe of all is slow.
                encoded[key] = {
                    "raw pixels": [
                        reduce(part.astype(np.float32) / 255, "b (h y) (w x) c -> b (h w c)", "mean", y=4, x=4)
                        for part in images
                    ]
                }
                for name, sampler in encoders.items():
                    progress = functools.partial(
                        tqdm, desc=f"{type(probe.source).__name__.lower()}, {name}", unit="batch"
                    )
                    embed = functools.partial(features, sampler, progress=progress)
                    encoded[key][name] = [embed({"rgb": list(part)}).pooled for part in images]
            classes = sorted(set(labels[0]))
            seen = [i for i, label in enumerate(labels[1]) if label in classes]
            given, truth = (np.array([classes.index(x) for x in y]) for y in (labels[0], [labels[1][i] for i in seen]))
            things = np.array(things)[seen]
            frequent = clustered(np.asarray(truth == np.bincount(given).argmax(), float), things)
            results[probe.name] = {"most frequent": {"k-NN": frequent}} | {
                name: accuracies(x, given, y[seen], truth, things) for name, (x, y) in encoded[key].items()
            }
        report.write(results, table(results))
        return results


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each label and encoder."""
    lines = ["| label | of | k-NN | linear |", "|---|---|---|---|"]
    for probe, rows in results.items():
        for name, cells in rows.items():
            figures = [
                f"{cells[c]['mean']:.3f} ± {cells[c]['sem']:.3f}" if c in cells else "" for c in ("k-NN", "linear")
            ]
            lines.append(f"| {probe} | {name} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"
