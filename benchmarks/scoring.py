"""Scoring candidates after shared examples: python benchmarks/scoring.py runs/fewshot

100 queries with 8 candidates each (made-up names), after the same 8 examples with 64 tokens each: all candidates of a
prompt together ("step_s"), against each candidate alone, in turns. Prints one JSON line; "encoded": prompts that the
encoder read.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import measure

sys.path.pop(0)  # this folder: its tokenizers.py would hide the library
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from m4.checkpoints.runs import load_run
from m4.in_context import prompting as in_context
from m4.in_context.tasks.nonce_words import draw_words
from m4.inference.sampler import Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="whose config's first few-shot task is asked")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    run = load_run(args.run)
    if not run.config.evaluators:
        sys.exit(f"error: the config of {args.run} names no few-shot tasks; runs/fewshot does")
    task, data_dir = run.config.evaluators[0].tasks[0], run.config.data_dir
    task.prepare(data_dir)
    sampler = Sampler(run.model, run.tokenizers, batch_size=args.queries)
    shots = list(task.draw("test", 0, data_dir).shots)
    queries = [task.draw("test", i, data_dir).query for i in range(args.queries)]
    rng = np.random.default_rng(0)
    candidates = [draw_words("test", args.candidates, rng) for _ in queries]
    encoded, score = 0, in_context._score

    def counted(graph, params, name, inputs, *rest):
        nonlocal encoded
        encoded += len(inputs.ids)
        return score(graph, params, name, inputs, *rest)

    in_context._score = counted

    def together():
        return in_context.score(sampler, queries, task.output, candidates, shots=shots, num_tokens=64)

    def alone():
        each = [[[row[c]] for row in candidates] for c in range(args.candidates)]
        parts = [in_context.score(sampler, queries, task.output, x, shots=shots, num_tokens=64) for x in each]
        return np.concatenate(parts, axis=1)

    counts, scores, seconds = {}, {}, {"together": [], "alone": []}
    for _ in range(1 + args.repeats):  # the first compiles
        for way in (together, alone):
            encoded, start = 0, time.perf_counter()
            scores[way.__name__] = way()
            seconds[way.__name__].append(time.perf_counter() - start)
            counts[way.__name__] = encoded
    compiling = seconds["together"].pop(0), seconds["alone"].pop(0)
    medians = {name: float(np.median(s)) for name, s in seconds.items()}
    print(
        json.dumps(
            {
                "setting": "candidates",
                "queries": args.queries,
                "candidates": args.candidates,
                "shots": len(shots),
                "encoded": counts,
                "samples_per_s": round(args.queries / medians["together"], 2),
                "step_s": round(medians["together"], 3),
                "alone_s": round(medians["alone"], 3),
                "compile_s": round(compiling[0] - medians["together"], 2),
                "ratio": round(medians["alone"] / medians["together"], 2),
                "largest_difference": float(np.abs(scores["together"] - scores["alone"]).max()),
                **measure.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
