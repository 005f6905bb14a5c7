"""Does pretraining help a modality that it never saw, and what is forgotten? python benchmarks/new_modality.py

Trains configs/thermal.py (500 samples of the new modality; or another config with `init_from`) with several seeds, each
as it is and from random parameters ("scratch": the same samples, batches and steps); on request also without rehearsal.
Prints one JSON line for each run, then a table of normalised scores: means over seeds, their standard errors, and for
tasks that the pretrained model knows its own score ("before"). Writes new_modality.json:

    {DIRECTION: {VARIANT: {"mean", "sem", "num_seeds"}, ...}, ..., "old_tasks": {TASK: {"before", "after", ...}}}

"after" and its "sem" and "num_seeds" are those of the first variant that began from the pretrained model.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

sys.path.pop(0)  # this folder: its tokenizers.py would hide the library
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from m4.config import Config, load_config
from m4.files import write_atomically
from train import main as train

VARIANTS = {
    "pretrained": {},
    "scratch": {"init_from": ""},
    "pretrained, no rehearsal": {"rehearsal": False},
    "scratch, no rehearsal": {"init_from": "", "rehearsal": False},
}


def variant(config: Config, name: str, seed: int) -> Config:
    options = dict(VARIANTS[name])
    datasets = config.datasets if options.pop("rehearsal", True) else config.datasets[:1]
    workdir = f"runs/{config.name}_{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    return dataclasses.replace(config, datasets=datasets, seed=seed, workdir=workdir, **options)


def summary(runs: list[dict[str, dict]], task: str) -> dict[str, float | int | None]:
    """Of the normalised scores of several seeds; one has no standard error."""
    x = np.array([r[task]["normalised"] for r in runs])
    sem = float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else None
    return {"mean": float(x.mean()), "sem": sem, "num_seeds": len(x)}


def figures(results: dict[str, list[dict[str, dict]]]) -> dict[str, dict]:
    """What is written; `results`: metrics of each seed by variant."""
    kept = [runs for runs in results.values() if any("before" in r for r in runs[0].values())]
    before = {task: r["before"] for task, r in kept[0][0].items() if "before" in r} if kept else {}
    tasks = [task for task in next(iter(results.values()))[0] if task not in before]
    found: dict[str, dict] = {t: {name: summary(runs, t) for name, runs in results.items()} for t in tasks}
    old = {task: summary(kept[0], task) for task in before}
    after = {task: {"after": x["mean"], "sem": x["sem"], "num_seeds": x["num_seeds"]} for task, x in old.items()}
    return found | {"old_tasks": {task: {"before": before[task], **x} for task, x in after.items()}}


def table(results: dict[str, list[dict[str, dict]]]) -> str:
    """Markdown."""
    tasks = list(next(iter(results.values()))[0])
    lines = [f"| trained from | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name, runs in results.items():
        found = [summary(runs, task) for task in tasks]
        cells = [f"{x['mean']:.3f}" + ("" if x["sem"] is None else f" ± {x['sem']:.3f}") for x in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if old := figures(results)["old_tasks"]:
        cells = [f"{old[task]['before']:.3f}" if task in old else "" for task in tasks]
        lines.append(f"| (before) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/thermal.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["pretrained", "scratch"])
    parser.add_argument("--out", default="new_modality.json")
    args = parser.parse_args()
    config, results = load_config(args.config), {}
    for name in args.variants:
        for seed in args.seeds:
            c = variant(config, name, seed)
            with contextlib.redirect_stdout(sys.stderr):
                train(c)
            scores = json.loads((c.folder / "metrics.json").read_text())
            line = {"variant": name, "seed": seed, "workdir": str(c.folder)}
            print(json.dumps(line | {k: round(r["normalised"], 4) for k, r in scores.items()}), flush=True)
            results.setdefault(name, []).append(scores)
    write_atomically(Path(args.out), json.dumps(figures(results), indent=1).encode())
    print(table(results))


if __name__ == "__main__":
    main()
