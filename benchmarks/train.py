"""Speed and memory of the training step: python benchmarks/train.py --setting 4m_tiny_mod7

Prints one JSON line: medians over the steps of a run's own step (m4.training.trainer), memory of the whole process on
CPU and of the device elsewhere; "mfu" counts model FLOPs only, and is null where the peak is not known. Batches are
masked beforehand and taken in turn, so that masking and data loading are not measured (benchmarks of their own measure
those).

    python benchmarks/train.py --setting 4m_large_mod7_bf16 --num-inputs 256 --num-targets 256

On Linux CPUs the process starts itself again with glibc told to keep freed memory and to use large pages, which the
line shows as "malloc": a step then spends no time on page faults. GLIBC_TUNABLES= turns that off; setting it to the
same value does the same for training.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import measure
import numpy as np
from examples import random_example

from m4.config import Config
from m4.data.dataset import Dataset
from m4.distributed.mesh import MeshConfig, shard_batch
from m4.interchange import fourm
from m4.masking.dirichlet import Masking, Strategy
from m4.tokens.modality import Modalities
from m4.training import flops
from m4.training.optimizer import OptimizerConfig
from m4.training.trainer import Trainer
from m4_tokenizers.modalities.stored import IdsRecipe

SETTINGS = {  # name: (size, dtype, batch size)
    "4m_tiny_mod7": ("tiny", "float32", 16),
    "4m_small_mod7": ("small", "float32", 8),
    "4m_base_mod7_bf16": ("base", "bfloat16", 256),
    "4m_large_mod7_bf16": ("large", "bfloat16", 128),
    "4m_xlarge_mod7_bf16": ("xlarge", "bfloat16", 64),
}


def setting(args: argparse.Namespace) -> Config:
    """What is trained, and on what. Targets are all modalities but pixels; inputs are pixels alone half of the time."""
    size, dtype, batch_size = SETTINGS[args.setting]
    # Blocks that are computed again stand alone: XLA on CPU would find that it has computed them before.
    unroll = args.unroll or (3 if jax.default_backend() == "cpu" and args.remat == "none" else 1)
    modalities = [fourm.modality(name) for name in fourm.MOD7]
    targets = {m.name: 0.5 for m in modalities if m.is_target}
    strategies = tuple(
        Strategy(inputs=inputs, targets=targets) for inputs in ({"rgb@224": 0.5}, {m.name: 0.5 for m in modalities})
    )
    model = fourm.released(size, dtype=dtype, remat=args.remat, unroll=unroll)
    depth = {} if not args.depth else {"encoder_depth": args.depth, "decoder_depth": args.depth}
    return Config(
        name=args.setting,
        datasets=(Dataset(tokens="random"),),
        tokenizers=tuple(IdsRecipe(modality=m) for m in modalities),
        masking=Masking(num_inputs=args.num_inputs, num_targets=args.num_targets, strategies=strategies),
        model=dataclasses.replace(model, **depth),
        optimizer=OptimizerConfig(learning_rate=1e-4, clip_norm=args.clip_norm),
        batch_size=args.batch_size or batch_size,
        micro_batches=args.micro_batches,
        mesh=MeshConfig(fsdp=args.fsdp),
    )


def batches(config: Config, mesh: jax.sharding.Mesh, count: int):
    rng, modalities = np.random.default_rng(0), Modalities(config.modalities)
    for _ in range(count):
        examples = [random_example(modalities, rng) for _ in range(config.batch_size)]
        keys = np.stack([np.zeros(len(examples)), np.arange(len(examples))], axis=1).astype(np.uint64)
        yield shard_batch(config.masking(examples, modalities, keys), mesh)


def main() -> None:
    measure.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="4m_tiny_mod7")
    parser.add_argument("--num-steps", type=int, default=10, help="measured steps, after 2 that are not")
    parser.add_argument("--num-inputs", type=int, default=128)
    parser.add_argument("--num-targets", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=0, help="default: the setting's")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--remat", choices=["none", "blocks"], default="none")
    parser.add_argument("--unroll", type=int, default=0, help="blocks compiled as one piece; default: 3 on CPU, else 1")
    parser.add_argument("--depth", type=int, default=0, help="blocks of encoder and decoder, if not all fit")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--clip-norm", type=float, default=0.0, help="0: gradients are not clipped")
    args = parser.parse_args()
    config = setting(args)
    mesh = config.mesh.make()
    trainer = Trainer(config, mesh)
    device_peak, source = flops.peak_flops(jax.devices()[0], config.model.dtype)
    peak = None if device_peak is None else device_peak * mesh.size
    masked = list(batches(config, mesh, 3))
    counts = [np.bincount(np.asarray(b.targets.modality)[np.asarray(b.targets.valid)], minlength=8) for b in masked]
    targets = dict(zip(config.modalities.names, np.mean(counts, axis=0) / config.batch_size, strict=True))
    flops_per_step = config.batch_size * flops.model_flops(
        config.model, config.modalities, args.num_inputs, args.num_targets, targets
    )
    stream = itertools.cycle(masked)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        step = trainer.step.lower(trainer.abstract_state, next(stream), 1).compile()
    compile_s = time.perf_counter() - start
    measure.return_freed_memory()
    state, seconds = trainer.init(), []
    for number in range(1, 3 + args.num_steps):
        batch = next(stream)
        start = time.perf_counter()
        state, scalars = step(state, batch, number)
        loss = float(scalars["loss"])
        seconds.append(time.perf_counter() - start)
    step_s = float(np.median(seconds[2:]))
    share = flops.mfu(flops_per_step, step_s, peak)
    line = {
        "setting": args.setting,
        "remat": args.remat,
        "unroll": config.model.unroll,
        "batch_size": config.batch_size,
        "num_inputs": args.num_inputs,
        "num_targets": args.num_targets,
        "micro_batches": args.micro_batches,
        "depth": config.model.encoder_depth,
        "samples_per_s": round(config.batch_size / step_s, 3),
        "tokens_per_s": round(config.batch_size * (args.num_inputs + args.num_targets) / step_s),
        "step_s": round(step_s, 4),
        "step_s_range": [round(min(seconds[2:]), 4), round(max(seconds[2:]), 4)],
        "compile_s": round(compile_s, 2),
        "mfu": None if share is None else round(share, 3),
        "model_flops_per_step": flops_per_step,
        "peak_flops": source if peak is None else f"{peak:.4g} ({source})",
        "num_parameters": trainer.num_parameters,
        "final_loss": round(loss, 4),
        **measure.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
