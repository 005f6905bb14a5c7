"""One run, top to bottom: prepare, train (or resume), evaluate."""

import contextlib
import functools

import jax

from m4.checkpoints.numbered import Checkpoints
from m4.checkpoints.runs import check_tokenizers, keep_tokenizers
from m4.checkpoints.warm_start import load_weights
from m4.command_line import ends_with_a_sentence, finishing
from m4.config import from_cli, save_or_check, use_workdir
from m4.data.pretokenize import prepare
from m4.data.stream import Stream
from m4.distributed.hosts import join_processes, stop_signal
from m4.distributed.mesh import check_sizes, part_of_batch, shard_batch
from m4.distributed.worker_group import WorkerGroup
from m4.evaluation.base import evaluate
from m4.registry import to_json
from m4.tokens.tokenizer import tokenizer_hash
from m4.training import flops
from m4.training.health import Health
from m4.training.metrics import Metrics
from m4.training.trainer import Trainer, TrainState


def main(c, end: contextlib.ExitStack) -> None:
    # Everything that can be wrong is found before compute is spent.
    c.check()
    join_processes()
    mesh = c.mesh.make()
    check_sizes(c.batch_size, c.masking.num_targets, c.micro_batches, c.model.width, mesh)
    part, num_parts = part_of_batch(mesh)
    trainer = Trainer(c, mesh)
    loaded = trainer.load()
    num_trained = trainer.num_trained
    end.enter_context(use_workdir(c))
    save_or_check(c)

    # Raw data, tokenizers, token shards: each is skipped when it is there.
    team = WorkerGroup(index=jax.process_index(), count=jax.process_count())
    saved = Checkpoints(c.folder / "checkpoints", c.checkpoints)
    sources = [c.init_from] if c.init_from else []
    sources += [source for objective in c.objectives for source in objective.sources]
    if sources and not saved.latest:
        tokenizers = prepare(c.datasets, c.tokenizers, c.data_dir, seed=c.seed, splits=(), team=team).tokenizers
        for source in sources:
            check_tokenizers(source, tokenizers)
    prepared = prepare(c.datasets, c.tokenizers, c.data_dir, seed=c.seed, team=team)
    for evaluator in c.evaluators if team.index == 0 else ():
        evaluator.check_data(c)

    # The model, its optimizer and the example stream: from the last checkpoint, else from the start.
    loaded = trainer.place(loaded)
    stream = Stream(
        prepared.shards("train"), c.datasets, c.masking, c.modalities, batch_size=c.batch_size, seed=c.seed,
        process_index=part, process_count=num_parts, num_workers=c.num_workers,
        place=functools.partial(shard_batch, mesh=mesh),
    )  # fmt: skip
    hashes = {name: tokenizer_hash(tokenizer) for name, tokenizer in prepared.tokenizers.items()}
    if saved.latest:
        parts, position = saved.restore(trainer.abstract_state.parts(), hashes)
        state = TrainState.of(parts)
        stream.set_state(position)
        print(f"resumed from step {saved.latest}", flush=True)
    else:
        state = trainer.init()
        if c.init_from:
            params, report = load_weights(state.params, trainer.model, c.init_from)
            state = trainer.with_params(state, params)
            print(f"weights of {c.init_from}:\n{report}", flush=True)
    first_step = saved.latest
    if team.index == 0:
        keep_tokenizers(c.folder, c.modalities, prepared.tokenizer_files)

    # What a step costs, counted, and what the devices can do.
    flops_per_step = c.batch_size * flops.model_flops(
        c.model, c.modalities, c.masking.num_inputs, c.masking.num_targets, stream.mean_targets()
    )
    device_peak, source = flops.peak_flops(jax.local_devices()[0], c.model.dtype)
    peak = None if device_peak is None else device_peak * mesh.size
    remark = source if peak is None else f"peak {peak:.3g} FLOP/s ({source})"
    print(
        f"{trainer.num_parameters:,} parameters, {num_trained:,} of them trained; "
        f"mesh {dict(mesh.shape)} of {jax.process_count()} process(es)\n"
        f"model FLOPs per step {flops_per_step:.3g}; {remark}",
        flush=True,
    )

    # Steps. SIGTERM (preemption) or Ctrl-C ends the run after the current step, with a checkpoint.
    metrics = Metrics(
        c.folder, first_step=first_step, num_steps=c.num_steps, wandb=c.metrics.wandb,
        tokens_per_step=c.batch_size * (c.masking.num_inputs + c.masking.num_targets),
        flops_per_step=flops_per_step, peak_flops=peak,
    )  # fmt: skip
    health = Health(c.folder, saved, max_skipped=c.max_skipped)
    scored = [evaluator for evaluator in c.evaluators if evaluator.after_training]
    before, stop, due = None, "", False
    with stop_signal() as stop_asked, finishing(stream.close, saved.close, metrics.close, kept=saved.kept):
        for step in range(first_step + 1, c.num_steps + 1):
            if step == c.metrics.profile[0]:
                jax.profiler.start_trace(str(c.folder / "profile"))
            health.reads(step, stream.next_example, c.batch_size)
            batch = metrics.wait_for(stream)
            with jax.set_mesh(mesh):
                state, scalars = trainer.step(state, batch, step, loaded)
            if step == c.metrics.profile[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            stop = stop_asked(step)
            if step % c.metrics.log_every == 0 or step == c.num_steps:
                metrics.write(step, jax.device_get(scalars))
            # Of the step before, for the devices never to wait for this process.
            if before is not None:
                health.check(step - 1, before)
            before = scalars
            is_last = stop or step == c.num_steps
            due = due or is_last or step % c.checkpoints.save_every == 0
            saved.check()
            if due and health.may_save(step, scalars, is_last=is_last):
                saved.save(step, state.parts(), {**stream.get_state(), "tokenizers": hashes}, to_json(c))
                due = False
            if c.metrics.gallery_every and step % c.metrics.gallery_every == 0 and jax.process_count() == 1:
                for evaluator in scored:
                    samples = evaluator.samples(c, trainer.trained(state), prepared.tokenizers, step)
                    if samples is not None:
                        metrics.picture(step, f"samples/{evaluator.name}", samples)
            if stop:
                break
        if before is not None and not stop:
            health.check_end(step, before)
    if stop:
        print(f"stopped by {stop}; the same command goes on from step {saved.latest}", flush=True)

    # Scores and pictures.
    for name in dict.fromkeys(e.name for e in scored) if not stop and team.count == 1 else ():
        evaluate(c.folder, name)
    if not stop and scored and team.count > 1:
        print(f"scores and pictures, by one process: python -m m4 evaluate {c.folder}", flush=True)


if __name__ == "__main__":
    with ends_with_a_sentence(), contextlib.ExitStack() as end:
        main(from_cli(__doc__), end)
