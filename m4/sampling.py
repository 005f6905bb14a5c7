"""Conditional generation of tokens: any subset of modalities in, one modality out, one compiled loop.

B rows, P passes of guidance, N context slots, n tokens of the target, K known ones, O open ones, S steps, V vocabulary

    MaskGIT         predicts all open tokens of a grid at once, keeps those it is surest of, and so on
    ROAR            predicts the tokens of a grid in random order, some at once
    Autoregressive  predicts a sequence left to right

A scheme is a frozen dataclass; adding one edits nothing else. A stage generates one target; what it generated is
context of the next. Guidance runs its passes as further rows of the same batch. Random numbers belong to (seed, row,
stage, step, position), so that a row's result depends neither on its batch nor on what else is generated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from m4.components import check_choice
from m4.drawing import Grammar, Sampling, uniform
from m4.guidance import Guidance, guided
from m4.modality import Grid, Modality, Sequence
from m4.model import Model
from m4.tokens import Targets, Tokens

NUM_SHAPES, TOKENS_PER_SHAPE = 8, 24  # sizes of step that are compiled for a grid, others are padded: at most; about
DRAW, CHOICE = 0, 1  # what random numbers are for


class Prompt(NamedTuple):
    """What a stage reads. Pass 0 of guidance lacks what is dropped; without guidance it is the only one.

    `given`: the target's own tokens, -1 where one is to be generated (grids). Of sequences: the number of spans to
    generate, whether something of the sequence is kept, and whether its end is open.
    """

    inputs: Tokens  # [B P N]
    features: dict[str, Float[Array, "B P K F"]]
    given: Int[Array, "B n"]
    num_spans: Int[Array, " B"]
    keeps: Bool[Array, " B"]
    open_end: Bool[Array, " B"]
    grammar: Grammar | None = None

    @property
    def num_passes(self) -> int:
        return self.inputs.ids.shape[1]

    def rows(self) -> tuple[Tokens, dict]:
        """Inputs [B*P N] and features, as the model reads them."""
        inputs = Tokens(*(x.reshape(-1, x.shape[-1]) for x in self.inputs))
        return inputs, {name: x.reshape(-1, *x.shape[2:]) for name, x in self.features.items()}


class GeneratedTokens(NamedTuple):
    """Ids, the log-probability with which each was drawn, and the step (from 0) in which; -1: it was given."""

    ids: Int[Array, "B n"]
    log_probability: Float[Array, "B n"]
    step: Int[Array, "B n"]


class Replay(NamedTuple):
    """Recorded randomness, in place of seeds: an order of a grid's positions; Gumbel noise by step and position."""

    order: Int[Array, "B n"] | None = None
    noise: Float[Array, "S B *n V"] | None = None


# ---- Schemes --------------------------------------------------------------------------------------------------------


class Scheme(Protocol):
    def check(self, modality: Modality) -> None:
        """ValueError if the scheme cannot generate this kind of modality, or a field is out of range."""

    def prepare(self, modality: Modality, prompt: Prompt, seeds: Int[np.ndarray, "B k"]) -> tuple[Any, Any]:
        """What is known before anything is computed: static (hashable) sizes, and arrays. `seeds`: of each row."""

    def generate(
        self, model: Model, modality: Modality, prompt: Prompt, guidance: Guidance | None,
        static: Any, arrays: Any, replay: Replay, tell: Callable | None,
    ) -> GeneratedTokens: ...  # fmt: skip


Schedule = Literal["maskgit", "cosine", "linear"]


def token_schedule(kind: Schedule, num_steps: int, num_tokens: int) -> Int[np.ndarray, " S"]:
    """Tokens that each step decodes, in all `num_tokens`.

    "maskgit": ever more, by a quarter of a wave, each step at least one (Chang et al. 2022, section 3.3). As 4M counts
    them, "cosine": few at first and few at last, by half a wave; a step may have none. "linear": equally many; steps
    that would have none are left out.
    """
    if kind == "maskgit":
        steps = np.arange(1, num_steps + 1)
        known = np.floor(num_tokens * (1 - np.cos(np.pi / 2 * steps / num_steps)) + 1e-6).astype(int)
        return np.diff(np.append(np.maximum(known, steps)[:-1], num_tokens), prepend=0)
    if kind == "linear":
        counts = np.sort(np.diff(np.linspace(0, num_tokens, num_steps + 1, dtype=int)))[::-1]
        return counts[counts > 0]
    left = 0.5 * (1 + np.cos(np.pi * np.arange(num_steps) / num_steps))
    counts = np.array([round(num_tokens * x) for x in (left[:-1] - left[1:]).tolist()], int)
    while counts.sum() > num_tokens:  # all rounded up: never with the original's numbers
        counts[counts.argmax()] -= 1
    return np.append(counts, num_tokens - counts.sum())


def temperature_schedule(
    kind: Literal["constant", "linear", "power"], counts: Seq[int], first: float, last: float, power: float
) -> Float[np.ndarray, " S"]:
    """Temperature of each step. "linear" falls with the share of tokens that are known; "power" (4M's onex) much
    faster, as one over a power of the step."""
    counts = np.asarray(counts)
    left = 1 - np.cumsum(counts) / counts.sum()
    if kind == "constant":
        return np.full(len(counts), first)
    if kind == "linear":
        return np.maximum(last + (first - last) * np.append(1.0, left[:-1]), 1e-9)
    curve = 1 / np.linspace(1, 100, counts.sum()) ** power
    curve = (curve - curve.min()) / max((curve - curve.min()).max(), 1e-30)
    return np.maximum(last + (first - last) * left * curve[: len(counts)], 1e-9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parallel(Sampling):
    """A grid in several steps, each of which decodes some of its tokens; see MaskGIT and ROAR."""

    steps: int = 8
    schedule: Schedule = "maskgit"
    temperature_schedule: Literal["constant", "linear", "power"] = "constant"
    final_temperature: float = 0.0
    temperature_power: float = 0.5

    def check(self, modality: Modality) -> None:
        super().check(modality)
        name = type(self).__name__
        if not isinstance(modality, Grid):
            raise ValueError(
                f"{name} generates grids; {modality.name!r} is a {type(modality).__name__}, which Autoregressive does"
            )
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps={self.steps!r} of {name} must be at least 1")
        if not 0 <= self.final_temperature < math.inf:
            raise ValueError(f"final_temperature={self.final_temperature!r} of {name} must be at least 0")
        check_choice(self, "schedule", ("maskgit", "cosine", "linear"))
        check_choice(self, "temperature_schedule", ("constant", "linear", "power"))

    def counts(self, num_open: int) -> Int[np.ndarray, " S"]:
        """Tokens that each step decodes, for a grid of which so many are open."""
        return token_schedule(self.schedule, min(self.steps, max(num_open, 1)), num_open)

    def prepare(self, modality: Modality, prompt: Prompt, seeds):
        """Sizes of each run of steps: (steps, K, O); and by step: counts, temperatures, share of the way [S B];
        number; random numbers.

        Each row has the schedule of its own number of open tokens.
        """
        given = np.asarray(prompt.given) >= 0
        num, num_open = modality.max_tokens, (~given).sum(1)
        rows = [self._row(n) for n in num_open.tolist()]
        length = max(len(r) for r in rows)
        table = np.stack([np.pad(r, ((0, length - len(r)), (0, 0))) for r in rows], axis=1)
        counts, temperatures, progress = table[..., 0].astype(np.int32), *np.moveaxis(table[..., 1:], -1, 0)
        (used,) = np.nonzero(counts.sum(1))
        counts, temperatures, progress = counts[used], np.where(counts, temperatures, 1)[used], progress[used]
        before = num_open - np.cumsum(counts, axis=0) + counts  # open before each step
        known, opened = num - before.min(1), before.max(1) if self.by_confidence else counts.max(1)
        num_shapes = min(NUM_SHAPES, -(-num // TOKENS_PER_SHAPE))
        if given.any():  # few shapes, for other masks to find them compiled
            coarse = -(-num // num_shapes)
            known, opened = (np.minimum(-(-x // coarse) * coarse, num) for x in (known, opened))
        parts = np.array_split(np.arange(len(used)), min(num_shapes, len(used)) or 1)
        sizes = tuple((len(p), int(known[p].max()), int(opened[p].max())) for p in parts if len(p))
        random = uniform(seeds, length, (2, num))
        by_step = (
            counts,
            *(x.astype(np.float32) for x in (temperatures, progress)),
            used.astype(np.int32),
            random[used],
        )
        return sizes, (random[0, :, CHOICE], by_step)

    def _row(self, num_open: int) -> Float[np.ndarray, "S 3"]:
        """Of each step of a row with so many open tokens: tokens to decode, temperature, share of the way."""
        counts = self.counts(num_open)
        if not num_open:
            return np.array([[0.0, 1.0, 0.0]])
        temperatures = temperature_schedule(
            self.temperature_schedule, counts, self.temperature, self.final_temperature, self.temperature_power
        )
        return np.stack([counts, temperatures, np.arange(len(counts)) / max(len(counts) - 1, 1)], axis=1)

    by_confidence = False
    choice_temperature = 0.0

    def generate(self, model, modality, prompt, guidance, static, arrays, replay, tell) -> GeneratedTokens:
        batch, num = prompt.given.shape
        shuffle, by_step = arrays
        inputs, features = prompt.rows()
        passes = prompt.num_passes
        row, index = jnp.arange(batch)[:, None], model.modalities.index(modality.name)
        address = model.input_address(inputs)
        embedded = model.read_shots(model.input_content(inputs, features) + address, inputs)
        logits_of = model.logits_of(modality.name)
        by_confidence = self.by_confidence and replay.order is None
        known = prompt.given >= 0
        # Positions: those that are known first, then the open ones in the order in which they will be.
        rank = jnp.broadcast_to(jnp.arange(num), (batch, num))
        if replay.order is not None:
            order = replay.order
        elif by_confidence:
            order = jnp.argsort(jnp.where(known, -1, rank), axis=1)
        else:
            order = jnp.argsort(jnp.where(known, -1.0, shuffle), axis=1)

        def step(carry, now, num_known_slots, num_open_slots):
            ids, order, log_probability, decoded_in, num_known = carry
            count, temperature, number, weights, random, luck = now

            def tokens(position, ids, valid):
                shape = position.shape
                values = (ids, jnp.full(shape, index), position, jnp.zeros(shape, jnp.int32), valid)
                return Tokens(*(jnp.repeat(x, passes, axis=0) for x in values))

            at = order[:, :num_known_slots]
            so_far = tokens(at, ids[row, at], jnp.arange(num_known_slots)[None] < num_known[:, None])
            where = model.input_address(so_far)
            join = lambda a, b: jnp.concatenate([a, b], axis=1)  # noqa: E731
            read = Tokens(*map(join, inputs, so_far))
            known = join(embedded, model.input_content(so_far, {}) + where)
            context = model.encode_embedded(known, join(address, where), read)
            place = num_known[:, None] + jnp.arange(num_open_slots)[None]
            limit = num if self.by_confidence else (num_known + count)[:, None]
            at, is_open = order[row, jnp.minimum(place, num - 1)], place < limit
            t = tokens(at, jnp.zeros_like(at), is_open)
            hidden = model.decode(Targets(t.ids, jnp.full_like(t.ids, -1), *t[1:]), context, read.valid)
            logits = logits_of(guided(hidden, weights))
            drawn, sure = self.draw(logits, temperature[:, None, None], random[row, at])
            if by_confidence:
                left = 1 - (num_known + count) / num
                sureness = sure + self.choice_temperature * left[:, None] * luck[row, at]
                best = jnp.argsort(jnp.where(is_open, sureness, -jnp.inf), axis=1, descending=True)
                at, drawn, sure = at[row, best], drawn[row, best], sure[row, best]
                order = order.at[row, jnp.where(place < num, place, num)].set(at, mode="drop")
            chosen = jnp.where(jnp.arange(num_open_slots)[None] < count[:, None], at, num)
            write = lambda old, new: old.at[row, chosen].set(new, mode="drop")  # noqa: E731
            ids, log_probability, decoded_in = (
                write(ids, drawn),
                write(log_probability, sure),
                write(decoded_in, number),
            )
            if tell is not None:
                jax.debug.callback(tell, ids, (prompt.given >= 0) | (decoded_in >= 0), ordered=True)
            return (ids, order, log_probability, decoded_in, num_known + count), None

        counts, temperatures, progress, numbers, random = (jnp.asarray(x) for x in by_step)
        weights = guidance.weights(progress) if guidance else jnp.ones((*progress.shape, 1))
        luck = -jnp.log(-jnp.log(jnp.clip(random[:, :, CHOICE], 1e-7, 1 - 1e-7)))
        random = random[:, :, DRAW] if replay.noise is None else replay.noise[numbers]
        carry = (
            jnp.maximum(prompt.given, 0), order, jnp.zeros((batch, num)), jnp.full((batch, num), -1), known.sum(1)
        )  # fmt: skip
        what, first = (counts, temperatures, numbers, weights, random, luck), 0
        for length, num_known_slots, num_open_slots in static:
            part = jax.tree.map(lambda x, steps=slice(first, first + length): x[steps], what)
            one = functools.partial(step, num_known_slots=num_known_slots, num_open_slots=num_open_slots)
            carry, _ = jax.lax.scan(one, carry, part)
            first += length
        ids, _, log_probability, decoded_in, _ = carry
        return GeneratedTokens(ids, log_probability, decoded_in)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGIT(_Parallel):
    """Parallel decoding of a grid (Chang et al. 2022, section 3.2, as used by 4M, section 2.3).

    Each step predicts all open positions, and keeps those it is surest of. Sureness is the log-probability with which
    the token was drawn plus Gumbel noise times `choice_temperature`, which falls linearly to zero: without it
    background, being easiest, comes first and then crowds out what is rare. A very large value keeps positions in
    random order.
    """

    choice_temperature: float = 0.0
    by_confidence = True

    def check(self, modality: Modality) -> None:
        super().check(modality)
        if self.choice_temperature < 0:
            raise ValueError(f"{self}: choice_temperature must be at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ROAR(_Parallel):
    """Random-order autoregression of a grid (4M, section 2.3): each step decodes the next tokens of a random order.

    Only these are computed, so that many steps are cheap; with as many steps as tokens each sees all before it.
    """

    schedule: Schedule = "linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive(Sampling):
    """Left to right with a key/value cache, from the opening sentinel until every row has closed its last span.

    What is kept of a sequence stays: each masked span is generated up to its closing sentinel. `max_length` bounds the
    number of generated ids (0: by the modality). `constrained`: outputs follow the tokenizer's grammar, if it has one.
    """

    temperature: float = 0.0
    max_length: int = 0
    constrained: bool = True

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
        length = (self.max_length or modality.max_length) + 1
        if self.constrained and prompt.grammar is not None and prompt.grammar.distance[0] > length - 1:
            least = prompt.grammar.distance[0]
            raise ValueError(f"{self}: {modality.name} needs at least {least} ids by its grammar")
        return length, uniform(seeds, length, ())

    def generate(self, model, modality, prompt, guidance, static, arrays, replay, tell) -> GeneratedTokens:
        length, grammar = static, prompt.grammar if self.constrained else None
        inputs, features = prompt.rows()
        batch, passes = len(prompt.given), prompt.num_passes
        decoder = model.start_decoding(model.encode(inputs, features), inputs.valid, length)
        logits_of = model.logits_of(modality.name)
        index = jnp.full((batch * passes, 1), model.modalities.index(modality.name))
        weights = guidance.weights(jnp.ones(batch)) if guidance else jnp.ones((batch, 1))
        ids = jnp.arange(modality.vocab_size)[None]
        is_sentinel = (ids >= modality.first_sentinel) & (ids < modality.first_sentinel + modality.num_sentinels)

        def unfinished(carry):
            return (carry["step"] < length) & ~carry["done"].all()

        def body(carry):
            step = carry["step"]
            previous = jnp.repeat(carry["previous"][:, None], passes, axis=0)
            position, zero = jnp.full_like(index, step), jnp.zeros_like(index)
            target = Targets(previous, previous, index, position, zero, zero == 0)
            hidden, cache = model.decode_step(target, decoder, carry["cache"], step)
            logits = logits_of(guided(hidden, weights)[:, 0])
            # What is kept stays in its place: sentinels come in order, and the end in the last span, if it is open.
            closing = modality.first_sentinel + 1 + carry["span"]
            last = carry["span"] == prompt.num_spans - 1
            ordered = ~is_sentinel | (ids == closing[:, None])
            ordered &= (ids != modality.end_id) | (last & prompt.open_end)[:, None]
            logits = jnp.where(ordered | ~prompt.keeps[:, None], logits, -jnp.inf)
            if grammar is not None:
                allowed = grammar.allowed(carry["state"], length - 1 - step)
                logits = jnp.where(allowed | carry["done"][:, None] | prompt.keeps[:, None], logits, -jnp.inf)
            random = jnp.asarray(arrays if replay.noise is None else replay.noise)[step]
            drawn, sure = self.draw(logits, jnp.float32(self.temperature), random)
            ids_so_far = carry["ids"].at[:, step].set(drawn)
            if tell is not None:
                known = jnp.broadcast_to(jnp.arange(length)[None] <= step, ids_so_far.shape)
                jax.debug.callback(tell, ids_so_far, known, ordered=True)
            span = carry["span"] + (drawn == closing)
            done = carry["done"] | (drawn == modality.end_id) | (span == prompt.num_spans)
            state = carry["state"]
            if grammar is not None:
                state = jnp.maximum(jnp.asarray(grammar.next_state)[state, jnp.asarray(grammar.token_class)[drawn]], 0)
            return {
                "step": step + 1,
                "previous": drawn,
                "ids": ids_so_far,
                "log_probability": carry["log_probability"].at[:, step].set(sure),
                "span": span,
                "state": state,
                "done": done,
                "cache": cache,
            }

        zeros = jnp.zeros(batch, jnp.int32)
        end = jax.lax.while_loop(
            unfinished,
            body,
            {
                "step": jnp.int32(0),
                "previous": zeros + modality.first_sentinel,
                "ids": jnp.zeros((batch, length), jnp.int32),
                "log_probability": jnp.zeros((batch, length)),
                "span": zeros,
                "state": zeros,
                "done": zeros > 0,
                "cache": decoder.cache,
            },
        )
        steps = jnp.broadcast_to(jnp.arange(length), (batch, length))
        return GeneratedTokens(end["ids"], end["log_probability"], steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One target (a signal or an exact modality name) and how to generate it.

    `ensemble`: so many samples of each row are averaged by the target's tokenizer (dense outputs: depth, pictures).
    """

    target: str
    scheme: Any
    guidance: Guidance | None = None
    ensemble: int = 1
