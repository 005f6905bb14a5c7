"""The encoder-decoder: addressed tokens in, one hidden vector for each addressed target out.

B batch, N input slots, M target slots, D width, V vocabulary, L cached positions

4M (Mizrahi et al. 2023, section 2): the encoder sees all input tokens of all modalities at once; the decoder predicts
each target modality on its own, reading the encoder through cross-attention. What the decoder may see of itself is a
rule, not a stored tensor (x = visible):

                 depth 3   depth 9   caption 0   caption 1
    depth 3         x         x          .           .        grids see all their own targets
    depth 9         x         x          .           .
    caption 0       .         .          x           .        sequences see what came before
    caption 1       .         .          x           x
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m4.modality import Features, Modalities, Sequence
from m4.nn import Constrain, DecoderBlock, EncoderBlock, LayerNorm, Linear
from m4.tokens import MaskedBatch, Targets, Tokens

NUM_SHOTS = 17  # the query and up to 16 in-context examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes. `hidden` is the inner width of the MLPs (4M: 4 * width * 2 / 3).

    `embedding_scale` multiplies token embeddings where they are read (sqrt(width) in Vaswani et al. 2017, section 3.4;
    4M: 1). `position_base` is the longest wavelength of the sine-cosine positions over 2 pi (4M: 10000): for small
    grids a smaller one tells neighbours apart sooner.
    """

    width: int = 192
    num_heads: int = 3
    encoder_depth: int = 4
    decoder_depth: int = 4
    hidden: int = 512
    qk_norm: bool = False
    embedding_scale: float = 1.0
    position_base: float = 10_000.0

    def __post_init__(self):
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads} and of 4")
        if min(self.width, self.num_heads, self.encoder_depth, self.decoder_depth, self.hidden) < 1:
            raise ValueError(f"every size must be at least 1: {self}")


def sine_cosine(position: np.ndarray, width: int, base: float) -> np.ndarray:
    """[P] positions -> [P width] sines then cosines at frequencies base^-(i / (width / 2))."""
    angle = position[:, None] / base ** (np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


@functools.lru_cache(maxsize=8)
def position_table(modalities: Modalities, width: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """Fixed position embeddings of all modalities, float32 [P width], and the first row of each modality, int32."""
    tables = []
    for m in modalities:
        if isinstance(m, Sequence):
            tables.append(sine_cosine(np.arange(m.max_tokens), width, base))
        else:
            # One half of the width for each of the last two axes; a 1-D grid uses the second half alone.
            rows, columns = np.divmod(np.arange(m.max_tokens), m.shape[-1])
            tables.append(np.concatenate([sine_cosine(x, width // 2, base) for x in (columns, rows)], axis=1))
    first = np.cumsum([0, *(len(t) for t in tables)])[:-1]
    return np.concatenate(tables).astype(np.float32), first.astype(np.int32)


class Model(nnx.Module):
    """`constrain` is applied to activations between blocks; the model knows nothing of meshes."""

    def __init__(
        self, config: ModelConfig, modalities: Modalities, *, rngs: nnx.Rngs, constrain: Constrain = lambda x: x
    ):
        c = config
        self.config, self.modalities, self.constrain = config, modalities, constrain
        normal = functools.partial(nnx.initializers.normal(0.02), dtype=jnp.float32)
        self.token_embedding = nnx.Param(normal(rngs.params(), (modalities.vocab_size, c.width)))
        self.modality_embedding = nnx.Param(normal(rngs.params(), (len(modalities), c.width)))
        self.shot_embedding = nnx.Param(normal(rngs.params(), (NUM_SHOTS, c.width)))
        self.mask_token = nnx.Param(normal(rngs.params(), (c.width,)))
        self.feature_projections = nnx.Dict(
            {m.name: Linear(m.size, c.width, rngs=rngs) for m in modalities if isinstance(m, Features)}
        )
        sizes = {"num_heads": c.num_heads, "hidden": c.hidden, "qk_norm": c.qk_norm, "rngs": rngs}
        self.encoder = nnx.List([EncoderBlock(c.width, **sizes) for _ in range(c.encoder_depth)])
        self.encoder_norm = LayerNorm(c.width)
        self.context_projection = Linear(c.width, c.width, rngs=rngs)
        self.decoder = nnx.List([DecoderBlock(c.width, **sizes) for _ in range(c.decoder_depth)])
        self.decoder_norm = LayerNorm(c.width)

    def __call__(self, batch: MaskedBatch) -> Float[Array, "B M D"]:
        context = self.encode(batch.inputs, batch.features)
        return self.decode(batch.targets, context, batch.inputs.valid)

    def address(self, modality: Array, position: Array, shot: Array) -> Float[Array, "B L D"]:
        """The part of an embedding that says where a token belongs."""
        table, first = position_table(self.modalities, self.config.width, self.config.position_base)
        where = jnp.asarray(table)[jnp.asarray(first)[modality] + position]
        return where + self.modality_embedding[...][modality] + self.shot_embedding[...][shot]

    def tokens(self, ids: Int[Array, "B L"], modality: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Rows of the one embedding table."""
        offsets = jnp.asarray(self.modalities.offsets[:-1], jnp.int32)
        rows = self.token_embedding[...][jnp.clip(offsets[modality] + ids, 0, self.modalities.vocab_size - 1)]
        return rows * self.config.embedding_scale

    def encode(self, inputs: Tokens, features: dict[str, Float[Array, "B K F"]]) -> Float[Array, "B N D"]:
        """What the decoder reads of the inputs; slots that are not valid hold numbers without meaning."""
        content = self.tokens(inputs.ids, inputs.modality)
        for name, projection in self.feature_projections.items():
            rows = jnp.take_along_axis(projection(features[name]), inputs.ids[..., None], axis=1, mode="clip")
            content = jnp.where((inputs.modality == self.modalities.index(name))[..., None], rows, content)
        address = self.address(inputs.modality, inputs.position, inputs.shot)
        x = content + address
        for block in self.encoder:
            x = block(self.constrain(x), inputs.valid[:, None, :])
        return self.context_projection(self.encoder_norm(x)) + address

    def decode(self, targets: Targets, context: Array, context_valid: Bool[Array, "B N"]) -> Float[Array, "B M D"]:
        """Hidden vectors from which `logits` are read, one for each target slot."""
        x = self.decoder_input(targets)
        visible = self.decoder_visibility(targets)
        for block in self.decoder:
            x = block(self.constrain(x), visible, context, context_valid[:, None, :])
        return self.decoder_norm(x)

    def decoder_input(self, targets: Targets) -> Float[Array, "B M D"]:
        known = self.tokens(targets.previous, targets.modality)
        content = jnp.where((targets.previous >= 0)[..., None], known, self.mask_token[...][None, None])
        return content + self.address(targets.modality, targets.position, targets.shot)

    def decoder_visibility(self, targets: Targets) -> Bool[Array, "B M M"]:
        """The rule in the drawing above."""
        ordered = jnp.asarray([isinstance(m, Sequence) for m in self.modalities])[targets.modality]
        query, key = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
        same = (query(targets.modality) == key(targets.modality)) & (query(targets.shot) == key(targets.shot))
        past = ~query(ordered) | (key(targets.position) <= query(targets.position))
        return same & past & key(targets.valid)

    def vocabulary(self, name: str) -> Float[Array, "V D"]:
        """The modality's rows of the embedding table, which are its output weights too."""
        i = self.modalities.index(name)
        return self.token_embedding[...][self.modalities.offsets[i] : self.modalities.offsets[i + 1]]

    def logits(self, hidden: Float[Array, "*B D"], name: str) -> Float[Array, "*B V"]:
        return jnp.einsum("...d,vd->...v", hidden, self.vocabulary(name))

    def start_cache(self, context: Float[Array, "B N D"], max_length: int):
        """Empty self-attention caches of `max_length` positions, and the context's keys and values, for each block."""
        shape = (context.shape[0], max_length, self.config.num_heads, self.config.width // self.config.num_heads)
        empty = jnp.zeros(shape, context.dtype)
        return [(empty, empty, *b.cross_attention.keys_values(b.context_norm(context))) for b in self.decoder]

    def decode_step(self, target: Targets, cache, index: Int[Array, ""], context_valid: Bool[Array, "B N"]):
        """One sequence position (target slots [B 1]) -> hidden [B 1 D] and the new cache."""
        x = self.decoder_input(target)
        length = cache[0][0].shape[1]
        visible = jnp.broadcast_to(jnp.arange(length) <= index, (x.shape[0], 1, length))
        new_cache = []
        for block, layer_cache in zip(self.decoder, cache, strict=True):
            x, layer_cache = block.step(x, layer_cache, index, visible, context_valid[:, None, :])
            new_cache.append(layer_cache)
        return self.decoder_norm(x), new_cache
