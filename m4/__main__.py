"""`python -m m4 VERB`: each file of m4/commands is a verb."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from m4.command_line import ends_with_a_sentence
from m4.errors import closest


def verbs() -> dict[str, str]:
    """Each verb and the first line of its docstring; nothing is imported."""
    files = sorted((Path(__file__).parent / "commands").glob("[a-z]*.py"))
    return {f.stem: (ast.get_docstring(ast.parse(f.read_text("utf-8"))) or "").partition("\n")[0] for f in files}


def main(argv: list[str]) -> None:
    known = verbs()
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<12}{line}" for name, line in known.items()]
        print("usage: python -m m4 VERB ...\n\n" + "\n".join(lines) + "\n\npython -m m4 VERB --help tells more")
        raise SystemExit(0 if argv else 2)
    if argv[0] not in known:
        raise ValueError(f"unknown verb {argv[0]!r}; {closest(argv[0], list(known))}")
    importlib.import_module(f"m4.commands.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    with ends_with_a_sentence():
        main(sys.argv[1:])
