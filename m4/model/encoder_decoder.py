"""The encoder-decoder: addressed tokens in, one hidden vector for each addressed target out.

B batch, N input slots, C context slots (registers, then inputs), M target slots, D width, V vocabulary,
L cached positions

4M (Mizrahi et al. 2023, section 2): the encoder sees all input tokens of all modalities at once; the decoder predicts
each target modality on its own, reading the encoder through cross-attention. What the decoder may see of itself is a
rule, not a stored tensor (x = visible):

                 depth 3   depth 9   caption 0   caption 1
    depth 3         x         x          .           .        grids see all their own targets
    depth 9         x         x          .           .
    caption 0       .         .          x           .        sequences see what came before
    caption 1       .         .          x           x

Two variants of 4M change the rule: `decoder_within_modality=False` also shows all slots of modalities that stand
before, and `decoder_causal=True` shows earlier slots only, in grids too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from m4.distributed.constraints import BATCH, lookup, shard_constraint
from m4.model.block_inputs import AttentionBias, BlockInputs, TokenInfo
from m4.model.blocks import Block, DecoderBlock, EncoderBlock
from m4.model.config import ModelConfig
from m4.model.layers import LayerNorm, Linear
from m4.model.positions import item_address, position_table
from m4.model.stack import is_stack, stack, survival
from m4.model.visibility import Visible
from m4.model.xla import param_grads_first
from m4.tokens.batch import Array as TokenArray
from m4.tokens.batch import MaskedBatch, Targets, Tokens
from m4.tokens.modality import Features, Modalities, Sequence

FeatureVectors = Mapping[str, Float[TokenArray, "B K F"]]  # by modality


class Encoded(NamedTuple):
    """What the decoder reads of the inputs. `observed`: what extensions keep of them, by the name of their class.
    `auxiliary`: values that the encoder's blocks return besides, [depth ...]."""

    tokens: Float[Array, "B C D"]
    info: TokenInfo
    observed: dict[str, Any]
    auxiliary: dict[str, Array]


class Outputs(NamedTuple):
    """What objectives read: the model, hidden vectors of all targets, what the decoder read of the inputs, and values
    that the decoder's blocks return besides, [depth ...]."""

    model: Model
    hidden: Float[Array, "B M D"]
    context: Encoded
    auxiliary: dict[str, Array]


class Decoding(NamedTuple):
    """The decoder as autoregressive decoding reads it: by block, keys and values of the context, of earlier tokens."""

    blocks: list[DecoderBlock]
    keys_values: list[tuple[Array, Array]]  # [B C N H]
    context_visible: Visible
    context: Encoded
    cache: list[tuple[Array, Array]]  # [B L N H], empty


class Model(nnx.Module):
    """On one device, or on the mesh that is set: activations are cut by example between blocks."""

    def __init__(self, config: ModelConfig, modalities: Modalities, *, rngs: nnx.Rngs):
        c = config
        self.config, self.modalities = config, modalities

        def filled(rows: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, c.width)))

        def table(rows: int) -> nnx.Param | None:
            return filled(rows) if rows else None

        # First row of each modality in each table; the last number is the table's length.
        shared, tied = c.embeddings == "shared", c.embeddings == "encoder_decoder"
        self.input_rows = modalities.offsets(lambda m: m.vocab_size * (shared or m.is_input))
        self.output_rows = modalities.offsets(lambda m: m.vocab_size * (shared or m.is_target))
        self.previous_rows = modalities.offsets(
            lambda m: m.vocab_size * (shared or m.is_target and (tied or isinstance(m, Sequence)))
        )
        self.token_embedding = table(self.input_rows[-1])
        self.decoder_embedding = None if shared else table(self.previous_rows[-1])
        self.output_embedding = table(self.output_rows[-1]) if c.embeddings == "separate" else None

        both = c.share_modality_embeddings
        self.modality_rows = modalities.offsets(lambda m: int(both or m.is_input))
        self.decoder_modality_rows = modalities.offsets(lambda m: int(both or m.is_target))
        self.modality_embedding = table(self.modality_rows[-1])
        self.decoder_modality_embedding = None if both else table(self.decoder_modality_rows[-1])
        self.position_rows = modalities.offsets(lambda m: m.max_tokens * (m.learned_positions and m.is_input))
        self.decoder_position_rows = modalities.offsets(lambda m: m.max_tokens * (m.learned_positions and m.is_target))
        self.position_embedding = table(self.position_rows[-1])
        self.decoder_position_embedding = table(self.decoder_position_rows[-1])

        self.item_embedding = filled(c.max_items)
        self.mask_token = filled(1)
        self.registers = table(c.num_prefix_tokens)
        self.feature_projections = nnx.Dict(
            {m.name: Linear(m.size, c.width, bias=m.bias, rngs=rngs) for m in modalities if isinstance(m, Features)}
        )
        self.encoder: EncoderBlock | nnx.List = stack(EncoderBlock, c, len(modalities), c.encoder_depth, rngs)
        self.encoder_norm = LayerNorm(c)
        self.context_projection = Linear(c.width, c.width, bias=True, rngs=rngs)
        self.decoder: DecoderBlock | nnx.List = stack(DecoderBlock, c, len(modalities), c.decoder_depth, rngs)
        self.decoder_norm = LayerNorm(c)
        for extension in c.extensions:
            extension.check(c, modalities)
            extension.add(self, rngs)

    def __call__(self, batch: MaskedBatch, key: PRNGKeyArray | None = None) -> Float[Array, "B M D"]:
        """Hidden vectors of all targets. A key turns stochastic depth on."""
        return self.outputs(batch, key).hidden

    def outputs(self, batch: MaskedBatch, key: PRNGKeyArray | None = None) -> Outputs:
        """The same, and what the decoder read of the inputs."""
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        context = self.encode(batch.inputs, batch.features, encoder_key)
        hidden, auxiliary = self._decode(batch.targets, context, decoder_key)
        return Outputs(self, hidden, context, auxiliary)

    def _address(self, t: Tokens | Targets, modality_table, modality_rows, position_embedding, position_rows) -> Array:
        """The part of an embedding that says where a token belongs: float32 [B L D]."""
        c = self.config
        fixed, first = position_table(self.modalities, c.width, c.position_base)
        where = jnp.asarray(fixed)[jnp.asarray(first)[t.modality] + t.position]
        if position_embedding is not None:
            learned = position_embedding[...][jnp.asarray(position_rows)[t.modality] + t.position]
            is_learned = jnp.asarray([m.learned_positions for m in self.modalities])[t.modality]
            where = jnp.where(is_learned[..., None], learned, where)
        modality = modality_table[...][jnp.asarray(modality_rows)[t.modality]]
        return where + modality + item_address(self.item_embedding[...], t.item, c.position_base)

    def input_address(self, inputs: Tokens) -> Float[Array, "B N D"]:
        return self._address(
            inputs, self.modality_embedding, self.modality_rows, self.position_embedding, self.position_rows
        )

    def target_address(self, targets: Targets) -> Float[Array, "B M D"]:
        table = self.modality_embedding if self.config.share_modality_embeddings else self.decoder_modality_embedding
        limits = [getattr(m, "num_target_positions", 0) or m.max_tokens for m in self.modalities]
        if limits != [m.max_tokens for m in self.modalities]:
            is_within = targets.position < jnp.asarray(limits)[targets.modality]
            targets = targets._replace(position=jnp.where(is_within, targets.position, 0))
        return self._address(
            targets, table, self.decoder_modality_rows, self.decoder_position_embedding, self.decoder_position_rows
        )

    def input_content(self, inputs: Tokens, features: FeatureVectors) -> Float[Array, "B N D"]:
        """What the inputs are: rows of the table of embeddings, or projected features (those that there are)."""
        content = self._tokens(self.token_embedding, self.input_rows, inputs.ids, inputs.modality)
        for name in [n for n in self.feature_projections if n in features]:
            projection = self.feature_projections[name]
            rows = projection(jnp.asarray(features[name]).astype(self.config.dtype), "float32")
            rows = jnp.take_along_axis(rows, inputs.ids[..., None], axis=1, mode="clip")
            content = jnp.where((inputs.modality == self.modalities.index(name))[..., None], rows, content)
        return content

    def _tokens(
        self, table: nnx.Param | None, rows: tuple[int, ...], ids: TokenArray, modality: TokenArray
    ) -> Float[Array, "B L D"]:
        assert table is not None, "there are no such tokens"
        index = jnp.clip(jnp.asarray(rows, jnp.int32)[modality] + ids, 0, rows[-1] - 1)
        return lookup(table[...], index) * self.config.embedding_scale

    def encoder_input(self, inputs: Tokens, features: FeatureVectors) -> Float[Array, "B C D"]:
        """Registers, then content + address; slots that are not valid hold meaningless numbers."""
        return self._after_registers(self.input_content(inputs, features) + self.input_address(inputs))

    def _after_registers(self, x: Float[Array, "B N D"]) -> Float[Array, "B C D"]:
        if self.registers is None:
            return x
        registers = jnp.broadcast_to(self.registers[...], (len(x), *self.registers.shape))
        return jnp.concatenate([registers, x], axis=1)

    def embed(self, inputs: Tokens, features: FeatureVectors) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
        """What the encoder reads of the inputs, and their addresses."""
        address = self.input_address(inputs)
        x = self.input_content(inputs, features) + address
        for extension in self.config.extensions:
            x = extension.inputs(self, x, inputs)
        return x, address

    def encode(self, inputs: Tokens, features: FeatureVectors, key: PRNGKeyArray | None = None) -> Encoded:
        """What the decoder reads of the inputs."""
        return self.encode_embedded(*self.embed(inputs, features), inputs, key)

    def encode_embedded(
        self, x: Float[Array, "B N D"], address: Float[Array, "B N D"], inputs: Tokens, key=None
    ) -> Encoded:
        """`encode` of inputs that are embedded already (see `embed`)."""
        c, info = self.config, self.context_info(inputs)
        x = self._after_registers(x)
        scales = survival(key, EncoderBlock.num_branches, c.encoder_depth, c.encoder_drop_path, len(x))
        x, first, num = self._first_blocks(x, info, scales)
        own = x[:, c.num_prefix_tokens :]
        observed = {type(extension).__name__: extension.observe(self, own, inputs) for extension in c.extensions}
        x, auxiliary = self._later_blocks(x, info, scales, num)
        auxiliary = {name: jnp.concatenate([first[name], value]) if num else value for name, value in auxiliary.items()}
        return Encoded(self.context(x, address), info, observed, auxiliary)

    def run_encoder(self, x: Float[Array, "B C D"], inputs: Tokens) -> Float[Array, "B C D"]:
        """Its output for embedded inputs (and registers), normalised."""
        info = self.context_info(inputs)
        x, _, num = self._first_blocks(x, info, None)
        return self._later_blocks(x, info, None, num)[0]

    def _first_blocks(self, x: Float[Array, "B C D"], info: TokenInfo, scales: Array | None):
        """The blocks that an extension wants to see by a rule of its own; what they return besides; their number."""
        rules = [rule for e in self.config.extensions if (rule := e.first_blocks(info)) is not None]
        if not rules:
            return x, {}, 0
        if len(rules) > 1:
            raise ValueError(f"only one extension may say what the first blocks see: {self.config.extensions}")
        ((num, visible),) = rules
        return *self.run_blocks(self.encoder, x, BlockInputs(visible, info), scales, slice(num)), num

    def _later_blocks(self, x: Float[Array, "B C D"], info: TokenInfo, scales: Array | None, num: int):
        inputs = BlockInputs(Visible.keys(info.valid), info)
        x, auxiliary = self.run_blocks(self.encoder, x, inputs, scales, slice(num, None))
        return self.encoder_norm(x), auxiliary

    def info(self, t: Tokens | Targets) -> TokenInfo:
        return TokenInfo(*(jnp.asarray(x) for x in (t.modality, t.position, t.item, t.example, t.valid)))

    def context_info(self, inputs: Tokens) -> TokenInfo:
        """Of registers, which are always valid, and inputs."""
        none = (-1, 0, 0, 0, True)
        pad = ((0, 0), (self.config.num_prefix_tokens, 0))
        return TokenInfo(
            *(jnp.pad(x, pad, constant_values=value) for x, value in zip(self.info(inputs), none, strict=True))
        )

    def run_blocks(
        self, blocks: Any, x: Float[Array, "B T D"], inputs: BlockInputs, scales: Array | None = None,
        part: slice = slice(0, None),
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:  # fmt: skip
        """x through a stack of blocks (or an nnx.List of them, unstacked), or a part of it; and what they return
        besides, [depth ...]. `scales`: see `survival`."""
        if isinstance(blocks, nnx.List):
            values = []
            for block in list(blocks)[part]:
                x, more = block(shard_constraint(x, BATCH), inputs)
                values.append(more)
            return x, jax.tree.map(lambda *own: jnp.stack(own), *values) if values else {}
        graph, params = nnx.split(blocks, nnx.Param)
        if part != slice(0, None):
            params, scales = jax.tree.map(lambda x: x[part], (params, scales))
        unrolled = self.config.unroll > 1 and jax.sharding.get_abstract_mesh().size <= 1

        def run_one(x, layer):
            params, scale = layer
            if unrolled:
                x, params = param_grads_first(x, params)
            return nnx.merge(graph, params)(shard_constraint(x, BATCH), inputs._replace(branch_scale=scale))

        step = jax.checkpoint(run_one) if self.config.remat == "blocks" else run_one
        return jax.lax.scan(step, x, (params, scales), unroll=self.config.unroll)

    def unstack(self) -> None:
        """Takes the stacks of blocks apart, once for many passes: a scan would copy each block's parameters in each."""
        for name in [name for name, module in vars(self).items() if is_stack(name) and isinstance(module, Block)]:
            graph, params = nnx.split(getattr(self, name), nnx.Param)
            depth = jax.tree.leaves(params)[0].shape[0]
            blocks = (nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], params)) for i in range(depth))
            setattr(self, name, nnx.List(blocks))

    def context(self, encoded: Float[Array, "B C D"], address: Float[Array, "B N D"]) -> Float[Array, "B C D"]:
        """The encoder's output projected, and the addresses of the inputs once more."""
        address = jnp.pad(address, ((0, 0), (self.config.num_prefix_tokens, 0), (0, 0)))
        return self.context_projection(encoded, "float32") + address

    def decode(self, targets: Targets, context: Encoded, key: PRNGKeyArray | None = None) -> Float[Array, "B M D"]:
        """Hidden vectors from which `logits` are read, one for each target slot."""
        return self._decode(targets, context, key)[0]

    def _decode(self, targets: Targets, context: Encoded, key: PRNGKeyArray | None):
        c = self.config
        x = self.decoder_input(targets)
        scales = survival(key, DecoderBlock.num_branches, c.decoder_depth, c.decoder_drop_path, len(x))
        inputs = BlockInputs(
            self.decoder_visibility(targets), self.info(targets), context.tokens, context.info,
            Visible.keys(context.info.valid), self._bias(context, targets),
        )  # fmt: skip
        x, auxiliary = self.run_blocks(self.decoder, x, inputs, scales)
        return self.decoder_norm(x), auxiliary

    def _bias(self, context: Encoded, targets: Targets) -> AttentionBias | None:
        """What extensions add to the logits of cross-attention."""
        biases = [e.bias(context.observed[type(e).__name__], targets) for e in self.config.extensions]
        if not (biases := [bias for bias in biases if bias is not None]):
            return None
        queries, keys, weight = (jnp.concatenate(parts, -1) for parts in zip(*biases, strict=True))
        return AttentionBias(queries, jnp.pad(keys, ((0, 0), (self.config.num_prefix_tokens, 0), (0, 0))), weight)

    def decoder_input(self, targets: Targets) -> Float[Array, "B M D"]:
        table = self.token_embedding if self.decoder_embedding is None else self.decoder_embedding
        content = self.mask_token[...][None]
        if self.previous_rows[-1]:
            known = self._tokens(table, self.previous_rows, targets.previous, targets.modality)
            content = jnp.where((targets.previous >= 0)[..., None], known, content)
        return content + self.target_address(targets)

    def decoder_visibility(self, targets: Targets) -> Visible:
        """The rule in the drawing above."""
        c = self.config
        slot = jnp.broadcast_to(jnp.arange(targets.ids.shape[1]), targets.ids.shape)
        ordered = jnp.asarray([isinstance(m, Sequence) for m in self.modalities])[targets.modality]
        segment = jnp.asarray(targets.item) * len(self.modalities) + targets.modality
        rank = jnp.where(ordered, targets.position, 0)
        if c.decoder_causal:
            rank = slot
        elif not c.decoder_within_modality:  # slots of a segment stand together, in order of position
            same = segment[:, :, None] == segment[:, None]
            rank = jnp.where(ordered, slot, jnp.where(same, slot[:, None], slot.shape[1]).min(-1))
        if not c.decoder_within_modality:
            segment = jnp.zeros_like(segment)
        return Visible(segment, rank, jnp.where(targets.valid, segment, -1), rank)

    @property
    def table_rows(self) -> dict[str, tuple[int, ...]]:
        """Parameters whose rows belong to modalities: those of modality i begin at number i."""
        rows = {
            "token_embedding": self.input_rows,
            "decoder_embedding": self.previous_rows,
            "output_embedding": self.output_rows,
            "modality_embedding": self.modality_rows,
            "decoder_modality_embedding": self.decoder_modality_rows,
            "position_embedding": self.position_rows,
            "decoder_position_embedding": self.decoder_position_rows,
        }
        return {name: of for name, of in rows.items() if getattr(self, name) is not None}

    @property
    def output_table(self) -> Float[Array, "V D"]:
        """Output weights of all modalities; those of modality i are the rows output_rows[i] : output_rows[i + 1]."""
        tables = {
            "shared": self.token_embedding, "encoder_decoder": self.decoder_embedding, "separate": self.output_embedding
        }  # fmt: skip
        table = tables[self.config.embeddings]
        assert table is not None, "the model has no targets"
        return table[...]

    def logits(self, hidden: Float[Array, "*B D"], name: str) -> Float[Array, "*B V"]:
        """float32."""
        return self.logits_of(name)(hidden)

    def logits_of(self, name: str) -> Callable[[Float[Array, "*B D"]], Float[Array, "*B V"]]:
        """`logits` of one modality; a loop that makes it outside reads its rows of the table only once."""
        i = self.modalities.index(name)
        vocabulary = self.output_table[self.output_rows[i] : self.output_rows[i + 1]].astype(self.config.dtype)
        return lambda hidden: jnp.einsum("...d,vd->...v", hidden, vocabulary, preferred_element_type=jnp.float32)

    def start_decoding(self, context: Encoded, length: int) -> Decoding:
        """What `decode_step` of an unstacked model needs to decode `length` positions, one after the other."""
        assert isinstance(self.decoder, nnx.List), "unstack() comes first"
        c, blocks = self.config, list(self.decoder)
        keys_values = [b.cross_attention.keys_values(context.tokens, b.context_norm, context.info) for b in blocks]
        empty = jnp.zeros((len(context.tokens), length, c.num_heads, c.width // c.num_heads), c.dtype)
        cache = [(empty, empty)] * c.decoder_depth
        return Decoding(blocks, keys_values, Visible.keys(context.info.valid), context, cache)

    def decode_step(self, target: Targets, decoding: Decoding, cache: list, index: Int[Array, ""]):
        """One sequence position (target slots [B 1]) -> hidden [B 1 D] and the new cache."""
        x = self.decoder_input(target)
        inputs = BlockInputs(
            Visible.keys((jnp.arange(cache[0][0].shape[1]) <= index)[None]), self.info(target),
            context_visible=decoding.context_visible, bias=self._bias(decoding.context, target),
        )  # fmt: skip
        new = []
        for block, keys_values, old in zip(decoding.blocks, decoding.keys_values, cache, strict=True):
            x, kept = block.step(x, old, keys_values, index, inputs)
            new.append(kept)
        return self.decoder_norm(x), new
