"""`python -m m4 VERB`: each file of m4/commands is a verb, and each module that an entry point of the group `m4.verbs`
names (those of users' packages too)."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from m4.command_line import ends_with_a_sentence
from m4.errors import closest


def verbs() -> dict[str, str]:
    """Each verb and its module."""
    files = (Path(__file__).parent / "commands").glob("[a-z]*.py")
    entries = importlib.metadata.entry_points(group="m4.verbs")
    known = {entry.name: entry.value for entry in entries} | {f.stem: f"m4.commands.{f.stem}" for f in files}
    return dict(sorted(known.items()))


def summary(module: str) -> str:
    """The first line of a module's docstring; it is not imported."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text("utf-8") if spec is not None and spec.origin else ""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(argv: list[str]) -> None:
    known = verbs()
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<12}{summary(module)}" for name, module in known.items()]
        print("usage: python -m m4 VERB ...\n\n" + "\n".join(lines) + "\n\npython -m m4 VERB --help tells more")
        raise SystemExit(0 if argv else 2)
    if argv[0] not in known:
        raise ValueError(f"unknown verb {argv[0]!r}; {closest(argv[0], list(known))}")
    importlib.import_module(known[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    with ends_with_a_sentence():
        main(sys.argv[1:])
