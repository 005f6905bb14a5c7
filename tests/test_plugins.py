"""A package of a user's own adds methods without a fork: installed by pip, named by entry points, used by a config."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, command, environment

PACKAGE = '''
"""An adaptation method and an evaluator, outside of m4."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from m4.evaluation.base import Evaluator
from m4.model.blocks import Block
from m4.model.extensions import Extension


class Scale(nnx.Module):
    def __init__(self, width):
        self.values = nnx.Param(jnp.ones(width))

    def __call__(self, x, inputs):
        return x * self.values[...].reshape(1, 1, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StarScale(Extension):
    parameters = ("*.star.*",)

    def wrap(self, module, config, num_modalities, rngs):
        if isinstance(module, Block):
            module.add("star", Scale(config.width))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StarSpread(Evaluator):
    name = "star_spread"

    def run(self, trained, report, seed):
        results = {"spread": float(trained.model.encoder.star.values[...].std())}
        report.write(results, f"spread {results['spread']:.2e}")
        return results
'''
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "starlight"
version = "1.0"

[project.entry-points."m4.components"]
star_scale = "starlight:StarScale"
star_spread = "starlight:StarSpread"

[tool.setuptools]
py-modules = ["starlight"]
"""
CONFIG = """
import dataclasses

from m4.config import load_config
from m4.training.optimizer import OptimizerConfig
from starlight import StarScale, StarSpread

tiny = load_config("tests/tiny_config.py")
config = dataclasses.replace(
    tiny,
    model=dataclasses.replace(tiny.model, extensions=(StarScale(),)),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, train=StarScale.parameters),
    evaluators=(StarSpread(),),
    num_steps=4,
)
"""


@pytest.mark.slow
def test_a_package_of_ones_own(data_dir, tmp_path):
    package = tmp_path / "starlight"
    package.mkdir()
    (package / "starlight.py").write_text(PACKAGE)
    (package / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "config.py").write_text(CONFIG)
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", str(site), str(package)], check=True)
    own = environment()
    own["PYTHONPATH"] = f"{own['PYTHONPATH']}:{site}"
    options = {"cwd": ROOT, "env": own, "capture_output": True, "text": True, "timeout": 500}
    workdir = tmp_path / "w"
    arguments = ("--workdir", str(workdir), "--data-dir", str(data_dir), "--save-every", "2")
    done = subprocess.run(command(*arguments, config=tmp_path / "config.py"), **options)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"]["extensions"] == [{"component": "star_scale"}]
    assert saved["evaluators"] == [{"component": "star_spread"}]
    evaluated = subprocess.run(
        [sys.executable, "-m", "m4", "evaluate", str(workdir), "--suite", "star_spread"], **options
    )
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert json.loads((workdir / "star_spread.json").read_text())["spread"] > 1e-4
    without = subprocess.run(
        [sys.executable, "-m", "m4", "evaluate", str(workdir), "--suite", "star_spread"],
        **{**options, "env": environment()},
    )
    assert without.returncode == 1 and "unknown component 'star_scale'" in without.stderr
