"""Prediction of each example's words from its image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from m4.tokens.batch import NUM_SHOTS, MaskedBatch, Targets
from m4.tokens.modality import Modalities, Sequence
from m4.tokens.spans import is_sentinel


def captioned(batch: MaskedBatch, modalities: Modalities, name: str) -> Bool[Array, "B S"]:
    """Addresses of which all of a text is asked, by images alone and without examples: it is a caption."""
    m, index = modalities.named(name), modalities.index(name)
    assert isinstance(m, Sequence), "ModelConfig.match_words names a text"
    of = lambda t, where: (where[..., None] * jax.nn.one_hot(t.shot, NUM_SHOTS)).any(1)  # noqa: E731
    t, x = batch.targets, batch.inputs
    asked = t.valid & (t.modality == index)
    ends, begins = of(t, asked & (t.ids == m.end_id)), of(t, asked & (t.position == 0))
    is_text = jnp.asarray([isinstance(m, Sequence) for m in modalities])[x.modality]
    told = of(x, x.valid & is_text & ~is_sentinel(x, modalities))
    has_examples = (x.valid & (x.shot > 0)).any(1, keepdims=True)
    return begins & ends & ~told & ~has_examples & of(x, x.valid & ~is_text)


def words_loss(words: Float[Array, "B S V"], targets: Targets, index: int, there: Bool[Array, "B S"]) -> Array:
    """The squared error of how often each word of modality `index` is said, summed over words and the addresses that
    are `there`."""
    said = jnp.zeros_like(words).at[jnp.arange(len(words))[:, None], targets.shot, targets.ids]
    said = said.add(targets.valid & (targets.modality == index), mode="drop")
    return (((words - said) ** 2).sum(-1) * there).sum()
