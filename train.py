"""One run, top to bottom: prepare, train (or resume), evaluate."""

import functools
import shutil
import signal
import sys

import jax
import optax
from flax import nnx

from m4 import checkpoints, losses, sharding
from m4.config import from_cli, save_or_check
from m4.data import Stream
from m4.evals.suite import evaluate
from m4.metrics import Metrics
from m4.model import Model
from m4.pretokenize import Team, prepare
from m4.tokens import normalized


def train_step(graph, optimizer, c, params, state, batch, step):
    key = jax.random.fold_in(jax.random.key(c.seed), step)

    batch = normalized(batch, c.modalities)

    def loss_fn(params):
        model = nnx.merge(graph, params)
        return losses.cross_entropy(model, model(batch, key), batch.targets, weighting=c.loss)

    (loss, detail), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    scalars = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "slots/inputs": batch.inputs.valid.mean(),
        "slots/targets": batch.targets.valid.mean(),
        **{f"loss/{k}": v for k, v in detail["loss"].items()},
    }
    return optax.apply_updates(params, updates), state, scalars


def main(c) -> None:
    # Everything that can be wrong is found before compute is spent.
    c.check()
    mesh = c.mesh.make()
    sharding.check_batch_size(c.batch_size, mesh)
    save_or_check(c)

    # Raw data, tokenizers, token shards: each is skipped when it is there.
    team = Team(index=jax.process_index(), count=jax.process_count())
    prepared = prepare(c.datasets, c.tokenizers, c.data_dir, seed=c.seed, team=team)
    for m in c.modalities:
        target = checkpoints.tokenizer_file(c.folder, m)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(prepared.tokenizer_files[m.name], target)

    # The model and optimizer, initialised under jit where they live.
    optimizer = c.optimizer.make(c.num_steps)
    constrain = sharding.constrain_activations(mesh)
    init = lambda: nnx.split(Model(c.model, c.modalities, rngs=nnx.Rngs(c.seed), constrain=constrain), nnx.Param)  # noqa: E731
    graph, abstract = nnx.eval_shape(init)
    params = jax.jit(lambda: init()[1], out_shardings=sharding.shardings(abstract, mesh))()
    state = jax.jit(optimizer.init, out_shardings=sharding.shardings(jax.eval_shape(optimizer.init, abstract), mesh))(
        params
    )
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters on {mesh.size} device(s)", flush=True)

    # The example stream, and the last checkpoint if there is one.
    stream = Stream(
        prepared.shards("train"), c.datasets, c.masking, c.modalities, batch_size=c.batch_size, seed=c.seed,
        process_index=team.index, process_count=team.count, num_workers=c.num_workers,
        place=functools.partial(sharding.shard_batch, mesh=mesh),
    )  # fmt: skip
    saved = checkpoints.Checkpoints(c.folder / "checkpoints")
    first_step = saved.latest
    if first_step:
        params, state, position = saved.restore(params, state)
        stream.set_state(position)
        print(f"resumed from step {first_step}", flush=True)

    # Steps. SIGTERM (preemption) ends the run after the current step, with a checkpoint.
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    step_fn = jax.jit(functools.partial(train_step, graph, optimizer, c), donate_argnums=(0, 1))
    tokens_per_step = c.batch_size * (c.masking.num_inputs + c.masking.num_targets)
    metrics = Metrics(c.folder, first_step=first_step, num_steps=c.num_steps, tokens_per_step=tokens_per_step)
    for step in range(first_step + 1, c.num_steps + 1):
        params, state, scalars = step_fn(params, state, next(stream), step)
        if step % c.log_every == 0 or step == c.num_steps:
            metrics.write(step, jax.device_get(scalars))
        if step % c.save_every == 0 or step == c.num_steps or stop:
            saved.save(step, params, state, stream.get_state())
        if stop:
            print(f"stopped by SIGTERM; the same command goes on from step {step}", flush=True)
            break
    stream.close()
    saved.close()
    metrics.close()

    # Scores and pictures.
    if not stop and c.evaluations:
        evaluate(c.folder)


if __name__ == "__main__":
    try:
        main(from_cli(__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
