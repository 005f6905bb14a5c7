"""README and docs: commands and Python examples work, what they name exists, every room has its page."""

import ast
import builtins
import contextlib
import hashlib
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import ROOT, call_m4, code_blocks, documents, environment, executed_commands
from test_house import FLOORS, modules

from m4.__main__ import verbs
from m4.checkpoints.hub import packaged
from m4.config import from_cli

PYTHON = code_blocks("python")
SHELL = code_blocks("bash")
TRAIN = [line for b in SHELL for line in b.commands if "python train.py " in line and "pip install" not in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a reader's checkout looks like: the packaged model is in the place of runs/quickstart, and the config that
    the guide writes is among the others."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("runs", "configs"):
        (root / name).mkdir()
    (root / "runs" / "quickstart").symlink_to(packaged()["scenes"])
    for path in (*(ROOT / "configs").iterdir(), ROOT / "tests"):
        (root / path.relative_to(ROOT)).symlink_to(path)
    (mine,) = (b.text for b in PYTHON if b.text.startswith("# configs/mine.py"))
    (root / "configs" / "mine.py").write_text(mine)
    return root


def test_the_readme_is_short():
    assert documents()["README.md"].count("\n") <= 150


def test_every_block_has_a_language():
    """Blocks are found by their fences; what is indented is no command."""
    for document, text in documents().items():
        fences = re.findall(r"^```.*$", text, re.MULTILINE)
        assert set(fences[::2]) <= {"```bash", "```python"} and set(fences[1::2]) <= {"```"}, document
        assert not re.search(
            r"^    (?:python|pip|pytest) ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
        )
        reasons = text.count("<!-- not executed: ")
        assert reasons == sum(bool(b.reason) for b in code_blocks("bash", "python") if b.document == document), document


@pytest.mark.filterwarnings("ignore:.*resized and cropped")  # a reader sees it
@pytest.mark.parametrize("document", dict.fromkeys(b.document for b in PYTHON if not b.reason))
def test_python_examples(document, folder, monkeypatch):
    """The examples of a page in order, in one session. A config that they make holds together."""
    monkeypatch.chdir(folder)
    # The same tokens, from programs that compile in less time.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr("m4.inference.parallel.NUM_SHAPES", 1)
    session, before = {"__name__": "__main__"}, library_digest()
    for block in PYTHON:
        if block.document == document and not block.reason:
            exec(compile("\n" * block.line + block.text, str(ROOT / document), "exec"), session)
    if "config" in session:
        session["config"].check()
    assert library_digest() == before, "an example changed a file of the library"


def library_digest() -> str:
    """Of all source files of both packages."""
    sha256 = hashlib.sha256()
    for path in modules().values():
        sha256.update(path.read_bytes())
    return sha256.hexdigest()


def test_examples_of_extending_are_short():
    blocks = [b for b in PYTHON if b.document == "docs/extending.md"]
    assert len(blocks) > 10 and all(len(b.text.splitlines()) <= 40 for b in blocks)


@pytest.mark.parametrize("line", [c for c in executed_commands() if not c.startswith("python -m m4 generate ")])
def test_commands(line, whole_run, data_dir, tmp_path):
    """On a tiny run or config, into a temporary folder. Those of `generate` are in test_generate.py."""
    python, m, package, verb, first, *rest = shlex.split(line)
    assert [python, m, package] == ["python", "-m", "m4"]
    if verb in ("data", "pretokenize", "plan"):
        assert (ROOT / first).exists()
        first, rest = "tests/tiny_config.py", [*rest, "--data-dir", str(data_dir)]
    else:
        first = str(whole_run)
    out = tmp_path / "out"
    rest = [str(out), *rest[1:]] if verb == "export" else rest
    rest += ["--out", str(out), "--num-examples", "64"] if verb == "data" else []
    if verb == "plan":  # it simulates devices of its own
        command = [sys.executable, "-m", "m4", verb, first, *rest]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    else:
        done = call_m4(verb, first, *rest)
    assert done.returncode == 0, done.stderr[-2000:]
    files = {"export": "model.safetensors", "data": "samples.png"}
    assert verb not in files or (out / files[verb]).exists()


@pytest.mark.parametrize("line", dict.fromkeys(TRAIN))
def test_arguments_of_training(line, folder, monkeypatch):
    """Runs are too long for a test; their arguments are read, and their configs checked."""
    monkeypatch.chdir(folder)
    from_cli("", shlex.split(line[line.index("train.py") :])[1:]).check()


def test_paths_exist():
    """Of files in the repository. Those of features to come are in a folder that is there, or in one of a room."""
    coming = re.compile(r"<!-- files to come -->.*?<!-- end of files to come -->", re.DOTALL)
    path = re.compile(r"(?<![\w/.])(?:m4|tokenizers|configs|tests|docs|scripts|benchmarks)/[\w/.]+\.\w+")
    made_by_the_reader = {"configs/mine.py"}
    for document, text in documents().items():
        for name in set(path.findall(coming.sub("", text))) - made_by_the_reader:
            assert (ROOT / name).exists(), f"{document}: {name}"
        for name in path.findall("".join(coming.findall(text))):
            assert (ROOT / name).parent.exists() or (ROOT / name).parents[1].exists(), f"{document}: {name}"


def test_names_exist():
    """Modules and their attributes by dotted names, and classes in code."""
    files = [*(ROOT / "m4").rglob("*.py"), *(ROOT / "tokenizers" / "m4_tokenizers").rglob("*.py")]
    known = {n.name for f in files for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.ClassDef)}
    for document, text in documents().items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for name in set(re.findall(r"(?<![\w./])(m4(?:_tokenizers)?(?:\.\w+)+)", text)) - {"m4.components", "m4.verbs"}:
            assert found(name), f"{document}: {name}"
        for code in re.findall(r"`([^`\n]+)`", prose):
            # A call, or a whole code span in CamelCase.
            names = re.findall(r"\b([A-Z][a-z]\w*)\(", code) + re.findall(r"^[A-Z]+[a-z]+[A-Z]\w*$", code)
            for name in names:
                assert name in known or f"class {name}" in text or hasattr(builtins, name), f"{document}: {name}"


def found(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value = importlib.import_module(".".join(parts[:count]))
            for part in parts[count:]:
                value = getattr(value, part, None)
            return value is not None
    return False


def test_every_page_is_in_the_navigation_and_every_room_has_one():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for document, text in documents().items():
        assert document == "README.md" or f" {os.path.relpath(document, 'docs')}\n" in navigation, document
        assert "](/" not in text, document
    pages = documents()
    rooms = {p.parent.name for p in (ROOT / "m4").glob("*/__init__.py")}
    for room in rooms:
        assert f"::: m4.{room}\n" in pages[f"docs/api/{room}.md"]
    files = {p.stem for p in (ROOT / "m4").glob("[a-z]*.py")}
    for name in files:
        assert f"::: m4.{name}\n" in pages["docs/api/ground_floor.md"], name
    for verb in verbs():
        assert f"| `{verb}` |" in pages["docs/api/commands.md"], verb


def test_the_floors_are_those_that_are_checked():
    rows = documents()["docs/development.md"].split("| floor | rooms |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    shown = [{name.removesuffix(".py").rstrip("/") for name in re.findall(r"`(.+?)`", row)} for row in rows]
    assert shown == [{*floor.split()} for floor in FLOORS.split("<")]
