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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from m4.distributed.constraints import BATCH, lookup, shard_constraint
from m4.model.blocks import DecoderBlock, EncoderBlock
from m4.model.config import ModelConfig
from m4.model.layers import LayerNorm, Linear
from m4.model.positions import position_table
from m4.model.similarity_prior import ExampleMatches, SimilarityPrior, at_address
from m4.model.stack import STACKS, stack, survival
from m4.model.visibility import Visible
from m4.model.xla import param_grads_first
from m4.tokens.batch import NUM_SHOTS, MaskedBatch, Targets, Tokens
from m4.tokens.batch import Array as TokenArray
from m4.tokens.modality import Features, Modalities, Sequence

FeatureVectors = Mapping[str, Float[TokenArray, "B K F"]]  # by modality


class Encoded(NamedTuple):
    """What the decoder reads of the inputs. `matches`: which examples are alike, if the model compares them. `route`:
    of whose modality's LoRA each is, if that is routed."""

    tokens: Float[Array, "B C D"]
    matches: ExampleMatches | None = None
    route: Float[Array, "B C R"] | None = None


class Outputs(NamedTuple):
    """What objectives read: the model, hidden vectors of all targets, and what the decoder read of the inputs."""

    model: Model
    hidden: Float[Array, "B M D"]
    context: Encoded


class Decoding(NamedTuple):
    """The decoder as autoregressive decoding reads it: by block, keys and values of the context, of earlier tokens."""

    blocks: list[DecoderBlock]
    context: list[tuple[Array, Array]]  # [B C N H]
    context_visible: Visible
    matches: ExampleMatches | None
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

        self.shot_embedding = filled(NUM_SHOTS)
        self.mask_token = filled(1)
        self.registers = table(c.num_registers)
        self.feature_projections = nnx.Dict(
            {m.name: Linear(m.size, c.width, bias=m.bias, rngs=rngs) for m in modalities if isinstance(m, Features)}
        )
        routes = len(modalities)
        self.encoder: EncoderBlock | nnx.List = stack(EncoderBlock, c, routes, c.encoder_depth, rngs)
        self.encoder_norm = LayerNorm(c)
        self.context_projection = Linear(c.width, c.width, bias=True, rngs=rngs)
        self.decoder: DecoderBlock | nnx.List = stack(DecoderBlock, c, routes, c.decoder_depth, rngs)
        self.decoder_norm = LayerNorm(c)
        self.shot_encoder = stack(EncoderBlock, c, routes, c.shot_depth, rngs) if c.shot_depth else None
        self.shot_encoder_embedding = table(NUM_SHOTS) if c.shot_depth else None
        num_words = modalities.named(c.match_words).vocab_size if c.match_words else 0
        self.matching = (
            SimilarityPrior(c.width, c.match_size, c.num_heads, num_words, rngs=rngs) if c.match_size else None
        )

    def __call__(self, batch: MaskedBatch, key: PRNGKeyArray | None = None) -> Float[Array, "B M D"]:
        """Hidden vectors of all targets. A key turns stochastic depth on."""
        return self.outputs(batch, key).hidden

    def outputs(self, batch: MaskedBatch, key: PRNGKeyArray | None = None) -> Outputs:
        """The same, and what the decoder read of the inputs."""
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        context = self.encode(batch.inputs, batch.features, encoder_key)
        return Outputs(self, self.decode(batch.targets, context, batch.inputs.valid, decoder_key), context)

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
        return where + modality + self.shot_embedding[...][t.shot]

    def input_address(self, inputs: Tokens) -> Float[Array, "B N D"]:
        return self._address(
            inputs, self.modality_embedding, self.modality_rows, self.position_embedding, self.position_rows
        )

    def target_address(self, targets: Targets) -> Float[Array, "B M D"]:
        table = self.modality_embedding if self.config.share_modality_embeddings else self.decoder_modality_embedding
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
        c = self.config
        registers = jnp.broadcast_to(self.registers[...], (len(x), c.num_registers, c.width))
        return jnp.concatenate([registers, x], axis=1)

    def encode(self, inputs: Tokens, features: FeatureVectors, key: PRNGKeyArray | None = None) -> Encoded:
        """What the decoder reads of the inputs."""
        address = self.input_address(inputs)
        x = self.read_shots(self.input_content(inputs, features) + address, inputs)
        return self.encode_embedded(x, address, inputs, key)

    def encode_embedded(
        self, x: Float[Array, "B N D"], address: Float[Array, "B N D"], inputs: Tokens, key=None
    ) -> Encoded:
        """`encode` of inputs whose content + address is x, in-context examples as `read_shots` hands them on."""
        c = self.config
        x = self._after_registers(x)
        keep = survival(key, EncoderBlock.num_branches, c.encoder_depth, c.encoder_drop_path, len(x))
        x = self.encode_items_independently(x, inputs, keep)
        matches = None
        if self.matching is not None:
            matches = self.matching(x[:, c.num_registers :], inputs, self.modalities)
        return Encoded(
            self.context(self.encode_jointly(x, inputs, keep), address), matches, self._context_route(inputs)
        )

    def run_encoder(self, x: Float[Array, "B C D"], inputs: Tokens) -> Float[Array, "B C D"]:
        """Its output for embedded inputs (and registers), normalised."""
        return self.encode_jointly(self.encode_items_independently(x, inputs, None), inputs, None)

    def encode_items_independently(
        self, x: Float[Array, "B C D"], inputs: Tokens, keep: Array | None
    ) -> Float[Array, "B C D"]:
        """The first blocks, in which registers go with the query."""
        depth = self.config.num_independent_blocks
        if not depth:
            return x
        shot = jnp.pad(inputs.shot, ((0, 0), (self.config.num_registers, 0)))
        own = Visible(shot, 0 * shot, jnp.where(self.context_valid(inputs.valid), shot, -1), 0 * shot)
        return self._run(self.encoder, x, keep, own, self._context_route(inputs), part=slice(depth))

    def encode_jointly(self, x: Float[Array, "B C D"], inputs: Tokens, keep: Array | None):
        visible, part = Visible.keys(self.context_valid(inputs.valid)), slice(self.config.num_independent_blocks, None)
        return self.encoder_norm(self._run(self.encoder, x, keep, visible, self._context_route(inputs), part=part))

    def _route(self, t: Tokens | Targets) -> Float[Array, "B L R"] | None:
        """Which modality's LoRA each token takes, if that is routed."""
        lora = self.config.lora
        return jax.nn.one_hot(t.modality, len(self.modalities)) if lora is not None and lora.routed else None

    def _context_route(self, inputs: Tokens) -> Float[Array, "B C R"] | None:
        """Registers take none."""
        route = self._route(inputs)
        return route if route is None else jnp.pad(route, ((0, 0), (self.config.num_registers, 0), (0, 0)))

    def read_shots(self, x: Float[Array, "B N D"], inputs: Tokens) -> Float[Array, "B N D"]:
        """Tokens of in-context examples as the shot encoder hands them on; the others as they are."""
        if self.shot_encoder is None or self.shot_encoder_embedding is None:
            return x
        is_shot = inputs.valid & (inputs.shot > 0)
        y = x + self.shot_encoder_embedding[...][inputs.shot]
        y = self._run(self.shot_encoder, y, None, Visible.keys(is_shot), self._route(inputs))
        return jnp.where(is_shot[..., None], y, x)

    def _run(self, blocks: Any, x: Float[Array, "B T D"], keep: Array | None, *args, part: slice = slice(0, None)):
        """x through a stack of blocks (or an nnx.List of them, unstacked), or a part of it."""
        if isinstance(blocks, nnx.List):
            for block in list(blocks)[part]:
                x = block(shard_constraint(x, BATCH), *args)
            return x
        graph, params = nnx.split(blocks, nnx.Param)
        if part != slice(0, None):
            params, keep = jax.tree.map(lambda x: x[part], (params, keep))
        unrolled = self.config.unroll > 1 and jax.sharding.get_abstract_mesh().size <= 1

        def run_one(x, layer):
            params, keep = layer
            if unrolled:
                x, params = param_grads_first(x, params)
            block = nnx.merge(graph, params)
            return block(
                shard_constraint(x, BATCH), *args, keep=(None,) * block.num_branches if keep is None else keep
            ), None

        step = jax.checkpoint(run_one) if self.config.remat == "blocks" else run_one
        return jax.lax.scan(step, x, (params, keep), unroll=self.config.unroll)[0]

    def unstack(self) -> None:
        """Takes the stacks of blocks apart, once for many passes: a scan would copy each block's parameters in each."""
        for name in [name for name in STACKS if getattr(self, name) is not None]:
            graph, params = nnx.split(getattr(self, name), nnx.Param)
            depth = jax.tree.leaves(params)[0].shape[0]
            blocks = (nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], params)) for i in range(depth))
            setattr(self, name, nnx.List(blocks))

    def context(self, encoded: Float[Array, "B C D"], address: Float[Array, "B N D"]) -> Float[Array, "B C D"]:
        """The encoder's output projected, and the addresses of the inputs once more."""
        address = jnp.pad(address, ((0, 0), (self.config.num_registers, 0), (0, 0)))
        return self.context_projection(encoded, "float32") + address

    def context_valid(self, valid: Bool[TokenArray, "B N"]) -> Bool[Array, "B C"]:
        """Registers are always there."""
        return jnp.pad(valid, ((0, 0), (self.config.num_registers, 0)), constant_values=True)

    def decode(
        self, targets: Targets, context: Encoded, inputs_valid: Bool[TokenArray, "B N"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B M D"]:
        """Hidden vectors from which `logits` are read, one for each target slot."""
        c = self.config
        x = self.decoder_input(targets)
        visible, context_visible = self.decoder_visibility(targets), Visible.keys(self.context_valid(inputs_valid))
        keep = survival(key, DecoderBlock.num_branches, c.decoder_depth, c.decoder_drop_path, len(x))
        match, routes = self._match(context.matches, targets), (self._route(targets), context.route)
        args = visible, context.tokens, context_visible, match, *routes
        return self.decoder_norm(self._run(self.decoder, x, keep, *args))

    def _match(self, matches: ExampleMatches | None, targets: Targets):
        """What cross-attention adds for targets of examples that are like those of the context."""
        if matches is None:
            return None
        keys = jnp.pad(matches.keys, ((0, 0), (self.config.num_registers, 0), (0, 0)))
        return at_address(matches.examples, targets.shot), keys, matches.weight

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
        segment = jnp.asarray(targets.modality) * NUM_SHOTS + targets.shot
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

    def start_decoding(self, context: Encoded, inputs_valid: Bool[TokenArray, "B N"], length: int) -> Decoding:
        """What `decode_step` of an unstacked model needs to decode `length` positions, one after the other."""
        assert isinstance(self.decoder, nnx.List), "unstack() comes first"
        c, blocks = self.config, list(self.decoder)
        read = context.tokens, context.route
        context_keys_values = [b.cross_attention.keys_values(read[0], b.context_norm, read[1]) for b in blocks]
        empty = jnp.zeros((len(context.tokens), length, c.num_heads, c.width // c.num_heads), c.dtype)
        cache = [(empty, empty)] * c.decoder_depth
        visible = Visible.keys(self.context_valid(inputs_valid))
        return Decoding(blocks, context_keys_values, visible, context.matches, cache)

    def decode_step(self, target: Targets, decoding: Decoding, cache: list, index: Int[Array, ""]):
        """One sequence position (target slots [B 1]) -> hidden [B 1 D] and the new cache."""
        x = self.decoder_input(target)
        visible = Visible.keys((jnp.arange(cache[0][0].shape[1]) <= index)[None])
        new, match, route = [], self._match(decoding.matches, target), self._route(target)
        for block, context, old in zip(decoding.blocks, decoding.context, cache, strict=True):
            x, kept = block.step(x, old, context, index, visible, decoding.context_visible, match, route)
            new.append(kept)
        return self.decoder_norm(x), new
