"""Checks of choices and values, whose errors say what was given, what is allowed and what was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np


def closest(name: str, allowed: Seq[str]) -> str:
    """The tail of an error: what is allowed, and what was probably meant."""
    match = difflib.get_close_matches(name, allowed, n=1, cutoff=0.4)
    return f"allowed: {', '.join(allowed) or '(none)'}" + (f". Did you mean {match[0]!r}?" if match else "")


def need(package: str, extra: str, what: str) -> None:
    """ValueError that names the extra to install unless a package is installed; called before any work is done."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f'{what} needs {package}: pip install "m4-jax[{extra}]"')


MAX_SEED = 2**63 - 1

# Bounds of fields by name, in any dataclass of a config; all other numbers must be finite.
BOUNDS = {
    "learning_rate": (lambda x: x > 0, "above 0"),
    "b1": (lambda x: 0 <= x < 1, "at least 0 and less than 1"),
    "b2": (lambda x: 0 <= x < 1, "at least 0 and less than 1"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "warmup_steps": (lambda x: x >= 0, "at least 0"),
    "clip_norm": (lambda x: x >= 0, "above 0, or 0 for no clipping"),
    "position_base": (lambda x: x > 0, "above 0"),
    **{name: (lambda x: x >= 1, "at least 1") for name in ("batch_size", "log_every", "save_every")},
    **{name: (lambda x: x >= 0, "at least 0") for name in ("num_steps", "num_examples", "num_held_out")},
    "seed": (lambda x: 0 <= x <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}"),
}  # fmt: skip


def check_seed(seed: Any, name: str = "seed") -> None:
    """ValueError unless it is an integer, 0 <= seed < 2**63, which every random generator here accepts."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{name}={seed} must be {BOUNDS['seed'][1]}")


def in_float32(value: float) -> float:
    """The value as training steps see it: in float32 1e39 is infinite, 1 - 1e-9 is 1, and subnormals are 0."""
    with np.errstate(over="ignore"):
        number = float(np.float32(value))
    return 0.0 if abs(number) < np.finfo(np.float32).tiny else number


def check_numbers(value: Any, where: str = "") -> None:
    """ValueError for a number within a dataclass, tuple or mapping that is not finite, beyond 64 bits, out of the
    BOUNDS of its field (both as float32), or not whole where its field is an `int`. `where`: the path that messages
    begin with, such as "optimizer"."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            item, place = getattr(value, field.name), f"{where}.{field.name}" if where else field.name
            if field.type in (int, "int") and isinstance(item, float):
                raise ValueError(f"{place}={item} must be a whole number")
            check_numbers(item, place)
            # A number alone: a field of this name may hold something else in a user's own class.
            if field.name in BOUNDS and isinstance(item, int | float):
                is_allowed, allowed = BOUNDS[field.name]
                number = in_float32(item) if isinstance(item, float) else item
                if not is_allowed(number):
                    which = f", and is {number} in float32" if number != item and is_allowed(item) else ""
                    raise ValueError(f"{place}={item} must be {allowed}{which}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_numbers(item, f"{where}[{key!r}]")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            check_numbers(item, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(in_float32(value)):
        raise ValueError(f"{where}={value} must be a finite number" + ", in float32 too" * math.isfinite(value))
    elif isinstance(value, int) and where.rpartition(".")[2] != "seed" and abs(value) >= 2**63:
        raise ValueError(f"{where}={value} is beyond what 64 bits hold")


def check_choice(value: Any, field: str, allowed: Seq[str]) -> None:
    """ValueError unless the field of a dataclass has one of the allowed values."""
    if getattr(value, field) not in allowed:
        raise ValueError(f"{type(value).__name__}.{field}: {closest(str(getattr(value, field)), allowed)}")


def check(kind: str, given: str, allowed: Iterable[str]) -> None:
    """ValueError unless `given` is one of the allowed."""
    if given not in allowed:
        raise ValueError(f"unknown {kind} {given!r}; {closest(str(given), list(allowed))}")
