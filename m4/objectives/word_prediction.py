"""Prediction of each example's words from its image: a bottleneck of concepts (Koh et al. 2020, section 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from m4.errors import closest
from m4.model.encoder_decoder import Model, Outputs
from m4.objectives.base import Objective
from m4.tokens.batch import MaskedBatch, Targets
from m4.tokens.modality import Sequence
from m4.tokens.spans import is_sentinel

PRIOR = "SimilarityPrior"  # the extension that estimates words (m4.in_context.similarity_prior)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPrediction(Objective):
    """How often each word of a caption is said of an image, as the model's similarity prior estimates it."""

    text: str = "caption"
    """Text modality whose words are predicted, that of the similarity prior."""

    name = "words"

    def check(self, config: Any) -> None:
        texts = [m.name for m in config.modalities if isinstance(m, Sequence) and m.is_target]
        if self.text not in texts:
            raise ValueError(f"words: unknown text modality {self.text!r}; {closest(self.text, texts)}")
        compared = [e.words for e in config.model.extensions if type(e).__name__ == PRIOR]
        if compared != [self.text]:
            raise ValueError(
                f"words of {self.text!r} are to be predicted, but the model compares examples by words of {compared}; "
                f"it needs the extension {PRIOR}(words={self.text!r})"
            )

    def totals(self, batch: MaskedBatch, model: Model) -> Array:
        return jnp.maximum(captioned(batch, model, self.text).sum(), 1)

    def __call__(self, outputs: Outputs, part: MaskedBatch, totals: Any, loaded: Any):
        in_part, words = captioned(part, outputs.model, self.text), outputs.context.observed[PRIOR].words
        error = words_loss(words, part.targets, outputs.model.modalities.index(self.text), in_part)
        return error / totals, {"words/loss": error / totals}


def captioned(batch: MaskedBatch, model: Model, name: str) -> Bool[Array, "B S"]:
    """Items of which all of a text is predicted, by images alone and without examples: it is a caption."""
    modalities, num_items = model.modalities, model.config.max_items
    m, index = modalities.named(name), modalities.index(name)
    assert isinstance(m, Sequence), "words are those of a text"
    of = lambda t, where: (where[..., None] * jax.nn.one_hot(t.item, num_items)).any(1)  # noqa: E731
    t, x = batch.targets, batch.inputs
    predicted = t.valid & (t.modality == index)
    ends, begins = of(t, predicted & (t.ids == m.end_id)), of(t, predicted & (t.position == 0))
    is_text = jnp.asarray([isinstance(m, Sequence) for m in modalities])[x.modality]
    given = of(x, x.valid & is_text & ~is_sentinel(x, modalities))
    has_examples = (x.valid & (x.example > 0)).any(1, keepdims=True)
    return begins & ends & ~given & ~has_examples & of(x, x.valid & ~is_text)


def words_loss(words: Float[Array, "B S V"], targets: Targets, index: int, is_captioned: Bool[Array, "B S"]) -> Array:
    """The squared error of how often each word of modality `index` is said, summed over words and the items that
    are `is_captioned`."""
    said = jnp.zeros_like(words).at[jnp.arange(len(words))[:, None], targets.item, targets.ids]
    said = said.add(targets.valid & (targets.modality == index), mode="drop")
    return (((words - said) ** 2).sum(-1) * is_captioned).sum()
