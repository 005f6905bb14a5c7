"""Which in-context examples are like the query: an attention prior that finds whose label to copy.

    image of example 1 --pooled--> g1 --.
    image of example 2 --pooled--> g2 --+-- cosines --> added to the logits with which a target of the query attends
    image of the query --pooled--> g0 --'               to the tokens of labelled examples, each head as it likes

A matching network (Vinyals et al. 2016) inside the decoder's cross-attention: copying from the context is learned
within a hundred steps, whom to copy from is not, unless similarity is there to begin with. Vectors are relative to the
mean of the prompt's examples, since it is their differences that tell them apart; with one labelled example there is
nothing to choose, and no match. Made for examples of one image and answers in text: further images of an example are
items of their own, and are compared as if they were examples. The first `ModelConfig.max_items` of a prompt are
compared; examples beyond (the oldest) are read without a bias.

What matters in one prompt does not in the next: examples that count cylinders are alike where they show as many. So
examples are compared by `Words` too. Of each image it is estimated how often each word of a caption would be said of
it, which captions teach (a bottleneck of concepts, Koh et al. 2020); of these words those matter in which examples with
equal answers are alike and others are not (the alignment of a kernel with labels, Cristianini et al. 2001). No word has
parameters of its own there, so that a word counts in a prompt that never did in training. That takes B S S V values:
it is made for vocabularies of some thousand words.

B batch, C context slots, M target slots, S items, D width, R values of a vector, N heads, V words
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m4.errors import closest
from m4.model.block_inputs import AttentionBias
from m4.model.config import ModelConfig
from m4.model.extensions import Extension
from m4.tokens.batch import Array as TokenArray
from m4.tokens.batch import Targets, Tokens
from m4.tokens.modality import Modalities, Sequence
from m4.tokens.spans import is_sentinel

MODALITY = 1 << 20  # above any id of a token


class ExampleMatches(NamedTuple):
    """Vectors of examples by item and of the context's tokens (zero unless labelled), whose products say how alike
    they are, and weights. `words`: how often each would be said of an item (None: not compared so)."""

    examples: Float[Array, "B S R"]
    keys: Float[Array, "B C R"]
    weight: Float[Array, "N R"]
    words: Float[Array, "B S V"] | None


class Words(nnx.Module):
    """How often each word would be said of an item, and which examples are alike where it matters."""

    def __init__(self, width: int, num_words: int, num_heads: int, *, rngs: nnx.Rngs):
        self.hidden_kernel = nnx.Param(jax.random.normal(rngs.params(), (width, width)) * width**-0.5)
        self.hidden_bias = nnx.Param(jnp.zeros(width))
        self.out_kernel = nnx.Param(jnp.zeros((width, num_words)))
        self.out_bias = nnx.Param(jnp.zeros(num_words))
        self.log_sharpness, self.threshold = nnx.Param(jnp.zeros(())), nnx.Param(jnp.full((), 0.25))
        self.choice = nnx.Param(jnp.full((), 16.0))
        self.weight = nnx.Param(jnp.full((num_heads,), 16.0))

    def __call__(self, x: Float[Array, "B C D"], images: Float[Array, "B C S"]) -> Float[Array, "B S V"]:
        """images: 1 where a token is one of an item's image. A mean over tokens: a part of them will do."""
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        x = jax.nn.gelu(x @ self.hidden_kernel[...] + self.hidden_bias[...][None, None])
        share = images / jnp.maximum(images.sum(1, keepdims=True), 1)
        return 4 * jnp.einsum("bcs,bcd->bsd", share, x) @ self.out_kernel[...] + self.out_bias[...][None, None]

    def alike(
        self, words: Float[Array, "B S V"], labelled: Bool[Array, "B S"], same: Bool[Array, "B S S"]
    ) -> Float[Array, "B S S"]:
        """In [0, 1], by the words that tell labelled examples with the `same` text from others. Words are not trained
        by what they are good for here: they would lose their meaning."""
        words = jax.lax.stop_gradient(words)
        kernels = jnp.exp(-jnp.exp(self.log_sharpness[...]) * (words[:, :, None] - words[:, None]) ** 2)
        pairs = jnp.triu(labelled[:, :, None] & labelled[:, None], 1) * (same - self.threshold[...])
        alignment = jnp.einsum("bij,bijv->bv", pairs, kernels)
        return jnp.einsum("bijv,bv->bij", kernels, jax.nn.softmax(self.choice[...] * alignment))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimilarityPrior(Extension):
    """In-context examples are compared with the query, for the decoder to copy from those that are like it."""

    size: int = 32
    """Values in the vectors by which examples are compared, at least 1."""
    words: str = ""
    """Text modality by whose words examples are compared too, such as "caption", where the objective WordPrediction
    teaches them; "" is none."""

    parameters = ("matching.*",)

    def sizes(self) -> dict[str, int]:
        return {"similarity_prior.size": self.size}

    def check(self, config: Any, modalities: Modalities | None) -> None:
        if self.words and modalities is not None:
            texts = [m.name for m in modalities if isinstance(m, Sequence)]
            if self.words not in texts:
                raise ValueError(f"{self}: unknown text modality {self.words!r}; {closest(self.words, texts)}")

    def add(self, model: Any, rngs: nnx.Rngs) -> None:
        num_words = model.modalities.named(self.words).vocab_size if self.words else 0
        model.matching = ExampleSimilarity(model.config, self.size, num_words, rngs=rngs)

    def observe(self, model: Any, x: Float[Array, "B N D"], inputs: Tokens) -> ExampleMatches:
        return model.matching(x, inputs, model.modalities)

    def bias(self, observed: ExampleMatches, targets: Targets) -> AttentionBias:
        return AttentionBias(of_items(observed.examples, targets.item), observed.keys, observed.weight)


class ExampleSimilarity(nnx.Module):
    """Examples -> ExampleMatches, from what the encoder's first blocks made of each. num_words: of the text modality
    by whose words examples are compared (0: of none)."""

    def __init__(self, config: ModelConfig, size: int, num_words: int = 0, *, rngs: nnx.Rngs):
        self.num_items, width, num_heads = config.max_items, config.width, config.num_heads
        self.score = nnx.Param(jnp.zeros((width, 1)))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (width, size)) * width**-0.5)
        self.weight = nnx.Param(jnp.full((num_heads,), 4.0))
        self.words = Words(width, num_words, num_heads, rngs=rngs) if num_words else None

    def __call__(self, x: Float[Array, "B C D"], inputs: Tokens, modalities: Modalities) -> ExampleMatches:
        """x: of the inputs alone, without registers. An example is the mean of its image's tokens, by learned weights;
        one without image, and one whose text is predicted, is like no other. The query, item 0, is never matched."""
        is_text = jnp.asarray([isinstance(m, Sequence) for m in modalities])[inputs.modality]
        by_item = jax.nn.one_hot(inputs.item, self.num_items) * inputs.valid[..., None]
        images = by_item * ~is_text[..., None]
        weights = images * jnp.exp(jnp.clip(x @ self.score[...], -20, 20))
        pooled = jnp.einsum("bcs,bcd->bsd", weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-9), x)
        has_image = images.any(1)[..., None]
        mean = (pooled * has_image).sum(1, keepdims=True) / jnp.maximum(has_image.sum(1, keepdims=True), 1)
        vectors = jnp.where(has_image, pooled - mean, 0) @ self.kernel[...]
        vectors = vectors / jnp.sqrt((vectors**2).sum(-1, keepdims=True) + 1e-6)
        is_open = is_text & is_sentinel(inputs, modalities)
        labelled = (by_item * is_text[..., None]).any(1) & ~(by_item * is_open[..., None]).any(1)
        labelled &= (jnp.arange(self.num_items) > 0)[None]
        labelled &= labelled.sum(1, keepdims=True) > 1
        keys = of_items(vectors * labelled[..., None], inputs.item) * inputs.valid[..., None]
        weight = jnp.broadcast_to(self.weight[...][:, None], (len(self.weight[...]), keys.shape[-1]))
        if self.words is None:
            return ExampleMatches(vectors, keys, weight, None)
        words = self.words(x, images)
        alike = (
            self.words.alike(words, labelled & has_image[..., 0], same_text(inputs, is_text, self.num_items))
            * has_image
        )
        # Keys by item, of texts alone: the product is that of `alike`.
        named = by_item * is_text[..., None] * (labelled[:, None] & has_image.swapaxes(1, 2))
        more = jnp.broadcast_to(self.words.weight[...][:, None], (len(weight), self.num_items))
        return ExampleMatches(
            jnp.concatenate([vectors, alike], -1),
            jnp.concatenate([keys, named], -1),
            jnp.concatenate([weight, more], -1),
            words,
        )


def same_text(inputs: Tokens, is_text: Bool[Array, "B C"], num_items: int) -> Bool[Array, "B S S"]:
    """Which items have equal texts; a question is a part of its text."""
    batch, slots = inputs.ids.shape
    texts = jnp.zeros((batch, num_items, slots), jnp.int32)
    values = jnp.where(is_text & inputs.valid, 1 + inputs.ids + MODALITY * inputs.modality, 0)
    texts = texts.at[jnp.arange(batch)[:, None], inputs.item, inputs.position].max(values, mode="drop")
    return (texts[:, :, None] == texts[:, None]).all(-1)


def of_items(vectors: Float[Array, "B S R"], item: Int[TokenArray, "B L"]) -> Float[Array, "B L R"]:
    """Each token's vector; zero for items that have none."""
    return jnp.take_along_axis(vectors, item[..., None], axis=1, mode="fill", fill_value=0)
