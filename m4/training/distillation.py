"""A frozen teacher, whose distribution over each target's vocabulary is learned beside the data, or instead of it.

    import dataclasses

    from m4.config import load_config

    quickstart = load_config("configs/quickstart.py")
    smaller = dataclasses.replace(quickstart.model, width=96, hidden=256)
    config = dataclasses.replace(quickstart, name="student", teacher="runs/quickstart", model=smaller)

    loss of a token = (1 - distill) x cross-entropy(data) + distill x cross-entropy(teacher)

Hinton et al. 2015, section 2, at temperature 1. The teacher reads the same inputs and predicts the same targets. It may
have any width and depth, but the same modalities: tokens mean nothing in another vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from m4.checkpoints.model_file import load_model
from m4.checkpoints.runs import load_run
from m4.distributed.mesh import check_sizes, shardings
from m4.model.encoder_decoder import Model
from m4.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model."""

    model: Model

    def abstract(self, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
        """`on` without numbers."""
        graph, params = nnx.split(self.model, nnx.Param)
        places = shardings(params, mesh)
        return graph, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, places)

    def on(self, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
        """What m4.training.trainer.Trainer.step takes: the graph, and the parameters where the rules of meshes put
        them."""
        graph, places = self.abstract(mesh)
        put = lambda x, s: jax.make_array_from_callback(x.shape, s.sharding, lambda index: np.asarray(x)[index])  # noqa: E731
        return graph, jax.tree.map(put, nnx.state(self.model, nnx.Param), places)


def load_teacher(trainer: Trainer) -> Teacher:
    """The teacher of a trainer's config: a run or a model of the package (see `load_run`), or a model file.

    ValueError unless it predicts what the trainer's model does, and the mesh divides it.
    """
    c, student, source = trainer.c, trainer.model, Path(trainer.c.teacher)
    model = load_model(source) if source.is_file() else load_run(source).model
    for theirs, own in itertools.zip_longest(model.modalities, student.modalities):
        if theirs != own:
            raise ValueError(
                f"teacher {c.teacher!r} must have the same modalities in the same order, with equal vocabularies; "
                f"it has {theirs}, where this model has {own}"
            )
    if model.output_rows != student.output_rows:
        kinds = [x.config.embeddings for x in (model, student)]
        raise ValueError(
            f"teacher {c.teacher!r} has embeddings={kinds[0]!r}, this model {kinds[1]!r}, and some modality is input "
            "only: their output tables have different rows; give this model the teacher's embeddings"
        )
    check_sizes(c.batch_size, c.masking.num_targets, c.micro_batches, model.config.width, trainer.mesh)
    return Teacher(model)
