"""Loading a trained model for use, and exporting it.

WORKDIR/checkpoints/STEP        see m4.numbered
WORKDIR/config.json             all that is needed to build the model again
WORKDIR/tokenizers/*.safetensors

An exported model, and each model of the package (m4/models/), is a folder with the same config.json and tokenizers/,
the parameters in one model.safetensors, and digests.json. What is read is checked first: by digests, and the tokenizers
against the config and against those that the model was trained with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from m4.components import closest, config_in, load_tokenizer, packaged, save_tokenizer, to_json, tokenizer_hash
from m4.files import (
    DIGESTS,
    check_digests,
    digest,
    read_json,
    remove_leftovers,
    replacing_together,
    say,
    shown,
    write_atomically,
    write_json,
)
from m4.modality import Features, Modalities, Modality, Tokenizer
from m4.model import Model
from m4.model_file import STACKS, TensorFile, abstract, load_model, model_in, parameters, save_model
from m4.numbered import Checkpoints, check_step, explain, read_step, steps_in
from m4.tensor_file import is_finite

__all__ = ["Checkpoints"]  # of m4.numbered


def tokenizer_file(folder: Path, modality: Modality) -> Path:
    """Where a run keeps a tokenizer: by signal, and by name for Features (the signal's tokens have the other file)."""
    stem = modality.name if isinstance(modality, Features) else modality.signal
    return folder / "tokenizers" / f"{stem}.safetensors"


def keep_tokenizers(folder: Path, modalities: Modalities, files: Mapping[str, Path]) -> None:
    """Copies the tokenizers of a run's data folder (by modality) into its own folder. What is there already and
    computes something else, or is damaged, is replaced, with a line that says so."""
    for m in modalities:
        own, data = tokenizer_file(folder, m), files[m.name].read_bytes()
        if own.exists() and own.read_bytes() != data:
            try:
                is_same = tokenizer_hash(load_tokenizer(own)) == tokenizer_hash(load_tokenizer(files[m.name]))
                why = "" if is_same else f"{shown(own)} holds another tokenizer of {m.name} than this run's"
            except ValueError as error:
                why = str(error)
            if why:
                say(f"{why}; it is replaced by {shown(files[m.name])}")
        write_atomically(own, data)


def replace_tokenizer(tokenizer: Tokenizer, file: Path) -> None:
    """Writes a tokenizer over its file. Where that is part of an exported model, the model's digests then have it."""
    folder, name = file.parent.parent, f"{file.parent.name}/{file.name}"
    listed = read_json(folder / DIGESTS)["files"] if (folder / DIGESTS).exists() else {}
    if name in listed:
        check_digests(folder, [name])
    save_tokenizer(tokenizer, file)
    if name in listed:
        write_json(folder / DIGESTS, {"files": {**listed, name: {"size": file.stat().st_size, "sha256": digest(file)}}})


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What generation and evaluation need of a run."""

    model: Model
    tokenizers: dict[str, Tokenizer]
    config: Any
    step: int


def load_run(path: str | Path) -> TrainedModel:
    """A trained model with its config and tokenizers, by any of

    WORKDIR, WORKDIR/checkpoints/STEP   a run's last checkpoint, or another (of a run that averages, the average)
    FOLDER                              what `export` wrote
    NAME                                a model of the package, unless a run lies in a folder of this name
    """
    workdir, wanted = Path(path), None
    if workdir.name.isdecimal() and workdir.parent.name == "checkpoints":
        workdir, wanted = workdir.parent.parent, int(workdir.name)
    if not (workdir / "config.json").exists():
        if str(path) not in packaged():
            known = [*sorted(str(p.parent) for p in workdir.parent.glob("*/config.json")), *packaged()]
            raise ValueError(
                f"{workdir} is not a run (no config.json), nor a packaged model; {closest(str(path), known)}"
            )
        workdir = packaged()[str(path)]
    is_checked = (workdir / "model.safetensors").exists() and check_digests(workdir, ["config.json"])
    config = config_in(workdir)
    modalities = Modalities([r.modality for r in config.tokenizers])
    files = {m.name: tokenizer_file(workdir, m) for m in modalities}
    model_file, hashes = workdir / "model.safetensors", {}
    if model_file.exists():
        if is_checked:
            check_digests(workdir, [p.relative_to(workdir).as_posix() for p in (model_file, *files.values())])
        file = TensorFile.read(model_file, is_checked=is_checked)
        model, step = model_in(file), _step_of(file)
    else:
        model, step, hashes = _restore(workdir, config, modalities, wanted)
    tokenizers = {m.name: load_tokenizer(files[m.name], is_checked=is_checked) for m in modalities}
    for m in modalities:
        _check_own(files[m.name], tokenizers[m.name], m, hashes)
    return TrainedModel(model, tokenizers, config, step)


def _step_of(file: TensorFile) -> int:
    if not (step := file.metadata["step"] if "step" in file.metadata else "").isdecimal():
        raise ValueError(f"{shown(file.path)} does not say the step of its model: it was not written by `export`")
    return int(step)


def _check_own(file: Path, tokenizer: Tokenizer, modality: Modality, hashes: Mapping[str, str]) -> None:
    """ValueError unless a tokenizer is that of a modality, and the one of the training (`hashes`, if known)."""

    def identity(m: Modality) -> list[Any]:
        # Without fields that are younger than some configs.
        return [type(m).__name__, m.name, m.signal, m.vocab_size, m.max_tokens]

    if identity(tokenizer.modality) != identity(modality):
        raise ValueError(
            f"{shown(file)} holds the tokenizer of another modality: {tokenizer.modality}; its place is for {modality}"
        )
    name = modality.name
    if name in hashes and (found := tokenizer_hash(tokenizer)) != hashes[name]:
        raise ValueError(
            f"{shown(file)} holds another tokenizer of {name} ({found}) than the model was trained with "
            f"({hashes[name]}); put back the one of the training's data folder"
        )


def _restore(
    workdir: Path, config: Any, modalities: Modalities, wanted: int | None
) -> tuple[Model, int, dict[str, str]]:
    """The model of a run's checkpoint (default: the last), its step, and the hashes of its tokenizers if known."""
    folder = workdir / "checkpoints"
    if not (steps := steps_in(folder)):
        raise ValueError(f"{workdir} has no checkpoint yet; train first: python train.py ... --workdir {workdir}")
    step = wanted or steps[-1]
    if step not in steps:
        raise ValueError(f"{workdir} has no checkpoint of step {step}; it has: {', '.join(map(str, steps))}")
    item = "average" if config.average_decay else "params"
    try:
        check_step(folder / str(step), (item, "data"))
    except ValueError as error:
        raise explain(folder, step, error, (item, "data")) from error
    graph, params = nnx.split(abstract(config.model, modalities), nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params)
    args = {item: ocp.args.StandardRestore(like), "data": ocp.args.JsonRestore()}
    restored = read_step(folder, step, args)
    for path, variable in nnx.to_flat_state(restored[item]):
        if not is_finite(np.asarray(variable[...])):
            name = ".".join(map(str, path))
            raise ValueError(f"{shown(folder / str(step))}: not all numbers of {name} are finite; take an older step")
    data = restored["data"]
    return nnx.merge(graph, restored[item]), step, data["tokenizers"] if "tokenizers" in data else {}


def export(path: str | Path, out: str | Path, *, dtype: str = "BF16") -> None:
    """Writes a trained model (see `load_run`) into a folder that `load_run` reads, with its scores if there are any.

    The parameters are rounded to `dtype`, a name of m4.model_file.DTYPES; what is computed with them is not. A model
    that is in the folder is replaced as a whole.
    """
    run, scores = load_run(path), Path(path) / "metrics.json"
    with replacing_run(run, out, dtype=dtype) as folder:
        if scores.exists():
            (folder / "metrics.json").write_bytes(scores.read_bytes())


def write_run(run: TrainedModel, out: str | Path, *, dtype: str = "BF16") -> None:
    """A folder that `load_run` reads; see `export`."""
    with replacing_run(run, out, dtype=dtype):
        pass


@contextlib.contextmanager
def replacing_run(run: TrainedModel, out: str | Path, *, dtype: str) -> Iterator[Path]:
    """A temporary folder with a model (see `export`), whose files replace those of `out` together, with what else is
    written there."""
    out, given = Path(out), type(run.config)
    config = dataclasses.replace(run.config, workdir="", data_dir=given.data_dir, init_from="", teacher="")
    remove_leftovers(out)
    with replacing_together(out) as folder:
        for m in run.model.modalities:
            save_tokenizer(run.tokenizers[m.name], tokenizer_file(folder, m))
        save_model(run.model, folder / "model.safetensors", dtype=dtype, metadata={"step": str(run.step)})
        write_json(folder / "config.json", to_json(config))
        yield folder
        (out / "metrics.json").unlink(missing_ok=True)  # scores of the model before


def check_tokenizers(source: str | Path, own: Mapping[str, Tokenizer]) -> None:
    """ValueError unless the tokenizers that a trained model has in common with a run compute the same. `source`: see
    `load_run`; of a model file none are known."""
    theirs = {} if Path(source).is_file() else load_run(source).tokenizers
    for name in [name for name in theirs if name in own]:
        if tokenizer_hash(theirs[name]) != tokenizer_hash(own[name]):
            raise ValueError(
                f"{source} has another tokenizer of {name} than this run, for which its weights mean nothing; its own "
                f"are m4_tokenizers.stored.tokenizers_of('{source}'), and a modality of another name is new"
            )


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
