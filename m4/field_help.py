"""What `--help` says of a config: the docstring under each field, and which class fills it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo


@functools.cache
def field_docstrings(cls: type) -> dict[str, str]:
    """Name of each field of a dataclass -> the docstring under it, as one line; inherited fields included."""
    found = {}
    for parent in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(parent)))
        except (OSError, TypeError):  # built in, or without a file
            continue
        for field, below in itertools.pairwise(tree.body[0].body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def first_screen(config: Any, names: Sequence[str]) -> str:
    """A table of some fields, by name ("optimizer.learning_rate"): option, value in this config, first sentence."""
    rows = []
    for name in names:
        *parents, field = name.split(".")
        owner = functools.reduce(getattr, parents, config)
        option = f"--{name.replace('_', '-')} {getattr(owner, field)!r}"
        rows.append((option, field_docstrings(type(owner)).get(field, "").partition(". ")[0].rstrip(".")))
    width, columns = max(len(option) for option, _ in rows) + 2, shutil.get_terminal_size().columns
    return "\n".join(
        f"  {option:{width}}{textwrap.shorten(words, max(columns - width - 2, 20), placeholder=' ...')}"
        for option, words in rows
    )


def parse(config: Any, argv: Sequence[str], *, prog: str | None, description: str) -> Any:
    """The dataclass with the fields that `argv` gives (`--optimizer.learning-rate 1e-3`); `--help` lists all."""
    return tyro.cli(
        type(config),
        default=config,
        args=argv,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
        registry=_registry,
    )


_registry = ConstructorRegistry()


@_registry.struct_rule
def _described(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Dataclasses and tuples of them as tyro has them, but with docstrings as paragraphs, and with names of classes."""
    value = info.default
    if dataclasses.is_dataclass(info.type) and isinstance(value, info.type):
        hints = typing.get_type_hints(info.type, include_extras=True)
        fields = [
            StructFieldSpec(
                name=field.name,
                # Nothing on the command line makes a part that is None: it is shown, to be set in the config's file.
                type=hints[field.name] if getattr(value, field.name) is not None else _for_none(hints[field.name]),
                default=getattr(value, field.name),
                helptext=_words(info.type, field.name, getattr(value, field.name)),
            )
            for field in dataclasses.fields(info.type)
            if field.init
        ]
        return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))
    is_tuple = info.type is tuple or typing.get_origin(info.type) is tuple
    if is_tuple and isinstance(value, tuple) and value and all(dataclasses.is_dataclass(x) for x in value):
        fields = [
            StructFieldSpec(name=str(i), type=type(x), default=x, helptext=functools.partial(_summary, type(x)))
            for i, x in enumerate(value)
        ]
        return StructConstructorSpec(instantiate=lambda **items: tuple(items.values()), fields=tuple(fields))
    return None


def _for_none(hint: Any) -> Any:
    return Any if any(map(dataclasses.is_dataclass, typing.get_args(hint))) else hint


def _words(cls: type, field: str, value: Any) -> Callable[[], str]:
    def words() -> str:
        docstring = field_docstrings(cls).get(field, "")
        return f"{type(value).__name__}. {docstring}" if dataclasses.is_dataclass(value) else docstring

    return words


def _summary(cls: type) -> str:
    """ "Scenes. The recipe of a set of scenes." """
    docstring = inspect.getdoc(cls) or ""
    if docstring.startswith(f"{cls.__name__}("):  # what dataclasses make where there is none
        docstring = ""
    return " ".join(f"{cls.__name__}. {docstring.partition(chr(10) * 2)[0]}".split())
