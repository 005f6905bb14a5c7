"""`python -m m4 plan`: the step of a run compiled ahead of time, and what it will need."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT, environment
from test_convert import fixture

from m4.commands.plan import collectives
from m4.config import load_config
from m4.interchange import fourm
from m4.tokens.modality import Modalities
from m4.training import flops


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "m4", "plan", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500)


def test_simulated_devices():
    """Parameters are cut, collectives are counted, and it exits with 0."""
    arguments = ["tests/tiny_config.py", "--topology", "cpu:4", "--mesh.fsdp", "4", "--model.width", "128", "--json"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["num_devices"] == 4 and result["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and result["fits"]
    held = result["bytes_per_device"]
    assert 4 * result["num_parameters"] / 4 <= held["weights"] < 1.2 * result["num_parameters"]
    assert 2 * held["weights"] <= held["optimizer"] < 2 * held["weights"] + 100 and held["peak"] > 3 * held["weights"]
    assert result["collective_bytes_per_device"]["all-gather"] > held["weights"]


@pytest.mark.parametrize(
    "topology,message",
    [
        ("cpu:none", "cpu:N takes a number"),
        ("v5x:2x2", "unknown topology 'v5x:2x2'; allowed: cpu:..., v4:..."),
        ("cpu:3", "batch_size=16 must be a multiple of data x fsdp x micro_batches = 3"),
    ],
)
def test_what_cannot_be_tried_exits_with_2(topology, message):
    done = run("tests/tiny_config.py", "--topology", topology)
    assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is installed")
def test_libtpu_is_asked_for():
    done = run("tests/tiny_config.py", "--topology", "v5e:2x2")
    assert done.returncode == 2 and 'pip install "jax[tpu]==' in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason='needs libtpu: pip install -e ".[tpu]"')
@pytest.mark.parametrize("topology,fits", [("v5e:16x16", True), ("v5p:4x4x8", True), ("v5e:4x4", False)])
def test_the_largest_model_on_tpus(topology, fits):
    options = [] if fits else ["--mesh.fsdp", "16", "--model.remat", "none"]
    done = run("configs/4m7_xl.py", "--topology", topology, "--json", *options)
    result = json.loads(done.stdout)
    assert done.returncode == (0 if fits else 1) and result["fits"] == fits
    assert fits or result["advice"]


@pytest.mark.parametrize("name,config", [("4M-7_XL", "4m7_xl"), ("4M-7_B", "4m7_b"), ("4M-21_L", "4m21_l")])
def test_recipes_have_the_originals_parameters(name, config):
    """As the original counts them: apart from shots, with tables of its decoder for reading and for output."""
    manifest = json.loads((fixture("official_manifests") / f"{name}.json").read_text())
    c = load_config(f"configs/{config}.py")
    assert fourm.num_parameters(c.model, c.modalities) == manifest["num_parameters"]


def test_flops_of_a_model_counted_by_hand():
    """One block on each side, no padding: 2 FLOPs a parameter of a matrix and token, attention, and the output."""
    modalities = Modalities([fourm.modality("tok_depth@224")])
    c = fourm.released("tiny", encoder_depth=1, decoder_depth=1)
    n, m, d, f = 10, 6, 384, 1024
    encoder = n * (4 * d * d + 3 * d * f) + 2 * n * n * d
    decoder = m * (4 * d * d + 2 * d * d + 3 * d * f) + 2 * n * d * d + 2 * m * (m + n) * d
    expected = 6 * (encoder + decoder + n * d * d + m * 8192 * d)
    assert flops.model_flops(c, modalities, n, m, {"tok_depth@224": m}) == expected


def test_collectives_are_read_from_a_programs_text():
    text = """HloModule m
%body (p: f32[8]) -> f32[8] {
  %ag = f32[8,4]{1,0} all-gather(f32[2,4]{1,0} %p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}
%all-reduce-scatter.1 (p: f32[8]) -> f32[8] {
  %r = f32[16]{0} all-reduce(f32[16]{0} %p), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(f32[8]{0} %a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[8]{0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  %g = f32[8]{0} all-reduce(f32[8]{0} %f), channel_id=3, replica_groups=[1,2]<=[2], to_apply=%add
  %h = f32[8]{0} all-reduce(f32[8]{0} %f), channel_id=3, replica_groups=[1,2]<=[2], to_apply=%add
}
"""
    assert list(collectives(text)) == [("all-gather", 96, 3), ("reduce-scatter", 48, 1), ("all-reduce", 32, 1)]


def test_help_tells_what_there_is():
    done = run("--help")
    assert done.returncode == 0 and "v5e:16x16" in done.stdout
    assert os.path.exists(ROOT / "configs" / "4m7_xl.py")
