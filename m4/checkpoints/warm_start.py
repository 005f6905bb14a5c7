"""Weights of another model, by name and modality."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m4.checkpoints.model_file import load_model
from m4.checkpoints.runs import load_run
from m4.model.encoder_decoder import Model
from m4.model.parameters import is_by_modality, parameters
from m4.model.stack import is_stack


@dataclasses.dataclass
class LoadedWeights:
    """Names of the parameters that `load_weights` loaded or not; rows of tables as TABLE[MODALITY]."""

    loaded: list[str]
    new: list[str]  # of this model alone: their initial values stay
    missing: list[str]  # of the other model alone: not used
    mismatched: list[str]  # in both, with different shapes: their initial values stay

    def __str__(self) -> str:
        parts = []
        for kind in ("loaded", "new", "missing", "mismatched"):
            names = getattr(self, kind)
            shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
            parts.append(f"  {kind:<11}{len(names):>5}" + (f"  {shown}" if names and kind != "loaded" else ""))
        return "\n".join(parts)


def load_weights(params: Any, model: Model, source: str | Path) -> tuple[Any, LoadedWeights]:
    """Parameters with all fitting values of a trained model (see `load_run`) or a model file; shardings stay.

    Tables are matched by modality, so that a model with further modalities keeps the old ones' rows bit for bit. The
    new rows keep their random values, scaled to the spread of the old ones, so that the model can tell them apart.
    ValueError if nothing fits.
    """
    source = Path(source)
    other = load_model(source) if source.is_file() else load_run(source).model
    matching = _Matching(model, other)
    flat = [
        (path, variable.replace(matching.parameter(path, variable[...])))
        for path, variable in nnx.to_flat_state(params)
    ]
    report = matching.finished()
    if not report.loaded:
        raise ValueError(f"nothing of {source} fits this model:\n{report}")
    return nnx.from_flat_state(flat), report


class _Matching:
    """Replaces parameters of a model, one after the other, with the other model's values of the same name and shape."""

    def __init__(self, model: Model, other: Model):
        self.names, self.rows = model.modalities.names, model.table_rows
        self.other_names, self.other_rows = other.modalities.names, other.table_rows
        self.other_values = {name: np.asarray(x) for name, x in parameters(nnx.state(other, nnx.Param)).items()}
        self.configs = model.config, other.config
        self.report, self.used = LoadedWeights([], [], [], []), set()

    def parameter(self, path: tuple, x: jax.Array) -> jax.Array:
        name = ".".join(map(str, path))
        if is_stack(path[0]):
            for i in range(x.shape[0]):
                x = self._block(path, i, x)
            return x
        if name in self.rows:
            return self._table(name, x)
        if name not in self.other_values:
            self.report.new.append(name)
            return x
        self.used.add(name)
        return self._load(x, self.other_values[name], None, name)

    def finished(self) -> LoadedWeights:
        """The report, after all parameters were visited: what only the other model has is missing here."""
        for name in self.other_values:
            if name not in self.other_rows:
                self.report.missing += [name] * (name not in self.used)
                continue
            first, last = self.other_rows[name][:-1], self.other_rows[name][1:]
            for modality, begin, end in zip(self.other_names, first, last, strict=True):
                if begin < end and f"{name}[{modality}]" not in self.used:
                    self.report.missing.append(f"{name}[{modality}]")
        return self.report

    def _load(self, x: jax.Array, value: np.ndarray, rows: tuple[int, int] | None, name: str) -> jax.Array:
        if value.shape != (x.shape if rows is None else (rows[1] - rows[0], *x.shape[1:])):
            self.report.mismatched.append(f"{name} {list(value.shape)} instead of {list(x.shape)}")
            return x
        self.report.loaded.append(name)
        return _replace(x, value.astype(x.dtype), rows)

    def _block(self, path: tuple, i: int, x: jax.Array) -> jax.Array:
        """One block's part of stacked parameters, which model files store block by block."""
        name = ".".join(map(str, (path[0], i, *path[1:])))
        if name not in self.other_values:
            self.report.new.append(name)
            return x
        self.used.add(name)
        value = self.other_values[name]
        if all(is_by_modality(c, name) for c in self.configs) and value.shape[1:] == x.shape[2:]:
            value = np.array(jax.device_get(x[i]))
            for row, modality in enumerate(self.names):
                if modality in self.other_names:
                    value[row] = self.other_values[name][self.other_names.index(modality)]
        return self._load(x, value[None], (i, i + 1), name)

    def _table(self, name: str, x: jax.Array) -> jax.Array:
        """A table's rows, modality by modality; new ones take the spread of those that were loaded."""
        loaded, fresh = [], []
        for i, modality in enumerate(self.names):
            place = self.rows[name][i], self.rows[name][i + 1]
            if place[0] == place[1]:
                continue
            title, old = f"{name}[{modality}]", (0, 0)
            if modality in self.other_names and name in self.other_rows:
                j = self.other_names.index(modality)
                old = self.other_rows[name][j], self.other_rows[name][j + 1]
            if old[0] == old[1]:
                self.report.new.append(title)
                fresh.append(place)
                continue
            self.used.add(title)
            values = self.other_values[name][old[0] : old[1]]
            x = self._load(x, values, place, title)
            if values.shape[1] == x.shape[1]:
                loaded.append(values)
        loaded = np.concatenate(loaded) if loaded else np.zeros((0, 1))
        for place in fresh if len(loaded) > 1 else ():
            x = _at_scale(x, place, float(loaded.std(axis=0).mean()))
        return x


def _at_scale(x: jax.Array, rows: tuple[int, int], spread: float) -> jax.Array:
    """x with some rows scaled to a root mean square of `spread`."""

    def scale(x):
        part = x[rows[0] : rows[1]]
        part = part * (spread / jnp.sqrt(jnp.mean(part**2)))
        return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), rows[0], axis=0)

    return jax.jit(scale, out_shardings=x.sharding)(x)


def _replace(x: jax.Array, value: np.ndarray, rows: tuple[int, int] | None) -> jax.Array:
    """x, or some of its rows, replaced by a value from the host; sharded as x is."""
    if rows is None:
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=rows[0], axis=0)
    return jax.jit(write, out_shardings=x.sharding)(x, value)
