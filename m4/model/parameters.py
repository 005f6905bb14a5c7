"""Parameters by name, and those of a modality."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.model.stack import is_stack
from m4.tokens.modality import Modalities


def parameters(state: Any) -> dict[str, Any]:
    """The arrays (or shapes) of a model's state by dotted name, those of each block apart: encoder.0.mlp.up.kernel."""
    arrays = {}
    for (top, *rest), variable in nnx.to_flat_state(state):
        (x,), rest = jax.tree.leaves(variable), "".join(f".{key}" for key in rest)
        if not is_stack(top):
            arrays[f"{top}{rest}"] = x
            continue
        for i in range(x.shape[0]):
            one = jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x[i]
            arrays[f"{top}.{i}{rest}"] = one
    return arrays


def from_parameters(state: Any, array_of: Callable[[str], ArrayLike]) -> Any:
    """A state like `state` with the arrays of these names; blocks are stacked."""
    flat = []
    for path, variable in nnx.to_flat_state(state):
        (top, *rest), shape = path, variable.shape
        rest = "".join(f".{key}" for key in rest)
        names = [f"{top}.{i}{rest}" for i in range(shape[0])] if is_stack(top) else [f"{top}{rest}"]
        arrays = [jnp.asarray(array_of(name)) for name in names]
        flat.append((path, variable.replace(jnp.stack(arrays) if is_stack(top) else arrays[0])))
    return nnx.from_flat_state(flat)


def by_modality(model: Model) -> dict[str, Any]:
    """`parameters` of a model, with rows of tables as TABLE[MODALITY], and so all that extensions have by
    modality."""
    arrays = parameters(nnx.state(model, nnx.Param))
    for table, rows in _rows_by_modality(model, arrays).items():
        x = arrays.pop(table)
        names = enumerate(model.modalities.names)
        arrays |= {f"{table}[{m}]": x[rows[i] : rows[i + 1]] for i, m in names if rows[i] < rows[i + 1]}
    return arrays


def _rows_by_modality(model: Model, names: Iterable[str]) -> dict[str, Sequence[int]]:
    """Parameters of which each modality has some rows: where those of modality i begin, and the end."""
    own = [name for name in names if is_by_modality(model.config, name)]
    return {**model.table_rows, **dict.fromkeys(own, range(len(model.modalities) + 1))}


def is_by_modality(config: ModelConfig, name: str) -> bool:
    """Whether an extension's parameter has one part for each modality."""
    return any(matches_pattern(name, p) for e in config.extensions for p in e.parameters_by_modality)


def with_parameters(model: Model, pieces: Mapping[str, Any]) -> Model:
    """A model with these in place of its own, by the names of `by_modality`."""
    arrays = {**by_modality(model), **pieces}
    graph, state = nnx.split(model, nnx.Param)
    for table in _rows_by_modality(model, parameters(state)):
        parts = [arrays[name] for m in model.modalities.names if (name := f"{table}[{m}]") in arrays]
        arrays[table] = jnp.concatenate([jnp.asarray(x) for x in parts])
    return nnx.merge(graph, from_parameters(state, lambda name: arrays[name]))


def parameter_shapes(model_config: Any, modalities: Modalities) -> dict[str, tuple[int, ...]]:
    return {n: x.shape for n, x in parameters(nnx.state(abstract(model_config, modalities), nnx.Param)).items()}


def abstract(model_config: Any, modalities: Modalities) -> Model:
    """The model without its numbers."""
    return nnx.eval_shape(lambda: Model(model_config, modalities, rngs=nnx.Rngs(0)))


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a parameter's name fits, perhaps that of one block (encoder.0.mlp.up.kernel) without its number. Brackets
    stand for themselves."""
    whole = re.sub(r"^(\w+)\.\d+\.", r"\1.", name)
    return any(fnmatch.fnmatchcase(n, pattern.replace("[", "[[]")) for n in (name, whole))
