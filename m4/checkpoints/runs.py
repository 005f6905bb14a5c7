"""Loading a trained model for use, and exporting it.

WORKDIR/checkpoints/STEP        see m4.checkpoints.numbered
WORKDIR/config.json             the config, from which the model is built again
WORKDIR/tokenizers/*.safetensors

An exported model, and each model of the package (m4/pretrained/), is a folder with the same config.json and
tokenizers/, the parameters in one model.safetensors, and digests.json. Files are checked
before they are read: by digests, and tokenizers against the config and those that the model was trained with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from m4.checkpoints.hub import packaged
from m4.checkpoints.model_file import model_in, save_model
from m4.checkpoints.numbered import check_step, explain, read_step, steps_in
from m4.errors import closest
from m4.files import (
    DIGESTS,
    check_digests,
    digest,
    read_json,
    remove_leftovers,
    replacing_together,
    shown,
    write_atomically,
    write_json,
)
from m4.model.encoder_decoder import Model
from m4.model.parameters import abstract
from m4.registry import config_in, to_json
from m4.tensor_file import TensorFile, is_finite
from m4.tokens.modality import Features, Modalities, Modality
from m4.tokens.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, tokenizer_hash

logger = logging.getLogger(__name__)


def tokenizer_file(folder: Path, modality: Modality) -> Path:
    """The file of a run's tokenizer: by signal, and by name for Features (the signal's tokens have the other file)."""
    stem = modality.signal
    if isinstance(modality, Features):  # 4M's rgb@448 are the pixels of a signal of the same name
        stem = f"{modality.name}_pixels" if modality.name == modality.signal and "@" in modality.name else modality.name
    return folder / "tokenizers" / f"{stem}.safetensors"


def keep_tokenizers(folder: Path, modalities: Modalities, files: Mapping[str, Path]) -> None:
    """Copies the tokenizers of a run's data folder (by modality) into its own folder. A file that exists but
    computes something else, or is damaged, is replaced, with a line in the log."""
    for m in modalities:
        own, data = tokenizer_file(folder, m), files[m.name].read_bytes()
        if own.exists() and own.read_bytes() != data:
            try:
                is_same = tokenizer_hash(load_tokenizer(own)) == tokenizer_hash(load_tokenizer(files[m.name]))
                why = "" if is_same else f"{shown(own)} holds another tokenizer of {m.name} than this run's"
            except ValueError as error:
                why = str(error)
            if why:
                logger.info(shown(f"{why}; it is replaced by {shown(files[m.name])}"))
        write_atomically(own, data)


def replace_tokenizer(tokenizer: Tokenizer, file: Path) -> None:
    """Writes a tokenizer over its file, and updates the digests of the exported model, if it is part of one."""
    folder, name = file.parent.parent, f"{file.parent.name}/{file.name}"
    listed = read_json(folder / DIGESTS)["files"] if (folder / DIGESTS).exists() else {}
    if name in listed:
        check_digests(folder, [name])
    save_tokenizer(tokenizer, file)
    if name in listed:
        write_json(folder / DIGESTS, {"files": {**listed, name: {"size": file.stat().st_size, "sha256": digest(file)}}})


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model as generation and evaluation need it."""

    model: Model
    tokenizers: dict[str, Tokenizer]
    config: Any
    step: int


def load_run(path: str | Path) -> TrainedModel:
    """A trained model with its config and tokenizers, by any of

    WORKDIR, WORKDIR/checkpoints/STEP   a run's last checkpoint, or another (its average, if the run has one)
    FOLDER                              an exported model
    NAME                                a model of the package, unless a run is in a folder of this name
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
        # Without fields that older configs lack.
        return [type(m).__name__, m.name, m.signal, m.vocab_size, m.max_tokens]

    if identity(tokenizer.modality) != identity(modality):
        raise ValueError(
            f"{shown(file)} holds the tokenizer of another modality: {tokenizer.modality}; its place is for {modality}"
        )
    name = modality.name
    if name in hashes and (own_hash := tokenizer_hash(tokenizer)) != hashes[name]:
        raise ValueError(
            f"{shown(file)} holds another tokenizer of {name} ({own_hash}) than the model was trained with "
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

    The parameters are rounded to `dtype`, a name of m4.tensor_file.DTYPES; computations with them are not. A model in
    the folder is replaced as a whole.
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
    """A temporary folder with a model (see `export`), whose files replace those of `out` together, with all
    other files that the caller writes into it."""
    out, defaults = Path(out), type(run.config)
    config = dataclasses.replace(run.config, workdir="", data_dir=defaults.data_dir, init_from="")
    config = dataclasses.replace(config, objectives=tuple(objective.exported() for objective in config.objectives))
    remove_leftovers(out)
    with replacing_together(out) as folder:
        for m in run.model.modalities:
            save_tokenizer(run.tokenizers[m.name], tokenizer_file(folder, m))
        save_model(run.model, folder / "model.safetensors", dtype=dtype, metadata={"step": str(run.step)})
        write_json(folder / "config.json", to_json(config))
        yield folder
        (out / "metrics.json").unlink(missing_ok=True)  # scores of the previous model


def check_tokenizers(source: str | Path, own: Mapping[str, Tokenizer]) -> None:
    """ValueError unless the tokenizers that a trained model has in common with a run compute the same. `source`: see
    `load_run`; a model file has none."""
    others = {} if Path(source).is_file() else load_run(source).tokenizers
    for name in [name for name in others if name in own]:
        if tokenizer_hash(others[name]) != tokenizer_hash(own[name]):
            raise ValueError(
                f"{source} has another tokenizer of {name} than this run, for which its weights mean nothing; its own "
                f"are m4_tokenizers.modalities.stored.tokenizers_of('{source}'), and a modality of another name is new"
            )
