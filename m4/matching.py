"""Which in-context examples are like the query: an attention prior that finds whose label to copy.

    image of example 1 --pooled--> g1 --.
    image of example 2 --pooled--> g2 --+-- cosines --> added to the logits with which a target of the query attends
    image of the query --pooled--> g0 --'               to the tokens of labelled examples, each head as it likes

A matching network (Vinyals et al. 2016) inside the decoder's cross-attention: copying from the context is learned
within a hundred steps, whom to copy from is not, unless similarity is there to begin with. Vectors are relative to the
mean of the prompt's examples, since it is their differences that tell them apart; with one labelled example there is
nothing to choose, and no match. Made for examples of one image and answers in text: further images of an example have
addresses of their own, and are compared as if they were examples.

B batch, C context slots, M target slots, S addresses, D width, R numbers of a vector, N heads
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m4.modality import Modalities, Sequence
from m4.tokens import NUM_SHOTS, Tokens


class Matches(NamedTuple):
    """Unit vectors of examples by address, those of the context's tokens (zero unless labelled), and their weight."""

    examples: Float[Array, "B S R"]
    keys: Float[Array, "B C R"]
    weight: Float[Array, " N"]


class Matching(nnx.Module):
    """Examples -> Matches, from what the encoder's first blocks made of each."""

    def __init__(self, width: int, size: int, num_heads: int, *, rngs: nnx.Rngs):
        self.score = nnx.Param(jnp.zeros((width, 1)))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (width, size)) * width**-0.5)
        self.weight = nnx.Param(jnp.full((num_heads,), 4.0))

    def __call__(self, x: Float[Array, "B C D"], inputs: Tokens, modalities: Modalities) -> Matches:
        """x: of the inputs alone, without registers. An example is the mean of its image's tokens, by learned weights;
        one without image, and one whose text is asked, is like no other. The query, address 0, is never matched."""
        is_text = jnp.asarray([isinstance(m, Sequence) for m in modalities])[inputs.modality]
        of = jax.nn.one_hot(inputs.shot, NUM_SHOTS) * inputs.valid[..., None]
        images = of * ~is_text[..., None]
        weights = images * jnp.exp(jnp.clip(x @ self.score[...], -20, 20))
        pooled = jnp.einsum("bcs,bcd->bsd", weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-9), x)
        there = images.any(1)[..., None]
        mean = (pooled * there).sum(1, keepdims=True) / jnp.maximum(there.sum(1, keepdims=True), 1)
        vectors = jnp.where(there, pooled - mean, 0) @ self.kernel[...]
        vectors = vectors / jnp.sqrt((vectors**2).sum(-1, keepdims=True) + 1e-6)
        asked = is_text & is_sentinel(inputs, modalities)
        labelled = (of * is_text[..., None]).any(1) & ~(of * asked[..., None]).any(1)
        labelled &= (jnp.arange(NUM_SHOTS) > 0)[None]
        labelled &= labelled.sum(1, keepdims=True) > 1
        keys = at_address(vectors * labelled[..., None], inputs.shot)
        return Matches(vectors, keys * inputs.valid[..., None], self.weight[...])


def is_sentinel(inputs: Tokens, modalities: Modalities) -> Bool[Array, "B C"]:
    first, number = (
        jnp.asarray([getattr(m, name) if isinstance(m, Sequence) else 0 for m in modalities])[inputs.modality]
        for name in ("first_sentinel", "num_sentinels")
    )
    return (inputs.ids >= first) & (inputs.ids < first + number)


def at_address(vectors: Float[Array, "B S R"], shot: Int[Array, "B L"]) -> Float[Array, "B L R"]:
    return jnp.take_along_axis(vectors, shot[..., None], axis=1)
