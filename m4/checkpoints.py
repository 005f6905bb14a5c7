"""Orbax checkpoints of a run, from which it resumes exactly, and loading a run's model for use.

WORKDIR/checkpoints/STEP/{params, optimizer, data}      data = position of the example stream
WORKDIR/config.json                                     all that is needed to build the model again
WORKDIR/tokenizers/*.safetensors
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from m4.components import from_json, load_tokenizer
from m4.modality import Features, Modalities, Modality, Tokenizer
from m4.model import Model


@dataclasses.dataclass
class Checkpoints:
    """Numbered checkpoints in a folder: the last `max_to_keep`, written in the background, complete or not at all."""

    folder: Path
    max_to_keep: int = 2

    def __post_init__(self):
        options = ocp.CheckpointManagerOptions(max_to_keep=self.max_to_keep, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    @property
    def latest(self) -> int:
        """The last complete step, 0 without any."""
        return self.manager.latest_step() or 0

    def save(self, step: int, params: Any, optimizer: Any, data: dict[str, Any]) -> None:
        if step == self.latest:
            return
        arrays = {"params": ocp.args.StandardSave(params), "optimizer": ocp.args.StandardSave(optimizer)}
        self.manager.save(step, args=ocp.args.Composite(**arrays, data=ocp.args.JsonSave(data)))

    def restore(self, params: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The last step's arrays, placed like the given ones (shapes are checked), and the data position."""
        like = {"params": params, "optimizer": optimizer}
        arrays = {
            k: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, v)) for k, v in like.items()
        }
        restored = self.manager.restore(self.latest, args=ocp.args.Composite(**arrays, data=ocp.args.JsonRestore()))
        return restored["params"], restored["optimizer"], restored["data"]

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()


def tokenizer_file(folder: Path, modality: Modality) -> Path:
    """Where a run keeps a tokenizer: by signal, and by name for Features (the signal's tokens have the other file)."""
    stem = modality.name if isinstance(modality, Features) else modality.signal
    return folder / "tokenizers" / f"{stem}.safetensors"


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What generation and evaluation need of a run."""

    model: Model
    tokenizers: dict[str, Tokenizer]
    config: Any
    step: int


def load_run(workdir: Path) -> TrainedModel:
    """The last checkpoint of a run's folder, with its config and tokenizers."""
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        runs = sorted(str(p.parent) for p in workdir.parent.glob("*/config.json")) if workdir.parent.exists() else []
        raise ValueError(f"{workdir} is not a run (no config.json); runs beside it: {', '.join(runs) or '(none)'}")
    config = from_json(json.loads((workdir / "config.json").read_text()))
    modalities = Modalities([r.modality for r in config.tokenizers])
    folder = workdir / "checkpoints"
    if not folder.exists() or not (manager := ocp.CheckpointManager(folder.absolute())).latest_step():
        raise ValueError(f"{workdir} has no checkpoint yet; train first: python train.py ... --workdir {workdir}")
    model = nnx.eval_shape(lambda: Model(config.model, modalities, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model, nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params)
    step = manager.latest_step()
    restored = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(like)))
    manager.close()
    tokenizers = {m.name: load_tokenizer(tokenizer_file(workdir, m)) for m in modalities}
    return TrainedModel(nnx.merge(graph, restored["params"]), tokenizers, config, step)
