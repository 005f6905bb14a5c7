"""A run: killed and continued it ends with the same numbers; bad configs are named; eight devices equal one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, call_train, command, environment, run
from flax import nnx

from m4.checkpoints import runs as checkpoints
from m4.checkpoints.hub import packaged
from m4.checkpoints.numbered import CheckpointConfig, Checkpoints
from m4.checkpoints.runs import export, load_run
from m4.distributed import mesh as sharding
from m4.model.encoder_decoder import Model
from m4.objectives import cross_entropy as losses
from m4.tokens.tokenizer import tokenizer_hash
from m4.training.trainer import TrainState

NUM_STEPS = 100  # of tests/tiny_config.py


def final_arrays(workdir: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(load_run(workdir).model, nnx.Param))]


def logged(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Until that step is logged and a checkpoint, which is written in the background, is complete."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        file = workdir / "metrics.jsonl"
        saved = any(folder.name.isdecimal() for folder in workdir.glob("checkpoints/*"))
        if saved and file.exists() and file.read_text().count("\n") >= step:
            return
        assert process.poll() is None, f"the run ended before step {step}"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_a_run_leaves_what_the_readme_says(whole_run):
    for name in ("metrics.json", "gallery.png", "metrics.jsonl", "checkpoints", "config.json", "tensorboard"):
        assert (whole_run / name).exists(), name
    stems = {p.stem for p in (whole_run / "tokenizers").iterdir()}
    assert stems == {"rgb", "rgb_pixels", "depth", "caption", "boxes"}
    scores = json.loads((whole_run / "metrics.json").read_text())
    directions = {"rgb_to_depth", "rgb_to_caption", "rgb_to_boxes", "caption_to_rgb", "depth_to_rgb"}
    assert set(scores) == directions | {f"{name}_heldout" for name in directions}
    for name, score in scores.items():
        assert {"value", "baseline", "bound", "normalised", "metric", "num_samples"} <= set(score)
        assert score["num_samples"] == (8 if name.endswith("_heldout") else 12)
    assert [line["step"] for line in logged(whole_run)] == list(range(1, NUM_STEPS + 1))


def test_loss_falls(whole_run):
    losses = [line["loss"] for line in logged(whole_run)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5


def test_killed_and_continued_equals_uninterrupted(whole_run, data_dir, tmp_path):
    """SIGKILL at a random step, SIGTERM at a later one, then to the end: the same parameters, bit for bit."""
    workdir = tmp_path / "killed"
    args = command("--workdir", str(workdir), "--data-dir", str(data_dir))
    rng = np.random.default_rng(int(time.time()))
    for sent, step in ((signal.SIGKILL, int(rng.integers(5, 20))), (signal.SIGTERM, int(rng.integers(30, 50)))):
        process = subprocess.Popen(args, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        wait_for_step(process, workdir, step)
        process.send_signal(sent)
        output = process.communicate(timeout=120)[0]
        if sent == signal.SIGTERM:
            assert process.returncode == 0 and "stopped by SIGTERM" in output
            assert "resumed from step" in output
    done = run("--workdir", str(workdir), "--data-dir", str(data_dir))
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(final_arrays(workdir), final_arrays(whole_run), strict=True):
        np.testing.assert_array_equal(a, b)
    timed = {"tokens_per_s", "mfu", "input_wait", "memory_gib"}
    same, whole = ([{k: v for k, v in x.items() if k not in timed} for x in logged(w)] for w in (workdir, whole_run))
    assert same == whole


@pytest.mark.slow
def test_twenty_kills_end_bit_equal(whole_run, data_dir, tmp_path):
    """SIGKILL at random moments, many of them during saves, which take place every fourth step."""
    workdir = tmp_path / "killed"
    args = command("--workdir", str(workdir), "--data-dir", str(data_dir))
    rng = np.random.default_rng(int(time.time()))
    for _ in range(20):
        process = subprocess.Popen(args, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
        before, deadline = (workdir / "metrics.jsonl"), time.monotonic() + 100
        size = before.stat().st_size if before.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:  # until it trains
            if before.exists() and before.stat().st_size > size:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.4)
        process.kill()
        process.wait()
    done = run("--workdir", str(workdir), "--data-dir", str(data_dir))
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(final_arrays(workdir), final_arrays(whole_run), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_that_stay_not_finite_end_the_run(data_dir, tmp_path):
    """With the examples that were read, and without spoiling the last checkpoint."""
    options = ["--optimizer.learning-rate", "1e30", "--max-skipped", "3", "--num-steps", "40", "--save-every", "100"]
    done = run("--workdir", str(tmp_path / "w"), "--data-dir", str(data_dir), *options)
    assert done.returncode != 0 and "gradients were not finite in 3 steps in a row" in done.stderr, done.stderr[-2000:]
    addresses = json.loads((tmp_path / "w" / "not_finite.json").read_text())
    assert [a["num_examples"] for a in addresses] == [16] * 4
    assert [a["first_example"] for a in addresses] == [16 * (a["step"] - 1) for a in addresses]


@pytest.mark.parametrize(
    "args,message",
    [
        (["--model.widht", "3"], "width"),
        (["--model.width", "30"], "multiple of num_heads"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--mesh.fsdp", "3"], "does not use"),
        (["--micro-batches", "3"], "must be a multiple of data x fsdp x micro_batches = 24"),
        (["--profile", "9", "3"], "must be the first and the last step"),
        (["--init-from", "runs/nothing"], "runs/nothing"),
        (["--datasets.0.source.variant", "simpel"], "simple"),
        (["--evaluators.0.splits", "test", "helduot"], "Did you mean 'heldout'"),
        (["--num-eval-samples", "3"], "since m4 0.2 --num-eval-samples is --evaluators.0.num-samples"),
        (["--evaluators.0.splits", "test", "test"], "must be different names"),
    ],
)
def test_bad_config_is_named_before_compute(args, message, tmp_path):
    done = call_train("--workdir", str(tmp_path / "x"), "--data-dir", str(tmp_path / "d"), *args)
    assert done.returncode != 0 and message in done.stderr + done.stdout
    assert not (tmp_path / "d").exists()


def test_another_config_in_the_same_folder_is_refused(whole_run, data_dir):
    before = (whole_run / "config.json").read_bytes()
    done = run("--workdir", str(whole_run), "--data-dir", str(data_dir), "--model.hidden", "64")
    assert done.returncode != 0
    assert "model.hidden=32, now 64" in done.stderr and "--workdir" in done.stderr
    assert (whole_run / "config.json").read_bytes() == before


def test_missing_config_names_the_closest():
    done = subprocess.run(
        [sys.executable, "train.py", "configs/quikstart.py"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "configs/quickstart.py" in done.stderr


def test_an_exported_model_is_the_run_rounded(whole_run, tmp_path, monkeypatch):
    """By its folder, or by its name once it lies in the package; another name is refused with the closest."""
    export(whole_run, tmp_path / "tiny")
    given, exported = load_run(whole_run), load_run(tmp_path / "tiny")
    assert exported.step == given.step == NUM_STEPS and exported.config.workdir == ""
    for a, b in zip(final_arrays(whole_run), final_arrays(tmp_path / "tiny"), strict=True):
        assert b.dtype == np.float32
        np.testing.assert_array_equal(a.astype(jax.numpy.bfloat16).astype(np.float32), b)
    for name, tokenizer in given.tokenizers.items():
        assert tokenizer_hash(exported.tokenizers[name]) == tokenizer_hash(tokenizer)
    assert (tmp_path / "tiny" / "metrics.json").read_bytes() == (whole_run / "metrics.json").read_bytes()
    monkeypatch.setattr(checkpoints, "packaged", lambda: {"tiny": tmp_path / "tiny"})
    assert load_run("tiny").step == NUM_STEPS
    with pytest.raises(ValueError, match="Did you mean 'tiny'"):
        load_run("tinny")


def test_models_of_the_package_load_and_are_small():
    for name, folder in packaged().items():
        assert sum(p.stat().st_size for p in folder.rglob("*")) <= 20e6
        run = load_run(name)
        assert run.config.workdir == "" and set(run.tokenizers) == set(run.model.modalities.names)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; run as another user")
def test_unwritable_workdir(tmp_path):
    tmp_path.chmod(0o500)
    done = run("--workdir", str(tmp_path / "x"))
    assert done.returncode != 0 and "cannot write into workdir" in done.stderr


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / "x").write_text("")
    done = run("--workdir", str(tmp_path / "x"), "--data-dir", str(tmp_path / "d"))
    assert done.returncode != 0 and "cannot write into workdir" in done.stderr


def test_checkpoints_restore_what_was_saved_and_ignore_half_written(tmp_path):
    arrays = {"a": jax.numpy.arange(6.0).reshape(2, 3), "b": {"c": jax.numpy.ones(2)}}
    start = TrainState(arrays, arrays, None, jax.numpy.int32(0), jax.numpy.int32(0))
    saved = Checkpoints(tmp_path / "c", CheckpointConfig(keep_last=2, keep_every=4))
    assert saved.latest == 0
    for step in range(1, 8):
        params = jax.tree.map(lambda x, s=step: x + s, arrays)
        saved.save(step, start._replace(params=params).parts(), {"position": step}, {"name": "x"})
    saved.close()
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [4, 6, 7]
    (tmp_path / "c" / "9.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path / "c")
    assert again.latest == 7
    parts, data = again.restore(jax.tree.map(ocp.utils.to_shape_dtype_struct, start).parts())
    state = TrainState.of(parts)
    again.close()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 7), state.params, arrays)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, arrays)
    assert data == {"position": 7}


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_eight_devices_equal_one(mesh, small_model, modalities, make_batch):
    """Loss and gradients on a mesh are those of one device, with modalities unevenly present over the devices."""
    batch = make_batch(8)
    mesh = sharding.MeshConfig(**mesh).make()

    def loss_and_gradients(model, batch):
        graph, params = nnx.split(model, nnx.Param)

        def loss(params):
            m = nnx.merge(graph, params)
            return losses.cross_entropy(m, m(batch), batch.targets)[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    alone = loss_and_gradients(Model(small_model, modalities, rngs=nnx.Rngs(0)), jax.tree.map(jax.numpy.asarray, batch))
    model = Model(small_model, modalities, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.device_put(params, sharding.shardings(params, mesh)))
    with jax.set_mesh(mesh):
        together = loss_and_gradients(model, sharding.shard_batch(batch, mesh))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_a_run_goes_on_with_another_batch_size_and_more_steps(whole_run, data_dir, tmp_path):
    """At the very next example, and it says so; what would make another model is refused as before."""
    workdir = tmp_path / "longer"
    shutil.copytree(whole_run, workdir)
    options = ["--workdir", str(workdir), "--data-dir", str(data_dir), "--num-steps", "103", "--batch-size", "8"]
    done = run(*options, "--evaluators.0.splits", "test", "--evaluators.0.num-samples", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from step 100" in done.stdout
    assert "batch_size was 16 and is 8: the run goes on at the same example" in done.stdout
    assert "num_steps was 100 and is 103: the learning rate" in done.stdout
    position = json.loads((workdir / "checkpoints" / "103" / "data" / "metadata").read_text())
    assert position["next_example"] == 100 * 16 + 3 * 8 and position["batches"] == [[100, 16], [3, 8]]
    assert [line["step"] for line in logged(workdir)] == list(range(1, 104))
    done = run("--workdir", str(workdir), "--data-dir", str(data_dir), "--num-steps", "90")
    assert done.returncode != 0 and "num_steps=103, now 90" in done.stderr and "--init-from" in done.stderr
