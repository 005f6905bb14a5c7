"""Speed and memory of the training step: python benchmarks/train.py --setting 4m_tiny_mod7

Prints one JSON line: medians over the steps, memory of the whole process. Batches are masked beforehand and taken in
turn, so that masking and data loading are not measured (benchmarks of their own measure those).

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
import optax
from examples import random_example
from flax import nnx

from m4 import fourm, losses
from m4.masking import Masking, Strategy
from m4.modality import Modalities
from m4.model import Model, ModelConfig
from m4.tokens import normalized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and on what. Targets are all modalities but pixels; inputs are pixels alone half of the time."""

    model: ModelConfig
    modalities: tuple[str, ...] = fourm.MOD7
    num_tokens: int = 128  # inputs, and targets
    batch_size: int = 16


SETTINGS = {
    "4m_tiny_mod7": Setting(model=fourm.released("tiny")),
    "4m_small_mod7": Setting(model=fourm.released("small"), batch_size=8),
    "4m_base_mod7_bf16": Setting(model=fourm.released("base", dtype="bfloat16"), batch_size=64),
}


def batches(setting: Setting, modalities: Modalities, count: int):
    targets = {m.name: 0.5 for m in modalities if m.is_target}
    strategies = tuple(
        Strategy(inputs=inputs, targets=targets) for inputs in ({"rgb@224": 0.5}, {m.name: 0.5 for m in modalities})
    )
    masking = Masking(num_inputs=setting.num_tokens, num_targets=setting.num_tokens, strategies=strategies)
    rng = np.random.default_rng(0)
    for _ in range(count):
        examples = [random_example(modalities, rng) for _ in range(setting.batch_size)]
        keys = np.stack([np.zeros(len(examples)), np.arange(len(examples))], axis=1).astype(np.uint64)
        yield jax.device_put(masking(examples, modalities, keys))


def main() -> None:
    measure.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="4m_tiny_mod7")
    parser.add_argument("--num-steps", type=int, default=10, help="measured steps, after 2 that are not")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    modalities = Modalities([fourm.modality(name) for name in setting.modalities])
    optimizer = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.05)
    init = lambda: nnx.split(Model(setting.model, modalities, rngs=nnx.Rngs(0)), nnx.Param)  # noqa: E731
    graph, _ = nnx.eval_shape(init)
    params = jax.jit(lambda: init()[1])()
    state = jax.jit(optimizer.init)(params)

    def step(params, state, batch):
        batch = normalized(batch, modalities)

        def loss_fn(params):
            model = nnx.merge(graph, params)
            return losses.cross_entropy(model, model(batch), batch.targets)[0]

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    stream = itertools.cycle(list(batches(setting, modalities, 3)))
    start = time.perf_counter()
    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, next(stream)).compile()
    compile_s = time.perf_counter() - start
    seconds = []
    for _ in range(2 + args.num_steps):
        batch = next(stream)
        start = time.perf_counter()
        params, state, loss = step(params, state, batch)
        loss = float(loss)
        seconds.append(time.perf_counter() - start)
    step_s = float(np.median(seconds[2:]))
    line = {
        "setting": args.setting,
        "samples_per_s": round(setting.batch_size / step_s, 3),
        "step_s": round(step_s, 4),
        "step_s_range": [round(min(seconds[2:]), 4), round(max(seconds[2:]), 4)],
        "compile_s": round(compile_s, 2),
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "final_loss": round(loss, 4),
        **measure.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
