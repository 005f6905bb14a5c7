"""A frozen teacher, whose distribution over each target's vocabulary is learned beside the data, or instead of it.

    import dataclasses

    from m4.config import load_config
    from m4.objectives.distillation import Distillation

    quickstart = load_config("configs/quickstart.py")
    smaller = dataclasses.replace(quickstart.model, width=96, hidden=256)
    taught = Distillation(teacher="runs/quickstart")
    config = dataclasses.replace(quickstart, name="student", objectives=(taught,), model=smaller)

    loss of a token = (1 - share) x cross-entropy(data) + share x cross-entropy(teacher)

Hinton et al. 2015, section 2, at temperature 1. The teacher reads the same inputs and predicts the same targets. It may
have any width and depth, but the same modalities: tokens mean nothing in another vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m4.checkpoints.hub import check_source
from m4.checkpoints.model_file import load_model
from m4.checkpoints.runs import load_run
from m4.distributed.mesh import check_sizes
from m4.model.encoder_decoder import Model, Outputs
from m4.objectives.cross_entropy import TeacherOutputs
from m4.objectives.masked_modeling import MaskedModeling
from m4.tokens.batch import MaskedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(MaskedModeling):
    """Masked modelling, in part or wholly against a teacher's predicted distributions (Hinton et al. 2015)."""

    teacher: str
    """Run folder, model file or packaged model whose predicted distributions are learned."""
    share: float = 1.0
    """Share of the teacher's loss in the whole, in (0, 1]; the rest is that of the data."""

    name = "distillation"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1; for none of it, MaskedModeling")

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.teacher,)

    def exported(self) -> MaskedModeling:
        return MaskedModeling(weighting=self.weighting, z_loss=self.z_loss)

    def check(self, config: Any) -> None:
        check_source("teacher", self.teacher)

    def load(self, config: Any, model: Model, mesh: jax.sharding.Mesh) -> Any:
        """The teacher's graph and parameters. ValueError unless it predicts what the model does, and the mesh divides
        it."""
        source = Path(self.teacher)
        teacher = load_model(source) if source.is_file() else load_run(source).model
        for known, own in itertools.zip_longest(teacher.modalities, model.modalities):
            if known != own:
                raise ValueError(
                    f"teacher {self.teacher!r} must have the same modalities in the same order, with equal "
                    f"vocabularies; it has {known}, where this model has {own}"
                )
        if teacher.output_rows != model.output_rows:
            kinds = [x.config.embeddings for x in (teacher, model)]
            raise ValueError(
                f"teacher {self.teacher!r} has embeddings={kinds[0]!r}, this model {kinds[1]!r}, and some modality is "
                "input only: their output tables have different rows; give this model the teacher's embeddings"
            )
        check_sizes(config.batch_size, config.masking.num_targets, config.micro_batches, teacher.config.width, mesh)
        return nnx.split(teacher, nnx.Param)

    def __call__(self, outputs: Outputs, part: MaskedBatch, totals: Any, loaded: Any):
        teacher = nnx.merge(*loaded)
        taught = TeacherOutputs(teacher(part), teacher.output_table, jnp.float32(self.share))
        return self._loss(outputs, part, totals, taught)
