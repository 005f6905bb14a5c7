"""RUN_A RUN_B --out DIR: averages two related models in several shares, keeps the best.

Both are fine-tuned from one model, or RUN_B from RUN_A. Each model between them has parameters
(1 - alpha) x RUN_A + alpha x RUN_B. Writes merge.json, merge.md and merge.png (normalised
validation scores over alpha; test scores of both ends and of the best), and the model whose
validation scores have the highest mean, into DIR, which other commands take as RUN. Scores are
those of RUN_B's config. A modality that RUN_B alone has keeps its parameters.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np

from m4.adaptation.interpolation import interpolate
from m4.checkpoints.runs import check_tokenizers, load_run, replacing_run
from m4.command_line import parser_of
from m4.errors import need
from m4.evaluation.conditional_generation import ConditionalGeneration, score_all
from m4.inference.sampler import Sampler


def sweep(
    run_a: str | Path, run_b: str | Path, alphas: Seq[float], out: str | Path
) -> dict[str, dict[str, dict[str, float]]]:
    """Normalised scores {"validation", "test": {alpha: {task: score}}}; see `python -m m4 merge`."""
    need("matplotlib", "plots", "the figure of scores against alpha")
    started, out = time.monotonic(), Path(out)
    a, b = load_run(run_a), load_run(run_b)
    if not alphas or not all(math.isfinite(x) for x in alphas):
        raise ValueError(f"alphas must be finite numbers, at least one; got {list(alphas)}")
    generation = next((e for e in b.config.evaluators if isinstance(e, ConditionalGeneration)), None)
    if generation is None:
        raise ValueError(f"the config of {run_b} has no ConditionalGeneration in its evaluators")
    check_tokenizers(run_a, b.tokenizers)
    interpolate(a.model, b.model, alphas[0])  # ValueError for models that do not fit, before any work
    examples = {split: generation.examples(b.config, [split]) for split in ("validation", "test")}

    def score(alpha: float, split: str) -> dict[str, float]:
        sampler, normalised = Sampler(interpolate(a.model, b.model, alpha), b.tokenizers), {}
        for tasks, splits, train in examples[split]:
            scores, _ = score_all(sampler, tasks, splits, train, 0, f"alpha {alpha:g}, {split}, ")
            normalised |= {key: r["normalised"] for key, r in scores.items()}
        return normalised

    results: dict[str, dict[str, dict[str, float]]] = {"validation": {}, "test": {}}
    for alpha in alphas:
        results["validation"][f"{alpha:g}"] = score(alpha, "validation")
        print(table(results), flush=True)
    best = max(alphas, key=lambda x: np.mean([*results["validation"][f"{x:g}"].values()]))
    for alpha in sorted({min(alphas), best, max(alphas)}):
        results["test"][f"{alpha:g}"] = score(alpha, "test")
    chosen = interpolate(a.model, b.model, best)
    config = dataclasses.replace(b.config, model=chosen.config)
    with replacing_run(dataclasses.replace(b, model=chosen, config=config), out, dtype="F32") as folder:
        (folder / "merge.json").write_text(json.dumps(results, indent=1))
        (folder / "merge.md").write_text(table(results))
        curves(results["validation"], folder / "merge.png")
    seconds = time.monotonic() - started
    print(f"{table(results)}\nalpha {best:g} in {out}, with merge.json, .md, .png, in {seconds:.0f} s", flush=True)
    return results


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown: a row for each alpha and split, a column for each task, their mean last."""
    rows = [(alpha, split, row) for split, by_alpha in results.items() for alpha, row in by_alpha.items()]
    names = list(rows[0][2])
    lines = [f"| alpha | split | {' | '.join(names)} | mean |", "|---" * (len(names) + 3) + "|"]
    for alpha, split, row in rows:
        figures = [f"{x:.3f}" for x in (*row.values(), np.mean([*row.values()]))]
        lines.append(f"| {alpha} | {split} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def curves(results: Mapping[str, Mapping[str, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="tight")  # seconds to import, used here alone
    axis = figure.subplots()
    alphas = sorted(results, key=float)
    for name in results[alphas[0]]:
        axis.plot([float(x) for x in alphas], [results[x][name] for x in alphas], marker="o", label=name)
    axis.set(xlabel="alpha", ylabel="normalised score")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def main(argv: list[str]) -> None:
    parser = parser_of("merge", __doc__)
    parser.add_argument("run_a", help="alpha 0: folder of a run, or name of a model in the package")
    parser.add_argument("run_b", help="alpha 1: another, with all modalities of the first")
    parser.add_argument(
        "--alphas", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], metavar="X", help="shares of RUN_B"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    args = parser.parse_args(argv)

    sweep(args.run_a, args.run_b, args.alphas, args.out)
