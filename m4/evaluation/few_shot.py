"""Accuracy of few-shot tasks against the number of examples, beside what a model would score for the wrong reasons.

    chance           of guessing among the candidates
    shots            unchanged examples; 0 of them: zero-shot
    open             the same, answered freely instead of chosen among candidates
    shuffled_labels  outputs permuted among the examples of a prompt (Min et al. 2022), three times; some stay right by
                     chance, and a single one always does
    shuffled_images  images of another episode
    text_only        no images in the examples (for tasks whose answer is no image)
    nearest_mean     without training or context: the class whose mean embedding, by the evaluated model's encoder, is
                     nearest; where the answer is one of the labels in the prompt
    gda              the same with a covariance that classes share: Gaussian discriminant analysis (Wang et al. 2024)
    tokens_N         at the largest number of shots: N tokens of each context image

K examples, D width of embeddings, Q queries
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from m4.checkpoints.runs import TrainedModel
from m4.errors import need
from m4.evaluation.base import Evaluator, Report
from m4.in_context.prompting import ShotsDropped, answer, score
from m4.in_context.shots import encode
from m4.in_context.tasks.counting import Counting
from m4.in_context.tasks.fast_binding import FastBinding
from m4.in_context.tasks.operators import OperatorInduction
from m4.inference.sampler import Sampler
from m4.masking.episodes import Episode, Shot, Task, is_several
from m4.pictures import contact_sheet, labelled
from m4.representations.embed import embed
from m4.tokens.packing import pack

logger = logging.getLogger(__name__)

NUM_SHUFFLES = 3  # of labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(Evaluator):
    """What is measured: every task with each number of shots, on `seeds` draws of `num_queries` episodes each."""

    tasks: tuple[Any, ...] = (FastBinding(), OperatorInduction(), Counting())
    """Tasks (m4.in_context.tasks), each once."""
    shots: tuple[int, ...] = (0, 1, 2, 4, 8)
    """Numbers of labelled examples in a prompt; 0 is zero-shot."""
    num_queries: int = 200
    """Episodes of each draw."""
    seeds: int = 3
    """Independent draws of episodes."""
    num_tokens: int | tuple[int, ...] = 16
    """Tokens of each context image, one number or one for each task; 0 is all."""
    token_counts: tuple[int, ...] = (1, 4, 16, 64)
    """Tokens of each context image along the curve of accuracy against tokens; () draws none."""
    calibrate: bool = False
    """Subtract from each candidate's score its score after a query without content."""

    name = "fewshot"

    def __post_init__(self):
        if not self.tasks or not self.shots or min(*self.shots, 0) < 0 or min(self.num_queries, self.seeds) < 1:
            raise ValueError(f"a few-shot evaluation needs tasks, shots of at least 0, queries and seeds: {self}")
        if not isinstance(self.num_tokens, int) and len(self.num_tokens) != len(self.tasks):
            raise ValueError(
                f"num_tokens={self.num_tokens} must be one number, or one for each of {len(self.tasks)} tasks"
            )
        for task in self.tasks:
            if task.max_shots < max(self.shots):
                raise ValueError(f"{task.name} has max_shots={task.max_shots}, and shots={self.shots} are requested")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"each task can be measured once; got {', '.join(names)}")
        if min(self.token_counts, default=1) < 1 or self.seeds * self.num_queries < 2:
            raise ValueError(f"token_counts must be at least 1, and queries at least 2: {self}")

    def check(self) -> None:
        need("matplotlib", "plots", "the figure of few-shot scores")

    def run(self, trained: TrainedModel, report: Report, seed: int) -> dict[str, Any]:
        """fewshot.json, .md, .png and fewshot_prompts.png."""
        sampler, data_dir, results = Sampler(trained.model, trained.tokenizers), trained.config.data_dir, {}
        for task in self.tasks:
            sampler.tokenizer(task.output)  # ValueError before any work
        for task in self.tasks:
            task.prepare(data_dir)
        total = sum(num_scores(task, self) for task in self.tasks)
        with tqdm(total=total, desc="few-shot", unit="score", file=sys.stdout, mininterval=1) as bar:
            for task in self.tasks:
                results[task.name] = evaluate_task(sampler, task, self, data_dir, bar)
        pictures = {"": curves(results, self), "_prompts": prompts(sampler, self, data_dir)}
        report.write(results, table(results, self), pictures)
        return results

    def tokens_of(self, task: Task) -> int:
        return self.num_tokens if isinstance(self.num_tokens, int) else self.num_tokens[self.tasks.index(task)]


def shuffle_labels(shots: Seq[Shot], rng: np.random.Generator, other: Episode) -> list[Shot]:
    order = rng.permutation(len(shots))
    return [dataclasses.replace(shot, outputs=shots[i].outputs) for shot, i in zip(shots, order, strict=True)]


def shuffle_images(shots: Seq[Shot], rng: np.random.Generator, other: Episode) -> list[Shot]:
    return [_with_images(shot, donor) for shot, donor in zip(shots, other.shots, strict=False)]


def text_only(shots: Seq[Shot], rng: np.random.Generator, other: Episode) -> list[Shot]:
    return [_with_images(shot, None) for shot in shots]


def _with_images(shot: Shot, other: Shot | None) -> Shot:
    """All images replaced by another example's, or left out."""

    def replaced(signals: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
        images = {n for n, v in signals.items() if isinstance(v, np.ndarray) or is_several(v)}
        return {n: others[n] if n in images else v for n, v in signals.items() if n not in images or n in others}

    other = other or Shot(inputs={})
    return Shot(inputs=replaced(shot.inputs, other.inputs), outputs=replaced(shot.outputs, other.outputs))


CONTROLS: dict[str, Callable[[Seq[Shot], np.random.Generator, Episode], list[Shot]]] = {
    "shuffled_labels": shuffle_labels,
    "shuffled_images": shuffle_images,
    "text_only": text_only,
}


# ---- Baselines without training -------------------------------------------------------------------------------------


def embeddings(sampler: Sampler, shots: Seq[Shot]) -> Float[np.ndarray, "K D"]:
    """Mean of the encoder's outputs for each example's inputs, read as a query."""
    rows = []
    for shot in shots:
        records = encode(Shot(inputs=shot.inputs), sampler.tokenizers, sampler.modalities)
        rows.append(pack(records, range(len(records)), sampler.modalities))
    return embed(sampler, rows).pooled


def nearest_mean(
    shots: Float[np.ndarray, "K D"], labels: Seq[Any], query: Float[np.ndarray, " D"], shared: bool = False
) -> Any:
    """The label of the nearest class mean; `shared`: by a precision that classes share, D ((K - 1) S + tr(S) I)^-1
    (Kubokawa and Srivastava 2008, as Wang et al. 2024 use it for few examples).
    """
    classes = list(dict.fromkeys(labels))
    class_of = np.array([classes.index(label) for label in labels])
    means = np.stack([shots[class_of == c].mean(0) for c in range(len(classes))])
    difference = query - means
    if shared:
        within = shots - means[class_of]
        covariance = within.T @ within / max(len(shots) - 1, 1)
        ridge = np.trace(covariance) + 1e-6
        precision = np.linalg.inv((len(shots) - 1) * covariance + ridge * np.eye(len(query)))
        return classes[int(np.einsum("cd,de,ce->c", difference, precision, difference).argmin())]
    return classes[int((difference**2).sum(1).argmin())]


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def summary(correct: Seq[float] | np.ndarray) -> dict[str, Any]:
    """Mean, its standard error over queries, and their number."""
    correct = np.asarray(correct, float)
    sem = correct.std(ddof=1) / len(correct) ** 0.5 if len(correct) > 1 else 0.0
    return {"mean": float(correct.mean()), "sem": float(sem), "num_queries": len(correct)}


def judge(sampler: Sampler, task: Task, episodes: Seq[Episode], shots: Seq[Seq[Shot]], c: FewShot, **options) -> list:
    """Whether (or how far) each query's answer is right: chosen among its candidates, or free where it has none."""
    questions = [dataclasses.replace(e.query, outputs={}) for e in episodes]
    settings: dict[str, Any] = {"num_tokens": c.tokens_of(task), "shots": shots, **options}
    is_free = settings.pop("free", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShotsDropped)
        try:
            if episodes[0].candidates and not is_free:
                candidates = [e.candidates for e in episodes]
                scores = score(sampler, questions, task.output, candidates, calibrate=c.calibrate, **settings)
                answers = [choices[int(row.argmax())] for row, choices in zip(scores, candidates, strict=True)]
            else:
                answers = answer(sampler, questions, task.output, **settings)[task.output]
        except ShotsDropped as dropped:
            raise ValueError(f"{task.name} cannot be measured with so many shots: {dropped}") from dropped
    return [float(task.correct(x, episode)) for x, episode in zip(answers, episodes, strict=True)]


def num_scores(task: Task, c: FewShot) -> int:
    """Scores of a task, at most, for the progress bar: open tasks have fewer."""
    with_shots = sum(k > 0 for k in c.shots)
    return 2 * len(c.shots) + (5 * with_shots + len(c.token_counts) if task.images else with_shots)


def evaluate_task(sampler: Sampler, task: Task, c: FewShot, data_dir: str, bar: tqdm) -> dict[str, dict[str, Any]]:
    """{condition: {number of shots: {"mean", "sem", "num_queries"}}}; all on the same episodes."""
    num = min(c.seeds * c.num_queries, getattr(task, "num_queries", 1 << 30))  # a benchmark may have fewer
    episodes = [task.draw("test", i, data_dir) for i in range(num)]
    others = [*episodes[1:], episodes[0]]
    rngs = [np.random.default_rng([7, i]) for i in range(num)]
    results: dict[str, dict[str, Any]] = {}

    def note(condition: str, count: int, correct: Seq[float] | np.ndarray) -> None:
        results.setdefault(condition, {})[str(count)] = summary(correct)
        bar.set_postfix_str(f"{task.name} {condition} {count}")
        bar.update()

    closed = bool(episodes[0].candidates)
    has_images = task.images > 0
    answer_is_image = any(isinstance(v, np.ndarray) for v in episodes[0].query.outputs.values())
    if closed:
        chance = summary([1 / len(e.candidates) for e in episodes])
        results["chance"] = {str(k): chance for k in c.shots}
    answers_are_labels = closed and all(s.outputs[task.output] in e.candidates for e in episodes for s in e.shots)
    for k in c.shots:
        plain = [list(e.shots[:k]) for e in episodes]
        note("shots", k, judge(sampler, task, episodes, plain, c))
        if closed:
            note("open", k, judge(sampler, task, episodes, plain, c, free=True))
        for name, control in CONTROLS.items() if k else ():
            if not (has_images or name == "shuffled_labels") or (name == "text_only" and answer_is_image):
                continue
            correct = []
            for _ in range(NUM_SHUFFLES if name == "shuffled_labels" else 1):
                changed = [control(s, rng, other) for s, rng, other in zip(plain, rngs, others, strict=True)]
                correct.append(judge(sampler, task, episodes, changed, c))
            note(name, k, np.mean(correct, axis=0))
    if has_images and answers_are_labels:
        inputs = embeddings(sampler, [shot for e in episodes for shot in (*e.shots, e.query)])
        inputs = inputs.reshape(num, -1, inputs.shape[-1])
        for k in [k for k in c.shots if k]:
            for name, shared in (("nearest_mean", False), ("gda", True)):
                answers = [
                    nearest_mean(x[:k], [s.outputs[task.output] for s in e.shots[:k]], x[-1], shared)
                    for x, e in zip(inputs, episodes, strict=True)
                ]
                note(name, k, [float(task.correct(x, e)) for x, e in zip(answers, episodes, strict=True)])
    if has_images:
        k = max(c.shots)
        for count in c.token_counts:
            plain = [list(e.shots[:k]) for e in episodes]
            note(f"tokens_{count}", k, judge(sampler, task, episodes, plain, c, num_tokens=count))
    return results


def prompt_row(episode: Episode, shots: Seq[Shot], answer: Any, right: bool | float) -> dict[str, np.ndarray]:
    """A prompt as people read it: a tile for each image with its example's text below it; the query's answer last."""
    pictures: dict[str, np.ndarray] = {}

    def add(title: str, signals: Seq[Any], text: str) -> None:
        flat = [x for s in signals for x in (s if is_several(s) else [s])]
        images = [x for x in flat if isinstance(x, np.ndarray)] or [None]
        for i, image in enumerate(images):
            pictures[title if len(images) == 1 else f"{title}, image {i + 1}"] = labelled(image, text)

    def text_of(*signals: Any) -> str:
        plain = lambda x: "".join(str(part) for part in x) if isinstance(x, tuple) else x  # noqa: E731
        return " > ".join(plain(x) for x in signals if isinstance(x, str | tuple))

    for i, shot in enumerate(shots):
        signals = [*shot.inputs.values(), *shot.outputs.values()]
        add(f"shot {i + 1}", signals, text_of(*signals))
    add("query", [*episode.query.inputs.values()], text_of(*episode.query.inputs.values()))
    truth = text_of(*episode.query.outputs.values())
    text = f"{answer if isinstance(answer, str) else ''} ({'right' if right >= 0.5 else f'wrong: {truth}'})"
    add("answer", [answer], text)
    return pictures


def prompts(sampler: Sampler, c: FewShot, data_dir: str) -> np.ndarray:
    """One prompt of each task, of at most 4 examples, with the model's free answer."""
    rows = []
    for task in c.tasks:
        episode = task.draw("test", 0, data_dir)
        shots, query = episode.shots[:4], dataclasses.replace(episode.query, outputs={})
        predicted = answer(sampler, query, task.output, shots=shots, num_tokens=c.tokens_of(task))[task.output]
        rows.append((task.name, prompt_row(episode, shots, predicted, task.correct(predicted, episode))))
    return contact_sheet(rows)


def table(results: Mapping[str, Any], c: FewShot) -> str:
    """Markdown: a row for each task and condition, a column for each number of shots."""
    lines = [
        "| task | condition | " + " | ".join(f"{k} shots" for k in c.shots) + " |",
        "|---|---|" + "---|" * len(c.shots),
    ]
    for task, conditions in results.items():
        for condition, cells in conditions.items():
            figures = [
                f"{cells[str(k)]['mean']:.3f} ± {cells[str(k)]['sem']:.3f}" if str(k) in cells else "" for k in c.shots
            ]
            lines.append(f"| {task} | {condition} | " + " | ".join(figures) + " |")
    queries = f"{c.seeds * c.num_queries} queries ({c.seeds} draws of {c.num_queries} episodes)"
    lines.append(f"\nMeans and standard errors over {queries}, or as many as a benchmark has.")
    return "\n".join(lines) + "\n"


def curves(results: Mapping[str, Any], c: FewShot) -> Any:
    """One panel for each task: accuracy against shots, a line for each condition."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 3.6), layout="tight")  # seconds to import, used here alone
    axes = figure.subplots(1, len(results), squeeze=False, sharey=True)
    for axis, (task, conditions) in zip(axes[0], results.items(), strict=True):
        for condition, cells in conditions.items():
            if not condition.startswith("tokens_"):
                counts = sorted(map(int, cells))
                means, errors = ([cells[str(k)][field] for k in counts] for field in ("mean", "sem"))
                style = {"linewidth": 2.5, "color": "black"} if condition == "shots" else {"linewidth": 1, "alpha": 0.8}
                axis.errorbar(counts, means, errors, label=condition, marker="o", markersize=3, **style)
        axis.set(title=task, xlabel="examples in the context", ylim=(0, 1), xticks=list(c.shots))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy")
    axes[0][-1].legend(fontsize=7, loc="lower right")
    return figure
