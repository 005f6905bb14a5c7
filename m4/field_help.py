"""`--help` of a config: the docstring under each field, and the class of its value."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Sequence
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo


@functools.cache
def field_docstrings(cls: type) -> dict[str, str]:
    """Name of each field of a dataclass -> the docstring under it, as one line; inherited fields included."""
    docstrings = {}
    for parent in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(parent)))
        except (OSError, TypeError):  # built in, or without a file
            continue
        body = [node for top in tree.body if isinstance(top, ast.ClassDef) for node in top.body]
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                docstrings[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(below.value)).split())
    return docstrings


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
        f"  {option:{width}}{textwrap.shorten(sentence, max(columns - width - 2, 20), placeholder=' ...')}"
        for option, sentence in rows
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
    """Dataclasses as tyro treats them, but with docstrings as paragraphs, and with the names of classes."""
    cls, value = info.type, info.default
    if not (dataclasses.is_dataclass(cls) and isinstance(value, cls)):
        return None
    hints: dict[str, Any] = typing.get_type_hints(cls, include_extras=True)
    specs = []
    for name in [field.name for field in dataclasses.fields(cls) if field.init]:
        item = getattr(value, name)
        hint: Any = hints[name]
        if _is_parts(item):
            for i, part in enumerate(item):
                help_text = functools.partial(
                    _summary, type(part), field_docstrings(cls).get(name, "") if i == 0 else ""
                )
                specs.append(StructFieldSpec(name=f"{name}.{i}", type=type(part), default=part, helptext=help_text))
            continue
        if item in (None, ()) and any(a is Any or dataclasses.is_dataclass(a) for a in typing.get_args(hint)):
            # Options cannot create an absent part: it is only shown, and is set in the config's file.
            hint = Any if item is None else tyro.conf.Fixed[tuple[str, ...]]
        help_text = functools.partial(_help_text, cls, name, item)
        specs.append(StructFieldSpec(name=name, type=typing.cast(Any, hint), default=item, helptext=help_text))
    return StructConstructorSpec(instantiate=functools.partial(_make, value), fields=tuple(specs))


def _is_parts(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(dataclasses.is_dataclass, value))


def _make(old: Any, /, **given: Any) -> Any:
    """The dataclass of these fields, where "datasets.0" is the first item of `datasets`."""
    fields: dict[str, Any] = {}
    for name, value in given.items():
        field, dot, _ = name.partition(".")
        fields[field] = (*fields.get(field, ()), value) if dot else value
    return type(old)(**fields)


def _help_text(cls: type, field: str, value: Any) -> str:
    docstring = field_docstrings(cls).get(field, "")
    return f"{type(value).__name__}. {docstring}" if dataclasses.is_dataclass(value) else docstring


def _summary(cls: type, field: str) -> str:
    """The docstring of a field, then the name and the first paragraph of the class of its item."""
    docstring = inspect.getdoc(cls) or ""
    if docstring.startswith(f"{cls.__name__}("):  # the generated docstring of a dataclass without one
        docstring = ""
    return " ".join(f"{field} {cls.__name__}. {docstring.partition(chr(10) * 2)[0]}".split())
