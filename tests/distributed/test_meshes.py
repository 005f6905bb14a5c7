"""Any mesh, cut into micro-batches or not, trains as one device does; and so do two processes."""

import dataclasses
import json
import os
import re
import socket
import subprocess

import jax
import numpy as np
import pytest
from conftest import ROOT, command, environment, mask_keys
from flax import nnx

from m4.checkpoints.numbered import Checkpoints
from m4.checkpoints.warm_start import load_weights
from m4.config import Config
from m4.data.dataset import Dataset
from m4.distributed import mesh as sharding
from m4.distributed.mesh import MeshConfig
from m4.masking.dirichlet import Masking, Strategy
from m4.model.encoder_decoder import Model
from m4.objectives import cross_entropy as losses
from m4.objectives.masked_modeling import MaskedModeling
from m4.tokens.batch import normalized, token_counts
from m4.tokens.modality import Features
from m4.training.optimizer import OptimizerConfig
from m4.training.trainer import Trainer, TrainState
from m4_tokenizers.modalities.stored import IdsRecipe

NUM_STEPS = 20


@pytest.fixture(scope="session")
def config(modalities, small_model):
    every = {m.name: 1.0 for m in modalities}
    targets = {m.name: 1.0 for m in modalities if not isinstance(m, Features)}
    return Config(
        name="mesh",
        datasets=(Dataset(tokens="nothing"),),
        tokenizers=tuple(IdsRecipe(modality=m) for m in modalities),
        masking=Masking(num_inputs=16, num_targets=16, strategies=(Strategy(inputs=every, targets=targets),)),
        model=small_model,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        batch_size=16,
        num_steps=NUM_STEPS,
        objectives=(MaskedModeling(z_loss=1e-3),),
        average_decay=0.9,
    )


@pytest.fixture(scope="session")
def batches(config, make_example):
    """Modalities are unevenly present: the first half of a batch has captions alone, and one example in eight depth."""

    def example(i):
        has = ("caption",) if i % 16 < 8 else ("rgb_pixels", "rgb_tokens", *(("depth_tokens",) if i % 8 == 7 else ()))
        return {name: make_example(i)[name] for name in has}

    def batch(k):
        examples = [example(i) for i in range(16 * k, 16 * k + 16)]
        return config.masking(examples, config.modalities, mask_keys(16, seed=k))

    return [batch(k) for k in range(4)]


def train(config, mesh, batches, num_steps=NUM_STEPS):
    """(state, losses) after some steps."""
    trainer, found = Trainer(config, mesh), []
    state = trainer.init()
    for step in range(1, num_steps + 1):
        with jax.set_mesh(mesh):
            state, scalars = trainer.step(state, sharding.shard_batch(batches[step % len(batches)], mesh), step)
        found.append(float(scalars["loss"]))
    return state, found


@pytest.fixture(scope="session")
def alone(config, batches):
    """One device."""
    state, found = train(config, MeshConfig().make(jax.devices()[:1]), batches)
    return jax.tree.map(np.asarray, state), found


QUICK = [(8, 1, 1), (2, 2, 2)]
SLOW = [(1, 4, 2), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 1, 4), (1, 8, 1), (1, 2, 4), (1, 1, 8)]


@pytest.mark.parametrize("shape", [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)], ids=str)
def test_every_mesh_trains_as_one_device(shape, config, batches, alone, monkeypatch):
    """Losses, parameters, their average and the optimizer's state over 20 steps, within float32 rounding."""
    monkeypatch.setattr(sharding, "MIN_SIZE_TO_SHARD", 1)
    mesh = MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]).make()
    state, found = train(config, mesh, batches)
    np.testing.assert_allclose(found, alone[1], rtol=2e-6)
    assert found[-1] < found[0]
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone[0]), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=3e-5)


@pytest.mark.parametrize("micro_batches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_change_nothing(micro_batches, config, batches, alone):
    """On a mesh, too."""
    config = dataclasses.replace(config, micro_batches=micro_batches)
    state, found = train(config, MeshConfig(data=2, fsdp=2).make(jax.devices()[:4]), batches)
    np.testing.assert_allclose(found, alone[1], rtol=2e-6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone[0]), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=3e-5)


def test_the_formula_of_each_rank_would_depend_on_the_cut(config, batches):
    """Averaging each part's own loss, as the original does, gives other gradients for another number of parts."""
    modalities = config.modalities
    graph, params = nnx.split(Model(config.model, modalities, rngs=nnx.Rngs(0)), nnx.Param)
    batch = normalized(jax.tree.map(jax.numpy.asarray, batches[0]), modalities)
    whole = token_counts(batch.targets, len(modalities))

    def gradient(num_parts, counts):
        def loss(params):
            model, total = nnx.merge(graph, params), 0.0
            for k in range(num_parts):
                part = jax.tree.map(lambda x, k=k: x.reshape(num_parts, -1, *x.shape[1:])[k], batch)
                value = losses.cross_entropy(model, model(part), part.targets, counts=counts)[0]
                total += value if counts is not None else value / num_parts
            return total

        return jax.jit(jax.grad(loss))(params)

    ours, theirs = ([gradient(n, counts) for n in (1, 2)] for counts in (whole, None))
    for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(ours[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    differences = [float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, theirs), strict=True)]
    assert max(differences) > 1e-3


def test_no_device_holds_more_than_its_share():
    """A 21-modality model with the depth of XL and its proportions, of a 16th of its width."""
    from m4.interchange import fourm

    modalities = [dataclasses.replace(fourm.modality(n)) for n in fourm.MOD21]
    config = Config(
        name="xl",
        datasets=(Dataset(tokens="nothing"),),
        tokenizers=tuple(IdsRecipe(modality=m) for m in modalities),
        masking=Masking(strategies=(Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0}),)),
        model=fourm.released("xlarge", width=128, num_heads=2, hidden=8 * 128 // 3),
    )
    mesh = MeshConfig(data=1, fsdp=8).make()
    trainer = Trainer(config, mesh)
    state = trainer.init()
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    held = sharding.bytes_by_device(state)
    print(f"{total / 2**20:.0f} MiB in all, {max(held.values()) / 2**20:.1f} MiB on the fullest of {len(held)} devices")
    assert len(held) == 8 and max(held.values()) <= 1.2 * total / 8


def test_rules_find_their_parameters(config):
    """Each rule matches, names of the optimizer's state as well."""
    mesh = MeshConfig(data=1, fsdp=4, tensor=2).make()
    spec = lambda path, *shape: sharding.parameter_spec(path, shape, mesh)  # noqa: E731
    assert spec("token_embedding", 1000, 64) == jax.P(None, ("fsdp", "tensor"))
    assert spec("0.1.mu.decoder.3.cross_attention.key_value.kernel", 128, 256) == jax.P("fsdp", "tensor")
    assert spec("encoder.0.mlp.down.kernel", 256, 128) == jax.P("tensor", "fsdp")
    assert spec("encoder.0.mlp.down.kernel", 256, 127) == jax.P("tensor", None)
    assert spec("context_projection.kernel", 256, 512) == jax.P(None, "fsdp")
    assert spec("encoder.0.mlp_norm.scale", 512) == jax.P()
    state = Trainer(config, mesh).abstract_state
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(state)}
    for pattern, _ in sharding.RULES:
        matching = [n for n in names if re.search(pattern, n.removesuffix(".value"))]
        assert any(n.startswith("params") for n in matching) and any(".mu." in n for n in matching), pattern


def test_checkpoints_of_eight_devices_go_on_on_two_and_on_one(config, batches, alone, tmp_path):
    """10 steps on 8, then 10 on fewer: what one device would have got."""
    eight = MeshConfig(data=2, fsdp=4).make()
    trainer = Trainer(config, eight)
    state = trainer.init()
    for step in range(1, 11):
        with jax.set_mesh(eight):
            state, _ = trainer.step(state, sharding.shard_batch(batches[step % 4], eight), step)
    saved = Checkpoints(tmp_path / "c")
    saved.save(10, state.parts(), {"next_example": 160}, {"name": "x"})
    saved.close()
    for mesh in (MeshConfig(data=1, fsdp=2).make(jax.devices()[:2]), MeshConfig().make(jax.devices()[:1])):
        other = Trainer(config, mesh)
        again = Checkpoints(tmp_path / "c")
        parts, data = again.restore(other.abstract_state.parts())
        state = TrainState.of(parts)
        again.close()
        assert data == {"next_example": 160}
        for step in range(11, NUM_STEPS + 1):
            with jax.set_mesh(mesh):
                state, _ = other.step(state, sharding.shard_batch(batches[step % 4], mesh), step)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone[0]), strict=True):
            np.testing.assert_allclose(np.asarray(a), b, atol=3e-5)


def test_a_step_with_gradients_that_are_not_finite_changes_nothing(config, batches):
    mesh = MeshConfig().make(jax.devices()[:1])
    trainer = Trainer(config, mesh)
    state = trainer.init()
    spoiled = nnx.to_flat_state(state.params)
    spoiled = nnx.from_flat_state([(p, v.replace(v[...] * np.nan) if "mask_token" in p else v) for p, v in spoiled])
    state = state._replace(params=spoiled)
    before = jax.tree.map(np.asarray, state)
    for step in (1, 2):
        with jax.set_mesh(mesh):
            state, scalars = trainer.step(state, sharding.shard_batch(batches[0], mesh), step)
        assert scalars["skipped_steps"] == scalars["skipped_in_a_row"] == step
    for a, b in zip(
        jax.tree.leaves((before.params, before.optimizer)),
        jax.tree.leaves((state.params, state.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, np.asarray(b))


def test_weights_are_loaded_by_name_and_modality(config, tmp_path):
    """A model with one modality more, one less and another depth keeps all else bit for bit, and says what it did."""
    from m4.checkpoints.model_file import save_model
    from m4.tokens.modality import Grid

    old = Model(config.model, config.modalities, rngs=nnx.Rngs(7))
    save_model(old, tmp_path / "old.safetensors")
    new_grid = Grid(name="infrared", signal="infrared", vocab_size=5, shape=(2, 2))
    items = [new_grid, *(m for m in config.modalities if m.name != "depth_tokens")]
    wider = dataclasses.replace(
        config,
        tokenizers=tuple(IdsRecipe(modality=m) for m in items),
        model=dataclasses.replace(config.model, encoder_depth=3),
    )
    trainer = Trainer(wider, MeshConfig(data=1, fsdp=8).make())
    start = trainer.init()
    params, report = load_weights(start.params, trainer.model, tmp_path / "old.safetensors")
    model = nnx.merge(trainer._split[0], params)
    table, old_table = np.asarray(model.token_embedding[...]), np.asarray(old.token_embedding[...])
    assert np.array_equal(table[5:16], old_table[:11]) and np.array_equal(table[16:46], old_table[18:48])
    # New rows point where they were drawn to, and are as long as the old ones differ.
    drawn = np.asarray(nnx.merge(trainer._split[0], start.params).token_embedding[...])[:5]
    spread = np.concatenate([table[5:16], table[16:46]]).std(axis=0).mean()
    np.testing.assert_allclose(table[:5], drawn * spread / np.sqrt((drawn**2).mean()), rtol=1e-5)
    assert {"token_embedding[infrared]", "modality_embedding[infrared]"} <= set(report.new)
    assert "encoder.2.mlp.up.kernel" in report.new and "encoder.1.mlp.up.kernel" in report.loaded
    assert sorted(report.missing) == ["modality_embedding[depth_tokens]", "token_embedding[depth_tokens]"]
    assert not report.mismatched and "loaded" in str(report)
    for x, y in zip(jax.tree.leaves(start.params), jax.tree.leaves(params), strict=True):
        assert x.sharding == y.sharding
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=32))
    trainer = Trainer(other, MeshConfig().make(jax.devices()[:1]))
    _, report = load_weights(trainer.init().params, trainer.model, tmp_path / "old.safetensors")
    assert len(report.mismatched) == 2 * 4 and not report.new
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, width=2 * config.model.width))
    trainer = Trainer(wider, MeshConfig().make(jax.devices()[:1]))
    with pytest.raises(ValueError, match="fits"):
        load_weights(trainer.init().params, trainer.model, tmp_path / "old.safetensors")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


STEPS = ["--num-steps", "12", "--save-every", "6", "--average-decay", "0.9", "--evaluators.0.num-samples", "2"]


def losses_of(workdir) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def start(*args, **variables):
    environ = {**environment(), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(*args), cwd=ROOT, env=environ, **pipes)


def jax_job(count: int) -> list[dict[str, str]]:
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    return [{**job, "JAX_PROCESS_ID": str(i)} for i in range(count)]


def slurm_job(count: int) -> list[dict[str, str]]:
    """What `srun` sets for the tasks of one node; JAX takes the port from the job's number."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    return [{**job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("job", [jax_job, slurm_job])
def test_two_processes_equal_one(job, data_dir, tmp_path):
    """The same losses at every step, and checkpoints that one process resumes."""

    def run(workdir, count=1):
        arguments = ["--workdir", str(tmp_path / workdir), "--data-dir", str(data_dir), *STEPS]
        processes = [start(*arguments, **variables) for variables in (job(count) if count > 1 else [{}])]
        outputs = [p.communicate(timeout=300)[0] for p in processes]
        assert not any(p.returncode for p in processes), "\n".join(o[-3000:] for o in outputs)
        return outputs

    run("one")
    outputs = run("two", count=2)
    assert "mesh {'data': 2, 'fsdp': 1, 'tensor': 1} of 2 process(es)" in outputs[0]
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=3e-5)
    os.rename(tmp_path / "two" / "checkpoints" / "12", tmp_path / "later")  # as if killed after step 6
    assert "resumed from step 6" in run("two")[0]
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=3e-5)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"fsdp": 3}, "does not use 8 devices"),
        ({"data": 0}, "does not use 8 devices"),
        ({"data": 3, "fsdp": 2}, "does not use 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**fields).make()


def test_sizes_that_the_mesh_does_not_divide_are_named():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).make()
    for sizes, message in (
        ((6, 16, 1, 16), "batch_size=6 must be a multiple of data x fsdp x micro_batches = 4"),
        ((8, 16, 4, 16), "micro_batches = 16"),
        ((8, 15, 1, 16), "num_targets=15 must be a multiple of tensor=2"),
        ((8, 16, 1, 18), "width=18 must be a multiple of fsdp x tensor = 4"),
    ):
        with pytest.raises(ValueError, match=message):
            sharding.check_sizes(*sizes, mesh)
