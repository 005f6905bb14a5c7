"""A contrastive loss between the embeddings of two groups of an example's inputs, beside that of the targets.

    inputs of group a  --encoder, mean-->  p_i  --.
                                                  +-- cos(p_i, q_j) / temperature: row i finds column i, and back
    inputs of group b  --encoder, mean-->  q_j  --'

Each group is encoded by itself, as m4.representations.embed does, so that what is trained is what retrieval compares.
Its mean over the rows is taken off before cosines: what all rows share, nearly everything at the start, tells no two of
them apart. Rows are those of the whole batch, whatever the mesh; of in-context examples the query alone counts.

    dataclasses.replace(config, objectives=(MaskedModeling(), Contrast(a=("rgb_pixels",), b=("caption",))))

B rows, N input slots, D width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from m4.errors import closest
from m4.model.encoder_decoder import Model, Outputs
from m4.model.pooling import encoder_outputs
from m4.objectives.base import Objective
from m4.tokens.batch import MaskedBatch, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast(Objective):
    """InfoNCE in both directions over the rows whose inputs have tokens of both groups of modalities.

    van den Oord et al. 2018, section 2.3; symmetric as in Radford et al. 2021, section 2.3.
    """

    a: tuple[str, ...] = ("rgb_pixels",)
    """Input modalities of the first group."""
    b: tuple[str, ...] = ("audio_tokens",)
    """Input modalities of the second group, none of them in the first."""
    weight: float = 1.0
    """Factor of this loss in the whole, above 0."""
    temperature: float = 0.1
    """Divisor of the cosines, above 0."""
    weighted: bool = False
    """Count every pair by how alike its two rows are within group a (Srinivasa et al. 2023, section 2)."""

    name = "contrast"

    def __post_init__(self):
        if not self.a or not self.b or {*self.a} & {*self.b}:
            raise ValueError(f"contrast: a={self.a} and b={self.b} must name modalities, and none of them twice")
        if not (self.weight > 0 and self.temperature > 0):
            raise ValueError(f"contrast: weight={self.weight} and temperature={self.temperature} must be above 0")

    def check(self, config: Any) -> None:
        """ValueError unless all are input modalities, which some strategy reads together, in one micro-batch."""
        inputs = [m.name for m in config.modalities if m.is_input]
        for name in (*self.a, *self.b):
            if name not in inputs:
                raise ValueError(f"contrast: unknown input modality {name!r}; {closest(name, inputs)}")
        maskings = [config.masking, *(d.masking for d in config.datasets if d.masking is not None)]
        mixtures = [s for masking in maskings for s in getattr(masking, "strategies", ())]
        if not any(all({*names} & {*s.inputs} for names in (self.a, self.b)) for s in mixtures):
            raise ValueError(f"contrast: no masking strategy has inputs of both {self.a} and {self.b}")
        if config.micro_batches > 1:
            raise ValueError(
                f"contrast compares rows of the whole batch, which micro_batches={config.micro_batches} would cut; "
                "allowed: 1, perhaps with --model.remat blocks"
            )

    def __call__(self, outputs: Outputs, part: MaskedBatch, totals: Any, loaded: Any):
        """The loss times its weight; and scalars: the loss, the share of rows that find their partner first (NaN
        without any), and the number of rows that have both groups. Chance finds one row in that number."""
        p, has_p = group_embeddings(outputs.model, part, self.a)
        q, has_q = group_embeddings(outputs.model, part, self.b)
        loss, accuracy, count = info_nce(p, q, has_p & has_q, self.temperature, self.weighted)
        scalars = {"contrast/loss": loss, "contrast/accuracy": accuracy, "contrast/pairs": count}
        return self.weight * loss, scalars


def group_embeddings(
    model: Model, batch: MaskedBatch, names: Seq[str]
) -> tuple[Float[Array, "B D"], Bool[Array, " B"]]:
    """Of the query's inputs of some modalities alone, and which rows have any."""
    of_group = jnp.asarray([m.name in names for m in model.modalities])[batch.inputs.modality]
    inputs = batch.inputs._replace(valid=batch.inputs.valid & of_group & (batch.inputs.example == 0))
    # In no more slots than they can fill.
    needed = sum(m.max_tokens for m in model.modalities if m.name in names)
    first = jnp.argsort(~inputs.valid, axis=1, stable=True)[:, :needed]
    inputs = Tokens(*(jnp.take_along_axis(x, first, axis=1) for x in inputs))
    return encoder_outputs(model, inputs, batch.features)[1], jnp.asarray(inputs.valid).any(1)


def info_nce(
    p: Float[Array, "B D"],
    q: Float[Array, "B D"],
    has_both: Bool[Array, " B"],
    temperature: float = 0.1,
    weighted: bool = False,
):
    """The mean of both directions' cross-entropies over the rows that are there (0 without any), the share of rows and
    directions in which the partner is the most similar, and the number of rows.

    `weighted`: row i is to find column j with a probability in proportion to (1 + cos(p_i, p_j)) / 2, a constant.
    """
    count, own = has_both.sum(), jnp.eye(len(p))
    p, q = (x - jnp.where(has_both[:, None], x, 0).sum(0, keepdims=True) / jnp.maximum(count, 1) for x in (p, q))
    p, q = (x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-12)) for x in (p, q))
    cosines = lambda x, y: jnp.einsum("id,jd->ij", x, y, precision="highest")  # noqa: E731
    share = (1 + jax.lax.stop_gradient(cosines(p, p))) / 2 if weighted else own
    share = jnp.where(has_both[:, None] & has_both[None], share, 0)
    share = share / jnp.maximum(share.sum(-1, keepdims=True), 1e-9)
    similarity = cosines(p, q) / temperature

    def find(similarity):
        seen = jnp.where(has_both[None], similarity, jnp.finfo(jnp.float32).min)
        hits = has_both & (seen.argmax(-1) == jnp.arange(len(seen)))
        return -(share * jax.nn.log_softmax(seen)).sum() / jnp.maximum(count, 1), hits.sum()

    (forward_loss, forward_hits), (backward_loss, backward_hits) = find(similarity), find(similarity.T)
    return (forward_loss + backward_loss) / 2, (forward_hits + backward_hits) / (2 * count), count
