"""What steps, guidance and ensembles do to a trained model's scores: python benchmarks/sweeps.py runs/quickstart

Draws sweeps.png: for depth -> rgb and caption -> rgb the score (normalised as in `evaluate`) over the number of MaskGIT
and ROAR steps, and over the guidance scale; and measures rgb -> depth with ensembles of N samples, each against one
sample on the same scenes, with the standard error of the difference. On the first test scenes; one JSON line each.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.pop(0)  # this folder: its tokenizers.py would hide the library
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from PIL import Image, ImageDraw

from m4.checkpoints.runs import load_run
from m4.evaluation.measures.attributes import ForegroundOverlap, ObjectColours
from m4.inference.guidance import Guidance
from m4.inference.parallel import ROAR, MaskGIT
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage

STEPS, SCALES, MEMBERS = (1, 2, 4, 8, 16, 32), (1.0, 1.5, 2.0, 3.0, 5.0, 8.0), (1, 2, 4, 8, 16)
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def chart(lines: dict[str, list[tuple[float, float]]], title: str, width: int = 520, height: int = 340) -> Image.Image:
    """Lines over a logarithmic axis, each with its name."""
    picture = Image.new("RGB", (width, height), "white")
    pen, left, top, right, bottom = ImageDraw.Draw(picture), 50, 40, width - 20, height - 40
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    low, high = min(0.0, *ys), max(ys) * 1.1 + 1e-9
    place = lambda x, y: (  # noqa: E731
        left + (right - left) * np.log(x / xs[0]) / np.log(xs[-1] / xs[0]),
        bottom - (bottom - top) * (y - low) / (high - low),
    )
    pen.text((left, 8), title, fill="black")
    for x in xs:
        pen.text((place(x, low)[0] - 6, bottom + 6), f"{x:g}", fill="black")
    for y in np.linspace(low, high, 5):
        pen.text((6, place(xs[0], y)[1] - 6), f"{y:.2f}", fill="black")
        pen.line([place(xs[0], y), place(xs[-1], y)], fill="#dddddd")
    for i, (name, points) in enumerate(lines.items()):
        pen.line([place(x, y) for x, y in points], fill=COLOURS[i], width=3)
        pen.text((left + 10 + 150 * (i % 3), 22), name, fill=COLOURS[i])
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--out", default="sweeps.png")
    args = parser.parse_args()
    run = load_run(Path(args.run))
    sampler, source = Sampler(run.model, run.tokenizers), run.config.datasets[0].source
    source.prepare(args.data_dir)
    split, train = source.split("test", args.data_dir), source.split("train", args.data_dir)
    examples = [split[i] for i in range(args.num_samples)]
    train = [train[i] for i in range(2000)]
    signals = {name: [e[name] for e in examples] for name in ("rgb", "depth", "caption")}

    charts = []
    for given, measure in (("depth", ForegroundOverlap()), ("caption", ObjectColours())):
        tokenizer = sampler.tokenizer("rgb")
        low = measure.baseline(train, examples)["value"]
        high = measure.score(tokenizer.decode(tokenizer.encode(signals["rgb"])), examples)["value"]

        def score(scheme, guidance=None, given=given, measure=measure, low=low, high=high):
            stage = Stage(target="rgb", scheme=scheme, guidance=guidance)
            out = sampler({given: signals[given]}, [stage])["rgb"]
            return (measure.score(out, examples)["value"] - low) / (high - low)

        by_steps = {
            scheme.__name__: [(n, score(scheme(steps=n, temperature=0.7))) for n in STEPS] for scheme in (MaskGIT, ROAR)
        }
        by_scale = {
            "ROAR 16 steps": [
                (s, score(ROAR(steps=16, temperature=0.7), Guidance(scale=s) if s != 1 else None)) for s in SCALES
            ]
        }
        for what, lines in (("steps", by_steps), ("guidance scale", by_scale)):
            title = f"{given} -> rgb over {what}: {measure.metric}, normalised, {len(examples)} scenes"
            charts.append(chart(lines, title))
            print(json.dumps({"direction": f"{given}_to_rgb", "over": what, "normalised": lines}), flush=True)
    width, height = charts[0].size
    sheet = Image.new("RGB", (2 * width, 2 * height), "white")
    for i, picture in enumerate(charts):
        sheet.paste(picture, (width * (i % 2), height * (i // 2)))
    sheet.save(args.out)

    errors = {}
    for n in MEMBERS:
        stage = Stage(target="depth", scheme=MaskGIT(steps=8, temperature=1.0), ensemble=n)
        depth = np.stack(sampler({"rgb": signals["rgb"]}, [stage])["depth"])
        truth = np.stack(signals["depth"])
        on_object = (np.stack([e["instance"] for e in examples]) > 0) & (truth > 0)
        relative = np.abs(depth - truth) / np.where(truth > 0, truth, 1)
        errors[n] = np.array([r[o].mean() for r, o in zip(relative, on_object, strict=True)])
        gain = errors[1] - errors[n]
        line = {
            "direction": "rgb_to_depth",
            "ensemble": n,
            "abs_rel_on_objects": round(float(errors[n].mean()), 4),
            "gain_over_one": round(float(gain.mean()), 4),
            "standard_error": round(float(gain.std(ddof=1) / len(gain) ** 0.5), 4),
            "num_samples": len(examples),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
