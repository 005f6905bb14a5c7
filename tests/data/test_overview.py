"""`python -m m4 data`, and a run on a mixture of scenes, cut-outs and text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment
from PIL import Image

from m4.data.sources.stamps import INSTALL, Stamps

needs_stamps = pytest.mark.skipif(not Path(Stamps().path).exists(), reason=f"the corpus is not here: {INSTALL}")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    lines = [f"document {i} of a corpus of text, {'long ' * (i % 90)}" for i in range(150)]
    (folder / "texts.txt").write_text("\n".join(lines))
    return ["--data-dir", str(folder / "data"), "--datasets.2.source.files", str(folder / "texts.txt")]


@pytest.mark.slow  # reads a whole mixture
@needs_stamps
def test_measured_shares_are_the_weights(options, tmp_path):
    """Shares of data sets within 2% of the weights; what is shown adds up; the sheet has a row for each sample."""
    arguments = ["tests/tiny_mixture.py", "--num-examples", "3000", "--out", str(tmp_path / "out"), *options]
    done = run("-m", "m4", "data", *arguments)
    assert done.returncode == 0, done.stderr
    shown = json.loads((tmp_path / "out/data.json").read_text())
    for name, weight in (("scenes", 0.5), ("stamps", 0.4), ("texts", 0.1)):
        facts = shown["datasets"][name]
        assert facts["weight"] == pytest.approx(weight)
        assert facts["share"] == pytest.approx(weight, rel=0.02)
        assert f"{name}" in done.stdout
    assert set(shown["datasets"]["texts"]["modalities"]) == {"caption"}
    modalities = shown["modalities"]
    assert shown["datasets"]["texts"]["modalities"]["caption"]["input_share"] == pytest.approx(1)
    for name, facts in shown["datasets"].items():
        for kind in ("input_share", "target_share"):
            assert sum(m[kind] for m in facts["modalities"].values()) == pytest.approx(1), name
    assert shown["slots"]["examples_without_targets"] < 0.02
    for kind in ("input_share", "target_share"):
        assert sum(m[kind] for m in modalities.values()) == pytest.approx(1)
    assert modalities["rgb_pixels"]["target_share"] == 0
    assert modalities["rgb_tokens"]["examples_with_it"] == pytest.approx(0.9, rel=0.02)
    assert modalities["caption"]["examples_with_it"] == 1 and modalities["caption"]["longest"] == 64
    assert 0 < shown["slots"]["targets_filled"] <= 1 and shown["samples_per_s"] > 0
    assert f"{shown['slots']['inputs_filled']:.1%} of 72 inputs" in done.stdout
    sheet = np.asarray(Image.open(tmp_path / "out/samples.png"))
    assert sheet.shape[0] > 8 * 128 and sheet.std() > 20


@needs_stamps
@pytest.mark.slow
def test_a_run_on_the_mixture(options, tmp_path):
    """Trains, with workers too, and says which slots were filled."""
    done = run("train.py", "tests/tiny_mixture.py", "--workdir", str(tmp_path / "w"), "--num-workers", "1", *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and lines[-1]["loss"] < lines[0]["loss"]
    assert all(0 < line["slots/targets"] <= 1 for line in lines)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--num-examples", "0"], "--num-examples 0 must be at least 1"),
        (["--datasets.0.weight", "-1"], "weight=-1.0 must be positive"),
        (["--datasets.2.source.files", "no_such.txt"], "no file no_such.txt"),
        (["--datasets.1.source.path", "/no/stamps"], INSTALL),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, message, tmp_path):
    done = run("-m", "m4", "data", "tests/tiny_mixture.py", "--data-dir", str(tmp_path / "d"), *arguments)
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert not (tmp_path / "d").exists()
