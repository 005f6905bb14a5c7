"""Cost of the output layer: python benchmarks/loss.py

The loss with its gradients for 8,192 target tokens of 7 and of 21 modalities, beside the matrix products alone: each
token with its own modality's vocabulary (forward, and two for the gradients). "ratio" is their quotient, side by side;
"union_ratio" is what a product with the union of all vocabularies would cost in the same measure. Memory is what the
compiled program needs beside its arguments and results, at 8,192 and at 32,768 tokens.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import measure
import numpy as np

from m4.interchange import fourm
from m4.objectives import cross_entropy as losses
from m4.tokens.modality import Modalities


def seconds(function, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def main() -> None:
    measure.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for name, names in (("mod7", fourm.MOD7), ("mod21", fourm.MOD21)):
        modalities = Modalities([fourm.modality(n) for n in names])
        rows = modalities.offsets(lambda m: m.vocab_size * m.is_target)
        vocabularies = [(i, *pair) for i, pair in enumerate(itertools.pairwise(rows)) if pair[0] < pair[1]]
        rng = np.random.default_rng(0)

        def problem(num_tokens, vocabularies=vocabularies, rows=rows, rng=rng):
            shares = rng.dirichlet(np.full(len(vocabularies), 5.0))
            modality = rng.choice([i for i, *_ in vocabularies], num_tokens, p=shares).astype(np.int32)
            sizes = np.diff(rows)[modality]
            ids = (rng.random(num_tokens) * sizes).astype(np.int32)
            hidden = jnp.asarray(rng.standard_normal((1, num_tokens, args.width)), args.dtype)
            table = jnp.asarray(rng.standard_normal((rows[-1], args.width)) * 0.02, jnp.float32)
            weight = jnp.full(len(rows) - 1, 1 / num_tokens, jnp.float32)
            return hidden, table, jnp.asarray(ids[None]), jnp.asarray(modality[None]), weight

        def loss(hidden, table, ids, modality, weight, rows=rows):
            return losses.summed_cross_entropy(hidden, table, ids, modality, weight, rows)[0]

        ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        hidden, table, ids, modality, weight = problem(args.num_tokens)
        counts = np.bincount(np.asarray(modality)[0], minlength=len(modalities))

        def products(hidden, table, counts=tuple(counts), vocabularies=vocabularies):
            """The three products of each modality's tokens with its own table, nothing else."""
            first, out = 0, []
            for i, begin, end in vocabularies:
                x, w = hidden[0, first : first + counts[i]], table[begin:end].astype(hidden.dtype)
                logits = jnp.einsum("kd,vd->kv", x, w, preferred_element_type=jnp.float32).astype(hidden.dtype)
                d_x = jnp.einsum("kv,vd->kd", logits, w, preferred_element_type=jnp.float32)
                out.append((d_x, jnp.einsum("kv,kd->vd", logits, x, preferred_element_type=jnp.float32)))
                first += counts[i]
            return out

        products = jax.jit(products)
        for function, arguments in ((ours, (hidden, table, ids, modality, weight)), (products, (hidden, table))):
            jax.block_until_ready(function(*arguments))
        pairs = [
            (
                seconds(ours, hidden, table, ids, modality, weight),
                seconds(products, hidden, table),
            )
            for _ in range(args.repeats)
        ]
        memory = {
            n: ours.lower(*problem(n)).compile().memory_analysis().temp_size_in_bytes / 2**20
            for n in (args.num_tokens, 4 * args.num_tokens)
        }
        own = sum(int(counts[i]) * (end - begin) for i, begin, end in vocabularies)
        line = {
            "setting": name,
            "num_tokens": args.num_tokens,
            "width": args.width,
            "dtype": args.dtype,
            "step_s": round(float(np.median([a for a, _ in pairs])), 4),
            "products_s": round(float(np.median([b for _, b in pairs])), 4),
            "ratio": round(float(np.median([a / b for a, b in pairs])), 3),
            "ratio_range": [round(f(a / b for a, b in pairs), 3) for f in (min, max)],
            "union_ratio": round(args.num_tokens * rows[-1] / own, 2),
            "gflops": round(3 * 2 * own * args.width / 1e9),
            "temporary_mib": {str(n): round(size) for n, size in memory.items()},
            "union_logits_mib": round(args.num_tokens * rows[-1] * 4 / 2**20),
            **measure.machine(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
