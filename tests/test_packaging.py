"""What surrounds the code: the lock file and the markers of typed packages."""

import tomllib

from conftest import ROOT
from packaging.requirements import Requirement


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
