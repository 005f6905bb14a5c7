"""Speed of generation: python benchmarks/generate.py --setting caption64

4M-7 Tiny (6 + 6 blocks of width 384, random weights, float32) with 4 rows: captions of 64 or 256 tokens from 196 tokens
of a picture, greedily; a picture of 196 tokens from a caption of 15, by MaskGIT in 8 steps (cosine) or in random order
(ROAR) in 49, at temperature 1. Prints one JSON line for each setting. "compile_s" is the first call's compilation (with
a JAX_COMPILATION_CACHE_DIR: what is left of it). "floor_share" of captions: how much of the time one reading of the
decoder's and the output layer's weights for each token would take at the memory's measured speed.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import measure
import numpy as np
from flax import nnx

from m4.inference.autoregressive import Autoregressive
from m4.inference.guidance import Guidance
from m4.inference.parallel import ROAR, MaskGIT
from m4.inference.prompts import make_prompt
from m4.inference.sampler import run_stage
from m4.interchange import fourm
from m4.model.encoder_decoder import Model
from m4.tokens.modality import Modalities

SETTINGS = {
    "caption64": ("caption", Autoregressive(max_length=63)),
    "caption256": ("caption", Autoregressive(max_length=255)),
    "maskgit8": ("tok_rgb@224", MaskGIT(steps=8, schedule="cosine")),
    "roar49": ("tok_rgb@224", ROAR(steps=49)),
}


def memory_speed() -> float:
    """Bytes that are read in a second: the fastest of some sums of 512 MiB."""
    x = jax.numpy.ones(2**27)
    total = jax.jit(jax.numpy.sum)
    jax.block_until_ready(total(x))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(total(x))
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


def main() -> None:
    measure.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), action="append", help="default: all")
    parser.add_argument("--size", default="tiny", choices=list(fourm.SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0, help="scale; 1: none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", default="", metavar="FOLDER", help="writes a profile of one run, for Perfetto")
    args = parser.parse_args()
    modalities = Modalities([fourm.modality(n) for n in fourm.MOD7])
    config = fourm.released(args.size, embeddings="separate", dtype=args.dtype)
    graph, params = nnx.split(jax.jit(lambda: Model(config, modalities, rngs=nnx.Rngs(0)))())
    guidance = Guidance(scale=args.guidance) if args.guidance != 1 else None
    rng = np.random.default_rng(0)
    for setting in args.setting or SETTINGS:
        target, scheme = SETTINGS[setting]
        m = modalities.named(target)
        if target == "caption":
            records = [{"tok_rgb@224": rng.integers(0, 16_384, 196)} for _ in range(args.batch_size)]
        else:
            records = [{"caption": rng.integers(300, 30_000, 15)} for _ in range(args.batch_size)]
        prompt = make_prompt(records, [None] * len(records), m, modalities, guidance)
        seeds = np.arange(len(records))[:, None]

        def run(scheme=scheme, m=m, prompt=prompt, seeds=seeds):
            start = time.perf_counter()
            out = jax.block_until_ready(run_stage(graph, params, scheme, m, prompt, seeds, guidance))
            return time.perf_counter() - start, out

        first, out = run()
        seconds = [run()[0] for _ in range(args.repeats)]
        if args.profile:
            with jax.profiler.trace(args.profile):
                run()
        step = float(np.median(seconds))
        # Captions end early if all rows do.
        num_tokens = int((np.asarray(out.log_probability) != 0).any(0).sum())
        line = {
            "setting": setting + (f" guidance {args.guidance:g}" if guidance else ""),
            "size": args.size,
            "dtype": args.dtype,
            "batch_size": args.batch_size,
            "tokens_per_s": round(args.batch_size * num_tokens / step, 1),
            "step_s": round(step, 4),
            "step_s_range": [round(min(seconds), 4), round(max(seconds), 4)],
            "compile_s": round(first - step, 2),
            **measure.machine(),
        }
        if target == "caption":
            width = jax.tree.leaves(nnx.split(nnx.merge(graph, params).decoder, nnx.Param)[1])
            weights = sum(x.nbytes for x in width) + m.vocab_size * config.width * 4
            line["floor_share"] = round(num_tokens * weights / memory_speed() / step, 3)
        else:
            line["images_per_s"] = round(args.batch_size / step, 3)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
