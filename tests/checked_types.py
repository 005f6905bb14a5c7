"""How annotations are checked while tests run.

An int is also a float, as PEP 484 has it, and NumPy's are both. What a user writes into a config is for its `check` to
refuse with a sentence: fields of dataclasses are checked here only where they are arrays.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import AbstractArray

SCALARS = FrozenDict({int: int | np.integer, float: float | int | np.floating | np.integer})
check = beartype(conf=BeartypeConf(hint_overrides=SCALARS))


def checked_types(function: Callable) -> Callable:
    if function.__name__ != "__init__" or any(map(_has_arrays, inspect.get_annotations(function).values())):
        return check(function)
    return function


def _has_arrays(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray) or any(map(_has_arrays, get_args(hint)))
