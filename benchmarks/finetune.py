"""Does pretraining help a modality that it never saw, and what is forgotten? python benchmarks/finetune.py

Trains configs/thermal.py (500 samples of the new modality; or another config with `init_from`) with several seeds, each
as it is, from random parameters ("scratch": the same samples, batches and steps), and without rehearsal, from the
pretrained model and from random parameters. Prints one JSON line for each run, and then a table of normalised scores:
means over seeds, their standard errors, and for tasks that the pretrained model knows its own score ("before").
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

from m4.components import write_atomically
from m4.config import Config, load_config
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


def table(results: dict[str, list[dict[str, dict]]]) -> str:
    """Markdown; `results`: metrics of each seed by variant."""
    tasks = list(next(iter(results.values()))[0])
    lines = [f"| trained from | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name, runs in results.items():
        cells = []
        for task in tasks:
            x = np.array([r[task]["normalised"] for r in runs])
            error = f" ± {x.std(ddof=1) / len(x) ** 0.5:.3f}" if len(x) > 1 else ""
            cells.append(f"{x.mean():.3f}{error}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    before = {task: t["before"] for runs in results.values() for r in runs for task, t in r.items() if "before" in t}
    if before:
        cells = [f"{before[task]:.3f}" if task in before else "" for task in tasks]
        lines.append(f"| (before) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/thermal.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", default="runs/finetune.md")
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
    write_atomically(Path(args.out), table(results).encode())
    print(table(results))


if __name__ == "__main__":
    main()
