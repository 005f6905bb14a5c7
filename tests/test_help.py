"""Every field of a config says what it means, and `--help` shows it, the most used fields first."""

import ast
import dataclasses
import functools
import inspect
import re
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from test_house import modules

import m4.__main__
import m4_tokenizers.__main__
from m4.config import load_config
from m4.field_help import field_docstrings

PACKAGES = {"m4": m4.__main__, "m4_tokenizers": m4_tokenizers.__main__}
TOKENIZER_VERBS = [("m4_tokenizers", verb) for verb in m4_tokenizers.__main__.VERBS]

# What config.json holds, as annotations call it.
JSON = {"str", "int", "float", "bool", "None", "tuple", "dict", "Mapping", "Literal", "Any"}
JSON |= {"tyro.conf.OmitArgPrefixes"}  # options without the name of their group


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in modules().items()}


def is_frozen_dataclass(node: ast.stmt) -> bool:
    calls = [d for d in getattr(node, "decorator_list", ()) if isinstance(d, ast.Call)]
    is_dataclass = any(ast.unparse(d.func) in ("dataclass", "dataclasses.dataclass") for d in calls)
    return isinstance(node, ast.ClassDef) and is_dataclass and any(k.arg == "frozen" for d in calls for k in d.keywords)


def fields(node: ast.ClassDef) -> list[tuple[ast.AnnAssign, bool]]:
    """Its own fields, and whether a docstring stands below each."""
    below = [*node.body[1:], None]
    return [
        (field, isinstance(after, ast.Expr) and isinstance(getattr(after.value, "value", None), str))
        for field, after in zip(node.body, below, strict=True)
        if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation)
    ]


def names(annotation: ast.expr) -> set[str]:
    """Names in an annotation, the values of Literal left out."""
    if isinstance(annotation, ast.Constant):
        return {"None"} if annotation.value is None or annotation.value is ... else {str(annotation.value)}
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return {"Literal"}
    if isinstance(annotation, ast.Attribute):
        return {ast.unparse(annotation)}
    own = {annotation.id} if isinstance(annotation, ast.Name) else set()
    return own.union(*map(names, (x for x in ast.iter_child_nodes(annotation) if isinstance(x, ast.expr))))


@functools.cache
def configs() -> dict[str, ast.ClassDef]:
    """The dataclasses that a config may hold: public, frozen, and of values of JSON and each other alone.

    Those that hold a path, an array or a model, and those that are sequences of examples, exist while a program runs.
    """
    nodes = [node for tree in trees().values() for node in tree.body]
    aliases = {
        node.targets[0].id: names(node.value)
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(node.value, ast.BinOp | ast.Subscript)
    }
    classes = {node.name: node for node in nodes if is_frozen_dataclass(node) and node.name[0] != "_"}
    is_sequence = {
        name for name, node in classes.items() if any(getattr(x, "name", "") == "__getitem__" for x in node.body)
    }
    held = {name: {n for f, _ in fields(node) for n in names(f.annotation)} for name, node in classes.items()}
    allowed = {*classes} - is_sequence
    while wrong := {n for n in allowed if any(not (aliases.get(x, {x}) <= JSON | allowed) for x in held[n])}:
        allowed -= wrong
    return {name: classes[name] for name in sorted(allowed)}


def test_every_field_of_a_config_has_a_docstring():
    known = {"Config", "ModelConfig", "BlockConfig", "LoRA", "MeshConfig", "OptimizerConfig", "Dataset", "Masking"}
    known |= {
        "Strategy",
        "EpisodeMasking",
        "Contrast",
        "Scenes",
        "Folders",
        "Tars",
        "Texts",
        "Tfds",
        "Crops",
        "ConditionalTask",
    }
    known |= {
        "MaskGIT",
        "Stage",
        "Guidance",
        "FewShot",
        "VQRecipe",
        "DiffusionDecoder",
        "VectorQuantizer",
        "Perceptual",
    }
    assert known <= {*configs()}, known - {*configs()}
    assert not {"TrainedModel", "PhotoSplit", "Trainer", "Stamp"} & {*configs()}
    bare = [
        f"{name}.{ast.unparse(field.target)}"
        for name, node in configs().items()
        for field, has_docstring in fields(node)
        if not has_docstring
    ]
    assert not bare


def test_docstrings_are_found_where_parents_have_them():
    quickstart = load_config(str(ROOT / "configs/quickstart.py"))
    found, open_ = set(), [quickstart]
    while open_:
        value = open_.pop()
        if dataclasses.is_dataclass(value):
            found.add(type(value))
            open_ += [getattr(value, field.name) for field in dataclasses.fields(value)]
        elif isinstance(value, tuple):
            open_ += value
    assert len(found) > 15
    for cls in found:
        said = field_docstrings(cls)
        assert all(said.get(field.name) for field in dataclasses.fields(cls) if field.init), cls
    assert all(line.strip() for cls in found for line in inspect.getdoc(cls).splitlines()[:1])


@pytest.fixture(scope="module")
def help_text() -> str:
    command = [sys.executable, "train.py", "configs/quickstart.py", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | {"COLUMNS": "100"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    return done.stdout


def test_help_shows_the_most_used_fields_first(help_text):
    lines = help_text.splitlines()
    assert all(len(line) <= 100 for line in lines)
    first_screen = "\n".join(lines[:50])
    for option in (
        "--num-steps 680",
        "--batch-size 64",
        "--optimizer.learning-rate 0.002",
        "--model.width 192",
        "--mesh.",
    ):
        assert option in first_screen
    groups = [f"─ {name} options" for name in ("model", "optimizer", "mesh", "masking", "datasets.0", "tokenizers.0")]
    places = [help_text.index(group) for group in groups]
    assert places == sorted(places) and places[-1] < help_text.index("─ evaluators.0 options")


def test_help_shows_every_docstring(help_text):
    shown = "".join(help_text.replace("│", "").split())
    quickstart = load_config(str(ROOT / "configs/quickstart.py"))
    for part in (quickstart, quickstart.model, quickstart.optimizer, quickstart.datasets[0], quickstart.tokenizers[1]):
        for words in field_docstrings(type(part)).values():
            assert "".join(words.split()) in shown, words


def test_help_into_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} train.py configs/quickstart.py --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("usage: train.py configs/quickstart.py") and not done.stderr, done.stderr[-2000:]


def test_help_loads_nothing_that_only_training_needs(help_text):
    code = "import sys, train\ntry:\n    train.from_cli('', ['configs/quickstart.py', '--help'])\nexcept SystemExit:\n"
    slow = {"tensorflow", "matplotlib", "scipy.optimize", "grain", "gradio"}
    code += f"    print(*{slow} & {{*sys.modules}}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr[-2000:]


@pytest.mark.parametrize("package, verb", [("m4", verb) for verb in m4.__main__.verbs()] + TOKENIZER_VERBS)
def test_help_of_each_verb_explains_each_option(package, verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        PACKAGES[package].main([verb, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(len(line) <= 100 for line in text.splitlines())
    options = text.partition("options:")[2].splitlines()[1:]
    for line, after in zip(options, [*options[1:], ""], strict=True):
        if line.startswith("  -"):  # words behind the option, or on the next line
            assert re.search(r"\S {2,}\S", line) or after.startswith(" " * 8), line


@pytest.mark.parametrize("package", ["m4", "m4_tokenizers"])
def test_list_of_verbs_fits_a_terminal(package, capsys):
    with pytest.raises(SystemExit):
        PACKAGES[package].main(["--help"])
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())
