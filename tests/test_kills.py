"""Kills at any moment of every stage: what is left is the old, the new or named as unfinished; what follows is
bit-equal to what was never killed. pytest -m slow tests/test_kills.py -s prints how many kills there were."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, environment
from flax import nnx
from make_checkpoint import write_checkpoint

from m4.checkpoints.model_file import load_model
from m4.checkpoints.runs import load_run
from m4.config import load_config

pytestmark = pytest.mark.slow
SIZES = ["--num-steps", "8", "--save-every", "2", "--evaluators.0.num-samples", "4"]
COUNT = {"kills": 0}


def start(command: list[str]) -> subprocess.Popen:
    environ = {**environment(), "JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"}
    out = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out, start_new_session=True)


def finish(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def listing(folder: Path) -> set[tuple[str, int, int]]:
    found = set()
    for parent, folders, names in os.walk(folder):  # which takes it that folders vanish meanwhile
        for name in (*folders, *names):
            with contextlib.suppress(FileNotFoundError):
                path = os.path.join(parent, name)
                status = os.lstat(path)
                found.add((path, status.st_size, status.st_mtime_ns))
    return found


def kill(command: list[str], watched: Path, rng: np.random.Generator, *, changes: int, delay: float) -> bool:
    """Starts a command and kills it with all of its children, some time after it has changed `watched` that often.
    Whether it was still running."""
    process, before, deadline = start(command), listing(watched), time.monotonic() + 300
    wanted = int(rng.integers(1, changes + 1))
    while wanted and process.poll() is None and time.monotonic() < deadline:
        now = listing(watched)
        wanted -= now != before
        before = now
        time.sleep(0.001)
    time.sleep(rng.random() * delay)
    alive = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    COUNT["kills"] += alive
    return alive


def digests(folder: Path, *ignored: str) -> dict[str, str]:
    """SHA-256 of all files; no hidden ones may be left."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ignored]
    assert not [p for p in files if p.name.endswith(".tmp")], files
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def arrays(model) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def train(workdir: Path, data_dir: Path) -> list[str]:
    folders = ["--workdir", str(workdir), "--data-dir", str(data_dir)]
    return [sys.executable, "train.py", "tests/tiny_config.py", *SIZES, *folders]


def m4(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "m4", *map(str, args)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with `run` and `data` of a run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(train(folder / "run", folder / "data"))
    return folder


def prepared(data_dir: Path) -> dict[str, str]:
    """Digests of token shards, and of scenes as they are read: tfds writes an example's features in an order that
    differs by process. (Cards have timings.)"""
    found = {f"tokens/{name}": of for name, of in digests(data_dir / "tokens").items() if "array_record" in name}
    source = load_config(str(ROOT / "tests/tiny_config.py")).datasets[0].source
    for split in ("train", "validation", "test", "heldout"):
        scenes = source.split(split, data_dir)
        for i in range(len(scenes)):
            found[f"{split} {i}"] = hashlib.sha256(pickle.dumps(sorted(scenes[i].items()))).hexdigest()
    assert len(found) > 200
    return found


def test_kills_of_preparation(whole, tmp_path):
    """While scenes are rendered, tokenizers fitted and shards written."""
    rng = np.random.default_rng(0)
    for i in range(12):
        kill(train(tmp_path / "run", tmp_path / "data"), tmp_path, rng, changes=4 + 2 * i, delay=0.2)
    finish(m4("pretokenize", "tests/tiny_config.py", "--data-dir", tmp_path / "data"))
    assert prepared(tmp_path / "data") == prepared(whole / "data")


def test_kills_of_training(whole, tmp_path):
    rng, watched = np.random.default_rng(1), tmp_path / "run"
    shutil.copytree(whole / "data", tmp_path / "data")
    for _ in range(10):
        kill(train(watched, tmp_path / "data"), watched / "checkpoints", rng, changes=12, delay=0.1)
    finish(train(watched, tmp_path / "data"))
    assert equal(load_run(watched).model, load_run(whole / "run").model)
    assert (watched / "metrics.json").read_bytes() == (whole / "run" / "metrics.json").read_bytes()
    digests(watched)


def test_kills_of_evaluation(whole, tmp_path):
    rng, run = np.random.default_rng(5), whole / "run"
    reference = (run / "metrics.json").read_bytes(), (run / "gallery.png").read_bytes()
    for i in range(5):
        out = tmp_path / f"scores{i}"
        kill(m4("evaluate", run, "--out", out), tmp_path, rng, changes=4, delay=0.1)
        if (out / "metrics.json").exists():  # what is there is whole
            assert json.loads((out / "metrics.json").read_text()) == json.loads(reference[0])
        finish(m4("evaluate", run, "--out", out))
        assert ((out / "metrics.json").read_bytes(), (out / "gallery.png").read_bytes()) == reference
        assert set(digests(out)) <= {"metrics.json", "gallery.png", *(n for n in digests(out) if n.startswith("."))}


def check_folder(out: Path, allowed: list) -> None:
    """A folder of a model is one of these models, or is said to be none."""
    try:
        found = load_run(out)
    except ValueError as error:
        assert str(out) in str(error), error
        return
    assert any(equal(found.model, run.model) for run in allowed)


def test_kills_of_export_and_merge(whole, tmp_path):
    """Over a folder that holds another model."""
    rng, run, out = np.random.default_rng(2), whole / "run", tmp_path / "out"
    early = run / "checkpoints" / "6"
    finish(m4("export", early, tmp_path / "early"))
    finish(m4("export", run, tmp_path / "last"))
    ends = [load_run(tmp_path / "early"), load_run(tmp_path / "last")]
    assert not equal(ends[0].model, ends[1].model)
    shutil.copytree(tmp_path / "early", out)
    for i in range(8):
        kill(m4("export", [run, early][i % 2], out), out, rng, changes=12, delay=0.002)
        check_folder(out, ends)
    finish(m4("export", run, out))
    assert digests(out) == digests(tmp_path / "last")

    sweep = m4("merge", early, run, "--alphas", "0", "1", "--out")
    finish([*sweep, str(tmp_path / "merged")])
    ends.append(load_run(tmp_path / "merged"))
    for _ in range(4):
        kill([*sweep, str(out)], out, rng, changes=12, delay=0.01)
        check_folder(out, ends)
    finish([*sweep, str(out)])
    merged = digests(tmp_path / "merged")
    assert {name: of for name, of in digests(out).items() if name in merged} == merged


def test_kills_of_convert(tmp_path):
    from test_convert import fixture

    folder, rng, out = fixture("fm_mod7"), np.random.default_rng(3), tmp_path / "out.safetensors"
    source = tmp_path / "model.safetensors"
    write_checkpoint(json.loads((folder / "state_dict.json").read_text()), source)
    finish(m4("convert", source, tmp_path / "whole.safetensors"))
    reference = load_model(tmp_path / "whole.safetensors")
    for _ in range(4):
        kill(m4("convert", source, out), tmp_path, rng, changes=3, delay=0.02)
        if out.exists():
            assert equal(load_model(out), reference)
    finish(m4("convert", source, out))
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    finish(m4("convert", out, tmp_path / "back.safetensors"))
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_kills_of_generate(tmp_path):
    """Each sample's folder is whole or not there."""
    (tmp_path / "in").mkdir()
    for i in range(40):
        shutil.copy(ROOT / "tests/data/scene.png", tmp_path / "in" / f"{i:03d}.png")
    inputs = [f"rgb={tmp_path}/in", "--targets", "depth", "boxes", "--steps", "2", "--batch-size", "4"]
    finish(m4("generate", "scenes", "--inputs", *inputs, "--out", tmp_path / "whole"))
    reference, rng, out = digests(tmp_path / "whole"), np.random.default_rng(4), tmp_path / "out"
    for _ in range(5):
        kill(m4("generate", "scenes", "--inputs", *inputs, "--out", out), out, rng, changes=40, delay=0.05)
        samples = [p for p in out.iterdir() if p.is_dir() and p.name[0] != "."] if out.exists() else []
        for sample in samples:
            there = {n: of for n, of in reference.items() if n.startswith(f"{sample.name}/")}
            assert {f"{sample.name}/{n}": of for n, of in digests(sample).items()} == there
    finish(m4("generate", "scenes", "--inputs", *inputs, "--out", out))
    assert digests(out) == reference


def test_enough_kills_were_tried():
    print(f"\n{COUNT['kills']} kills while a command ran")
    assert COUNT["kills"] >= 40
