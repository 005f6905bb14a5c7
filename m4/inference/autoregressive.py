"""Left-to-right decoding of sequences with a key-value cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from m4.inference.guidance import guided
from m4.inference.scheme import GeneratedTokens, Prompt
from m4.inference.token_sampling import TokenSampling, uniform
from m4.tokens.batch import Targets
from m4.tokens.modality import Modality, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive(TokenSampling):
    """Left to right with a key/value cache, from the opening sentinel until every row has closed its last span.

    Fixed tokens of a sequence stay unchanged; each masked span is generated up to its closing sentinel.
    """

    temperature: float = 0.0
    """Divisor of the logits; 0 takes the most likely token."""
    max_length: int = 0
    """Most tokens to generate; 0 is the modality's own limit."""
    constrained: bool = True
    """Follow the tokenizer's grammar, if it has one."""
    ends_at_sentinel: bool = False
    """Only the closing sentinel ends a sequence, and its end id is a token like others, as in 4M."""

    def check(self, modality: Modality) -> None:
        super().check(modality)
        if not isinstance(modality, Sequence):
            raise ValueError(
                f"Autoregressive generates sequences; {modality.name!r} is a {type(modality).__name__}, "
                "which MaskGIT and ROAR do"
            )
        if not 0 <= self.max_length <= modality.max_length:
            raise ValueError(f"{self}: max_length must be within 0 and {modality.max_length}, that of {modality.name}")

    def prepare(self, modality: Modality, prompt: Prompt, seeds):
        assert isinstance(modality, Sequence), "check() comes first"
        length = (self.max_length or modality.max_length) + 1
        if self.constrained and prompt.grammar is not None and prompt.grammar.distance[0] > length - 1:
            shortest = prompt.grammar.distance[0]
            raise ValueError(f"{self}: {modality.name} needs at least {shortest} ids by its grammar")
        return length, uniform(seeds, length, ())

    def generate(self, model, modality, prompt, guidance, static, arrays, replay, on_step) -> GeneratedTokens:
        length, grammar = static, prompt.grammar if self.constrained else None
        inputs, features = prompt.rows()
        batch, passes = len(prompt.given), prompt.num_passes
        decoder = model.start_decoding(model.encode(inputs, features), length)
        logits_of = model.logits_of(modality.name)
        index = jnp.full((batch * passes, 1), model.modalities.index(modality.name))
        weights = guidance.weights(jnp.ones(batch)) if guidance else jnp.ones((batch, 1))

        def unfinished(carry):
            return (carry["step"] < length) & ~carry["done"].all()

        def body(carry):
            step = carry["step"]
            # All passes of guidance read the same previous token; their outputs become one row of logits.
            previous = jnp.repeat(carry["previous"][:, None], passes, axis=0)
            position, zero = jnp.full_like(index, step), jnp.zeros_like(index)
            target = Targets(previous, previous, index, position, zero, zero, zero == 0)
            hidden, cache = model.decode_step(target, decoder, carry["cache"], step)
            logits = logits_of(guided(hidden, weights)[:, 0])
            closing = modality.first_sentinel + 1 + carry["span"]
            # With fixed tokens spans decide what may come next, else the grammar does.
            fits_spans = _fits_spans(modality, prompt, carry["span"]) | ~prompt.has_fixed_tokens[:, None]
            logits = jnp.where(fits_spans, logits, -jnp.inf)
            if grammar is not None:
                allowed = grammar.allowed(carry["state"], length - 1 - step)
                is_free = carry["done"] | prompt.has_fixed_tokens
                logits = jnp.where(allowed | is_free[:, None], logits, -jnp.inf)
            noise = jnp.asarray(arrays if replay.noise is None else replay.noise)[step]
            drawn, log_prob = self.draw(logits, jnp.float32(self.temperature), noise)
            ids_so_far = carry["ids"].at[:, step].set(drawn)
            if on_step is not None:
                known = jnp.broadcast_to(jnp.arange(length)[None] <= step, ids_so_far.shape)
                jax.debug.callback(on_step, ids_so_far, known, ordered=True)
            # Rows that are done compute on until all are; `Sampler` drops what follows their end.
            span = carry["span"] + (drawn == closing)
            ends = (drawn == modality.end_id) & (not self.ends_at_sentinel)
            done = carry["done"] | ends | (span == prompt.num_spans)
            state = carry["state"]
            if grammar is not None:
                state = jnp.maximum(jnp.asarray(grammar.next_state)[state, jnp.asarray(grammar.token_class)[drawn]], 0)
            log_probability = carry["log_probability"].at[:, step].set(log_prob)
            return {
                "step": step + 1, "previous": drawn, "ids": ids_so_far, "log_probability": log_probability,
                "span": span, "state": state, "done": done, "cache": cache,
            }  # fmt: skip

        zeros = jnp.zeros(batch, jnp.int32)
        start = {
            "step": jnp.int32(0), "previous": zeros + modality.first_sentinel,
            "ids": jnp.zeros((batch, length), jnp.int32), "log_probability": jnp.zeros((batch, length)),
            "span": zeros, "state": zeros, "done": zeros > 0, "cache": decoder.cache,
        }  # fmt: skip
        end = jax.lax.while_loop(unfinished, body, start)
        steps = jnp.broadcast_to(jnp.arange(length), (batch, length))
        return GeneratedTokens(end["ids"], end["log_probability"], steps)


def _fits_spans(modality: Sequence, prompt: Prompt, span: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """Ids that may come next in a sequence with fixed tokens: sentinels in their order, and the end id in the last
    span, if that is open. `span`: index of the span that is generated."""
    ids, first = jnp.arange(modality.vocab_size)[None], modality.first_sentinel
    is_sentinel = (ids >= first) & (ids < first + modality.num_sentinels)
    ordered = ~is_sentinel | (ids == (first + 1 + span)[:, None])
    is_last = span == prompt.num_spans - 1
    return ordered & ((ids != modality.end_id) | (is_last & prompt.open_end)[:, None])
