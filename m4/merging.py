"""Models between two: their parameters interpolated (Wortsman et al. 2022, WiSE-FT, section 3).

    (1 - alpha) x A + alpha x B

Tables are interpolated by modality. What only one of the two has stays as it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from m4.checkpoints import load_run, write_run
from m4.components import write_atomically
from m4.evals.suite import examples_of, score_all
from m4.model import Model
from m4.model_file import from_parameters, parameters
from m4.sampler import Sampler


def _pieces(model: Model) -> dict[str, Any]:
    """Parameters by name, those of tables as TABLE[MODALITY]."""
    found = parameters(nnx.state(model, nnx.Param))
    for table, rows in model.table_rows.items():
        x = found.pop(table)
        found |= {f"{table}[{m}]": x[rows[i] : rows[i + 1]] for i, m in enumerate(model.modalities.names)}
    return found


def interpolate(a: Model, b: Model, alpha: float) -> Model:
    """A model like b. ValueError if a has what b lacks, or in another shape."""
    theirs, own = _pieces(a), _pieces(b)
    wrong = [f"{n} {list(x.shape)}" for n, x in theirs.items() if n not in own or own[n].shape != x.shape]
    if wrong:
        raise ValueError(f"the second model lacks parameters of the first, or has others: {', '.join(wrong[:5])}")
    mixed = {n: (1 - alpha) * theirs[n] + alpha * x if n in theirs else x for n, x in own.items()}
    for table in b.table_rows:
        mixed[table] = jnp.concatenate([mixed[f"{table}[{m}]"] for m in b.modalities.names])
    graph, state = nnx.split(b, nnx.Param)
    return nnx.merge(graph, from_parameters(state, lambda name: mixed[name]))


def sweep(run_a: str | Path, run_b: str | Path, alphas: Seq[float], out: str | Path) -> dict[str, dict[str, float]]:
    """Normalised scores by alpha and direction; see `python -m m4 merge`."""
    started, out = time.monotonic(), Path(out)
    a, b = load_run(run_a), load_run(run_b)
    if not alphas or not all(math.isfinite(x) for x in alphas):
        raise ValueError(f"alphas must be finite numbers, at least one; got {list(alphas)}")
    if not b.config.evaluations:
        raise ValueError(f"the config of {run_b} names no evaluations")
    interpolate(a.model, b.model, alphas[0])  # says what does not fit before any work
    splits, train = examples_of(b.config)
    results: dict[str, dict[str, float]] = {}
    for alpha in alphas:
        sampler = Sampler(interpolate(a.model, b.model, alpha), b.tokenizers)
        scores, _ = score_all(sampler, b.config.evaluations, splits, train, 0, f"alpha {alpha:g}, ")
        results[f"{alpha:g}"] = {key: r["normalised"] for key, r in scores.items()}
        print(table(results), flush=True)
    best = max(alphas, key=lambda x: np.mean([*results[f"{x:g}"].values()]))
    write_run(dataclasses.replace(b, model=interpolate(a.model, b.model, best)), out, dtype="F32")
    write_atomically(out / "merge.json", json.dumps(results, indent=1).encode())
    write_atomically(out / "merge.md", table(results).encode())
    curves(results, out / "merge.png")
    print(f"alpha {best:g} in {out}, with merge.json, .md, .png, in {time.monotonic() - started:.0f} s", flush=True)
    return results


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row for each alpha, a column for each direction, their mean last."""
    (names, *_) = (list(row) for row in results.values())
    lines = [f"| alpha | {' | '.join(names)} | mean |", "|---" * (len(names) + 2) + "|"]
    for alpha, row in results.items():
        figures = [f"{x:.3f}" for x in (*row.values(), np.mean([*row.values()]))]
        lines.append(f"| {alpha} | {' | '.join(figures)} |")
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
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(file)
