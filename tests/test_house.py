"""The rooms of m4: floors that import only from those below, and no circles between files."""

import ast
import graphlib
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = {"m4": ROOT / "m4", "m4_tokenizers": ROOT / "tokenizers" / "m4_tokenizers"}
# A room imports from rooms of lower floors alone.
FLOORS = """
    errors files command_line field_help
  < registry tensor_file pictures distributed
  < tokens
  < masking model
  < data checkpoints
  < training inference adaptation objectives
  < representations in_context demo config
  < evaluation interchange
  < commands
"""


def modules() -> dict[str, Path]:
    """Name -> file of every module of both packages."""
    files = {}
    for package, root in PACKAGES.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join([package, *parts]).removesuffix(".__init__")] = path
    return files


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a file imports anywhere: inside functions and for type checkers, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & {*known}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def room_of(module: str) -> str:
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "m4" else package


def test_no_circles_between_files(graph):
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names one


def test_rooms_import_from_lower_floors(graph):
    floors = {room: i for i, floor in enumerate(FLOORS.split("<")) for room in floor.split()}
    rooms = {room_of(module) for module in graph} - {"", "__main__", "m4_tokenizers"}
    assert rooms == {*floors}
    arrows = set()
    for module, targets in graph.items():
        room = room_of(module)
        for target in targets:
            other = room_of(target)
            if room == other or room in ("", "__main__"):  # m4/__init__.py names what users import from m4 itself
                continue
            arrows.add((room, other))
            if room == "m4_tokenizers":
                assert other not in ("commands", "demo", "__main__"), f"{module} imports {target}"
            else:
                assert other != "m4_tokenizers", f"{module} imports {target}"
                assert floors[other] < floors[room], f"{module} imports {target}, which is not below it"
    assert len(rooms) <= 30 and len(arrows) <= 150


def test_files_are_short():
    """Long files hold two concerns."""
    long = {path: lines for path in modules().values() if (lines := path.read_text().count("\n")) > 400}
    assert not long


def test_functions_are_short():
    """Sixty lines at most, but for train.py's: a reader sees a whole run from top to bottom there."""
    long = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in (*modules().values(), ROOT / "train.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert long == {"train.py: main"}


def test_each_file_says_what_it_is():
    for path in modules().values():
        assert ast.get_docstring(ast.parse(path.read_text())), path
