"""A run that version 0.1 saved goes on loading, generates the same tokens and resumes to the same parameters."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, environment
from flax import nnx

from m4.checkpoints.model_file import load_model
from m4.checkpoints.runs import load_run
from m4.inference.autoregressive import Autoregressive
from m4.inference.parallel import MaskGIT
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage
from m4.model.parameters import parameters
from m4.registry import RENAMED_PARAMETERS
from m4.tokens.modality import Sequence
from m4.tokens.tokenizer import load_tokenizer, tokenizer_hash
from m4_tokenizers.modalities.stored import IdsRecipe

SAVED = ROOT / "tests/data/runs_0.1"
EXPECTED = json.loads((SAVED / "expected.json").read_text())


def check_parameters(model, sums: dict[str, list[float]], tolerance: float) -> None:
    found = {name: np.asarray(x, np.float64) for name, x in parameters(nnx.state(model, nnx.Param)).items()}
    sums = {RENAMED_PARAMETERS.get(name, name): values for name, values in sums.items()}
    assert found.keys() == sums.keys()
    for name, x in found.items():
        np.testing.assert_allclose([x.sum(), np.square(x).sum()], sums[name], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def run():
    return load_run(SAVED / "run")


def test_its_parameters_and_model_file_are_read(run):
    assert run.step == 2
    check_parameters(run.model, EXPECTED["step_2"], 1e-9)
    check_parameters(load_model(SAVED / "model.safetensors"), EXPECTED["step_2"], 0.05)  # rounded to bfloat16


def test_it_generates_the_same_tokens(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    sampler = Sampler(run.model, run.tokenizers, devices=jax.local_devices()[:1])
    greedy = MaskGIT(steps=4, temperature=0, choice_temperature=0)
    plan = [Stage(target="depth", scheme=greedy), Stage(target="caption", scheme=Autoregressive(temperature=0))]
    tokens = sampler({"rgb": "tests/data/scene.png"}, plan).tokens
    tokens |= sampler({"caption": "a large red cube"}, [Stage(target="rgb", scheme=greedy)]).tokens
    assert {name: rows[0].tolist() for name, rows in tokens.items()} == EXPECTED["tokens"]


def test_it_resumes_to_the_same_parameters(tmp_path):
    shutil.copytree(SAVED / "run", tmp_path / "run")
    options = ["--workdir", str(tmp_path / "run"), "--data-dir", str(tmp_path / "data")]
    command = [sys.executable, "train.py", "tests/data/run_0_1.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "resumed from step 2" in done.stdout, done.stderr[-3000:]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses, EXPECTED["losses"], rtol=1e-5)
    check_parameters(load_run(tmp_path / "run").model, EXPECTED["step_4"], 1e-5)


def test_its_tokenizers_have_the_same_hashes():
    """By which data, runs and checkpoints know them."""
    hashes = {file.stem: tokenizer_hash(load_tokenizer(file)) for file in (SAVED / "run/tokenizers").iterdir()}
    assert hashes == {
        "caption": "94b05fe2ec73", "depth": "be9938de9f53", "rgb": "3d6dd33309ef", "rgb_pixels": "60bcaec0ec5e",
    }  # fmt: skip
    sizes = {"vocab_size": 64, "max_length": 9, "first_sentinel": 3, "num_sentinels": 4, "end_id": 1}
    ids = IdsRecipe(modality=Sequence(name="words", signal="words", **sizes))
    assert tokenizer_hash(ids.fit([], seed=0)) == "0b8d7a81912b"
