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
from m4.model.parameters import parameters
from m4.model.stack import STACKS


@dataclasses.dataclass
class LoadedWeights:
    """What `load_weights` did, as names of parameters; rows of tables as TABLE[MODALITY]."""

    loaded: list[str]
    new: list[str]  # of this model alone: left as they were initialised
    missing: list[str]  # of the other model alone: not used
    mismatched: list[str]  # in both, with different shapes: left as they were initialised

    def __str__(self) -> str:
        parts = []
        for kind in ("loaded", "new", "missing", "mismatched"):
            names = getattr(self, kind)
            shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
            parts.append(f"  {kind:<11}{len(names):>5}" + (f"  {shown}" if names and kind != "loaded" else ""))
        return "\n".join(parts)


def load_weights(params: Any, model: Model, source: str | Path) -> tuple[Any, LoadedWeights]:
    """Parameters with all that fits of a trained model (see `load_run`) or a model file; each stays where it is.

    Tables are matched by modality, so that a model with further modalities keeps the old ones' rows bit for bit. The
    new rows stay as they were drawn, but with the spread of the old ones, for the model to tell them apart.
    ValueError if nothing fits.
    """
    source = Path(source)
    other = load_model(source) if source.is_file() else load_run(source).model
    theirs = {name: np.asarray(x) for name, x in parameters(nnx.state(other, nnx.Param)).items()}
    report = LoadedWeights([], [], [], [])
    names, rows, old_rows = model.modalities.names, model.table_rows, other.table_rows
    flat, used = [], set()
    routed = all(m.config.lora is not None and m.config.lora.routed for m in (model, other))
    shared = [(names.index(m), j) for j, m in enumerate(other.modalities.names) if m in names]

    def put(x, value, first, name):
        if value.shape != (x.shape if first is None else (first[1] - first[0], *x.shape[1:])):
            report.mismatched.append(f"{name} {list(value.shape)} instead of {list(x.shape)}")
            return x
        report.loaded.append(name)
        return _set(x, value.astype(x.dtype), first)

    for path, variable in nnx.to_flat_state(params):
        name, x = ".".join(map(str, path)), variable[...]
        if path[0] in STACKS:
            for i in range(x.shape[0]):
                block = ".".join(map(str, (path[0], i, *path[1:])))
                if block in theirs:
                    used.add(block)
                    value = theirs[block]
                    if routed and path[-2] == "lora" and value.shape[1:] == x.shape[2:]:  # a pair for each modality
                        value = np.array(jax.device_get(x[i]))
                        for r, j in shared:
                            value[r] = theirs[block][j]
                    x = put(x, value[None], (i, i + 1), block)
                else:
                    report.new.append(block)
        elif name in rows:
            known, fresh = [], []
            for i, modality in enumerate(names):
                place = rows[name][i], rows[name][i + 1]
                if place[0] == place[1]:
                    continue
                title = f"{name}[{modality}]"
                j = other.modalities.names.index(modality) if modality in other.modalities.names else None
                old = (0, 0) if j is None or name not in old_rows else (old_rows[name][j], old_rows[name][j + 1])
                if old[0] == old[1]:
                    report.new.append(title)
                    fresh.append(place)
                    continue
                used.add(title)
                mine = theirs[name][old[0] : old[1]]
                x = put(x, mine, place, title)
                if mine.shape[1] == x.shape[1]:
                    known.append(mine)
            known = np.concatenate(known) if known else np.zeros((0, 1))
            for place in fresh if len(known) > 1 else ():
                x = _at_scale(x, place, float(known.std(axis=0).mean()))
        elif name in theirs:
            used.add(name)
            x = put(x, theirs[name], None, name)
        else:
            report.new.append(name)
        flat.append((path, variable.replace(x)))
    for name in theirs:
        if name not in old_rows:
            report.missing += [name] * (name not in used)
            continue
        for i, modality in enumerate(other.modalities.names):
            if old_rows[name][i] < old_rows[name][i + 1] and f"{name}[{modality}]" not in used:
                report.missing.append(f"{name}[{modality}]")
    if not report.loaded:
        raise ValueError(f"nothing of {source} fits this model:\n{report}")
    return nnx.from_flat_state(flat), report


def _at_scale(x: jax.Array, rows: tuple[int, int], spread: float) -> jax.Array:
    """x with some rows scaled to a root mean square of `spread`."""

    def scale(x):
        part = x[rows[0] : rows[1]]
        part = part * (spread / jnp.sqrt(jnp.mean(part**2)))
        return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), rows[0], axis=0)

    return jax.jit(scale, out_shardings=x.sharding)(x)


def _set(x: jax.Array, value: np.ndarray, rows: tuple[int, int] | None) -> jax.Array:
    """x with a value from the host in its place, or in place of some rows; cut over devices as x is."""
    if rows is None:
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=rows[0], axis=0)
    return jax.jit(write, out_shardings=x.sharding)(x, value)
