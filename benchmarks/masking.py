"""Speed of masking in one process: examples of 4M-7 (7 token modalities and pixels), 128 inputs and 128 targets.

Half of the examples draw rgb -> all, half all -> all with concentrations of 0.5 (the original's mixture). Prints one
JSON line per case, the headline last:

    with_text      headline with captions of 16 words and 4 boxes tokenized each time, as the original does
    tokens_only    both stored as ids, as in token shards; pixels are picked, but as in the original not gathered
    headline       as tokens_only, with the picked pixel patches gathered: what training pays
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this folder, whose tokenizers.py would hide the package of that name
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tokenizers"))

import numpy as np

from benchmarks import measure
from benchmarks.examples import random_example
from m4.interchange import fourm
from m4.masking.dirichlet import Masking, Strategy
from m4.tokens.modality import Features, Modalities
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.text import TextRecipe

WORDS = ("a", "photo", "of", "two", "brown", "dogs", "and", "one", "cat", "that", "sit", "on", "an", "old", "wooden")


def main() -> None:
    measure.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="examples that are masked at once")
    parser.add_argument("--num-examples", type=int, default=512, help="in a repetition")
    parser.add_argument("--repetitions", type=int, default=15)
    args = parser.parse_args()
    modalities = Modalities([fourm.modality(name) for name in fourm.MOD7])
    ungathered = Modalities([dataclasses.replace(m, size=1) if isinstance(m, Features) else m for m in modalities])
    rng = np.random.default_rng(0)
    examples = [random_example(modalities, rng) for _ in range(args.num_examples)]
    texts = [" ".join(rng.choice(WORDS, 16)) for _ in examples]
    boxes = [{"bbox": np.sort(rng.random((4, 4)), axis=1), "label": list(rng.choice(WORDS, 4))} for _ in examples]
    caption = TextRecipe(vocab_size=30_000, max_length=256).fit([{"caption": t} for t in texts], seed=0)
    det = BoxRecipe(vocab_size=30_000, num_bins=1000).fit([{"boxes": b} for b in boxes], seed=0)
    targets = {m.name: 0.5 for m in modalities if m.is_target}
    mask = Masking(
        strategies=(
            Strategy(inputs={"rgb@224": 1000.0}, targets=targets),
            Strategy(inputs={m.name: 0.5 for m in modalities}, targets=targets),
        )
    )

    def run(modalities: Modalities, with_text: bool) -> list[float]:
        seconds = []
        stored = [{**e, "rgb@224": e["rgb@224"][:, :1]} for e in examples] if modalities is ungathered else examples
        for repetition in range(args.repetitions + 2):
            start = time.perf_counter()
            for first in range(0, len(examples), args.batch_size):
                batch = stored[first : first + args.batch_size]
                index = np.arange(first, first + len(batch)) + repetition * len(examples)
                if with_text:
                    part = slice(first, first + args.batch_size)
                    ids = zip(batch, caption.encode(texts[part]), det.encode(boxes[part]), strict=True)
                    batch = [{**example, "caption": c, "det": d} for example, c, d in ids]
                mask(batch, modalities, np.stack([np.zeros(len(batch)), index], axis=1).astype(np.uint64))
            seconds.append((time.perf_counter() - start) / len(examples))
        return seconds[2:]

    for case, chosen, with_text in (
        ("with_text", modalities, True),
        ("tokens_only", ungathered, False),
        ("headline", modalities, False),
    ):
        seconds = run(chosen, with_text)
        line = {
            "setting": "4m_mod7_128_128",
            "case": case,
            "samples_per_s": round(1 / float(np.median(seconds)), 1),
            "samples_per_s_range": [round(1 / max(seconds), 1), round(1 / min(seconds), 1)],
            "batch_size": args.batch_size,
            **measure.machine(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
