"""Parallel decoding of grids: MaskGIT (Chang et al. 2022) and ROAR (random-order autoregression, 4M section 3)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence as Seq
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m4.errors import check_choice
from m4.inference.guidance import guided
from m4.inference.scheme import GeneratedTokens, Prompt, Replay
from m4.inference.token_sampling import TokenSampling, uniform
from m4.tokens.batch import Targets, Tokens
from m4.tokens.modality import Grid, Modality

NUM_SHAPES, TOKENS_PER_SHAPE = 8, 24  # a grid has at most 8 compiled sizes of step, one for about 24 of its tokens
DRAW, CHOICE = 0, 1  # random values that draw ids, and those that order positions
Schedule = Literal["maskgit", "cosine", "linear"]


def token_schedule(kind: Schedule, num_steps: int, num_tokens: int) -> Int[np.ndarray, " S"]:
    """Tokens that each step decodes; they add up to `num_tokens`.

    "maskgit": ever more, by a quarter of a wave, each step at least one (Chang et al. 2022, section 3.3). "cosine" and
    "linear" count as 4M does: few at first and few at last, by half a wave, where a step may have none; and equally
    many, without steps that would have none.
    """
    if kind == "maskgit":
        steps = np.arange(1, num_steps + 1)
        known = np.floor(num_tokens * (1 - np.cos(np.pi / 2 * steps / num_steps)) + 1e-6).astype(int)
        return np.diff(np.append(np.maximum(known, steps)[:-1], num_tokens), prepend=0)
    if kind == "linear":
        counts = np.sort(np.diff(np.linspace(0, num_tokens, num_steps + 1, dtype=int)))[::-1]
        return counts[counts > 0]
    open_share = 0.5 * (1 + np.cos(np.pi * np.arange(num_steps) / num_steps))
    counts = np.array([round(num_tokens * x) for x in (open_share[:-1] - open_share[1:]).tolist()], int)
    while counts.sum() > num_tokens:  # all rounded up: never with 4M's settings
        counts[counts.argmax()] -= 1
    return np.append(counts, num_tokens - counts.sum())


def temperature_schedule(
    kind: Literal["constant", "linear", "power"], counts: Seq[int] | np.ndarray, first: float, last: float, power: float
) -> Float[np.ndarray, " S"]:
    """Temperature of each step. "linear" falls with the share of tokens that are known; "power" (4M's onex) much
    faster, as one over a power of the step."""
    counts = np.asarray(counts)
    open_share = 1 - np.cumsum(counts) / counts.sum()
    if kind == "constant":
        return np.full(len(counts), first, float)
    if kind == "linear":
        return np.maximum(last + (first - last) * np.append(1.0, open_share[:-1]), 1e-9)
    curve = 1 / np.linspace(1, 100, counts.sum()) ** power
    curve = (curve - curve.min()) / max((curve - curve.min()).max(), 1e-30)
    return np.maximum(last + (first - last) * open_share * curve[: len(counts)], 1e-9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parallel(TokenSampling):
    """A grid in several steps, each of which decodes some of its tokens; see MaskGIT and ROAR."""

    steps: int = 8
    """Decoding steps, at least 1."""
    schedule: Schedule = "maskgit"
    """Tokens per step: "maskgit" ever more (Chang et al. 2022, section 3.3), "cosine" few at first and last, "linear"
    equally many."""
    temperature_schedule: Literal["constant", "linear", "power"] = "constant"
    """Temperature over the steps: "constant", "linear" in the share of known tokens, or falling as a "power" of the
    step (4M's onex)."""
    final_temperature: float = 0.0
    """Temperature at the end of a schedule that is not constant."""
    temperature_power: float = 0.5
    """Exponent of the schedule "power"."""

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
        """Tokens that each step decodes, for a grid with `num_open` open tokens."""
        return token_schedule(self.schedule, min(self.steps, max(num_open, 1)), num_open)

    def prepare(self, modality: Modality, prompt: Prompt, seeds):
        """Static: (steps, K, O) of each part of the steps. Arrays: values that order positions; and by step counts,
        temperatures and progress [S B], its index, random values.

        Each row has the schedule of its own number of open tokens.
        """
        given = np.asarray(prompt.given) >= 0
        num, num_open = modality.max_tokens, (~given).sum(1)
        rows = [self._schedule(n) for n in num_open.tolist()]
        length = max(len(r) for r in rows)
        table = np.stack([np.pad(r, ((0, length - len(r)), (0, 0))) for r in rows], axis=1)
        counts, temperatures, progress = table[..., 0].astype(np.int32), *np.moveaxis(table[..., 1:], -1, 0)
        (used,) = np.nonzero(counts.sum(1))  # steps in which some row decodes a token
        counts, temperatures, progress = counts[used], np.where(counts, temperatures, 1)[used], progress[used]
        before = num_open - np.cumsum(counts, axis=0) + counts  # open before each step
        # Slots that a step needs: all known tokens, and all open ones if the most confident are chosen among these.
        known, opened = num - before.min(1), before.max(1) if self.by_confidence else counts.max(1)
        num_shapes = min(NUM_SHAPES, -(-num // TOKENS_PER_SHAPE))
        if given.any():  # coarse sizes, so that other masks need no other compilation
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

    def _schedule(self, num_open: int) -> Float[np.ndarray, "S 3"]:
        """Tokens to decode, temperature and progress of each step, for a row with `num_open` open tokens."""
        counts = self.counts(num_open)
        if not num_open:
            return np.array([[0.0, 1.0, 0.0]])
        temperatures = temperature_schedule(
            self.temperature_schedule, counts, self.temperature, self.final_temperature, self.temperature_power
        )
        return np.stack([counts, temperatures, np.arange(len(counts)) / max(len(counts) - 1, 1)], axis=1)

    by_confidence = False
    choice_temperature = 0.0

    def _order(self, prompt: Prompt, shuffle: Float[Array, "B N"], replay: Replay) -> Int[Array, "B N"]:
        """Positions: first the known ones, then the open ones in the order in which they are decoded."""
        if replay.order is not None:
            return replay.order
        known = prompt.given >= 0
        if self.by_confidence:  # open ones by position here: each step sorts them anew
            return jnp.argsort(jnp.where(known, -1, jnp.arange(known.shape[1])[None]), axis=1)
        return jnp.argsort(jnp.where(known, -1.0, shuffle), axis=1)

    def generate(self, model, modality, prompt, guidance, static, arrays, replay, on_step) -> GeneratedTokens:
        (batch, num), (shuffle, by_step) = prompt.given.shape, arrays
        inputs, features = prompt.rows()
        row, index = jnp.arange(batch)[:, None], model.modalities.index(modality.name)
        embedded, address = model.embed(inputs, features)
        logits_of = model.logits_of(modality.name)
        by_confidence = self.by_confidence and replay.order is None
        given, order = prompt.given >= 0, self._order(prompt, shuffle, replay)
        grid_tokens = functools.partial(_grid_tokens, index=index, num_passes=prompt.num_passes)

        def step(carry, of_step, num_known_slots, num_open_slots):
            ids, order, log_probability, decoded_in, num_known = carry
            count, temperature, step_index, weights, noise, gumbel = of_step
            # 1. The encoder reads the prompt, which is embedded once, and the tokens of the grid that are known by now.
            at = order[:, :num_known_slots]
            known = grid_tokens(at, ids[row, at], jnp.arange(num_known_slots)[None] < num_known[:, None])
            known_address = model.input_address(known)
            concatenate = lambda a, b: jnp.concatenate([a, b], axis=1)  # noqa: E731
            read = Tokens(*map(concatenate, inputs, known))
            x = concatenate(embedded, model.input_content(known, {}) + known_address)
            context = model.encode_embedded(x, concatenate(address, known_address), read)
            # 2. The decoder predicts open tokens: all where the most confident are chosen, else the next in order.
            rank = num_known[:, None] + jnp.arange(num_open_slots)[None]
            limit = num if self.by_confidence else (num_known + count)[:, None]
            at, is_open = order[row, jnp.minimum(rank, num - 1)], rank < limit
            t = grid_tokens(at, jnp.zeros_like(at), is_open)
            hidden = model.decode(Targets(t.ids, jnp.full_like(t.ids, -1), *t[1:]), context)
            logits = logits_of(guided(hidden, weights))
            drawn, log_prob = self.draw(logits, temperature[:, None, None], noise[row, at])
            # 3. The most confident come first, and the order of open positions is theirs from now on.
            if by_confidence:
                open_share = 1 - (num_known + count) / num
                confidence = log_prob + self.choice_temperature * open_share[:, None] * gumbel[row, at]
                best = jnp.argsort(jnp.where(is_open, confidence, -jnp.inf), axis=1, descending=True)
                at, drawn, log_prob = at[row, best], drawn[row, best], log_prob[row, best]
                order = order.at[row, jnp.where(rank < num, rank, num)].set(at, mode="drop")
            # 4. The first `count` predictions become known; position `num` drops the others.
            chosen = jnp.where(jnp.arange(num_open_slots)[None] < count[:, None], at, num)
            write = lambda old, new: old.at[row, chosen].set(new, mode="drop")  # noqa: E731
            ids, log_probability = write(ids, drawn), write(log_probability, log_prob)
            decoded_in = write(decoded_in, step_index)
            if on_step is not None:
                jax.debug.callback(on_step, ids, given | (decoded_in >= 0), ordered=True)
            return (ids, order, log_probability, decoded_in, num_known + count), None

        nothing = jnp.zeros((batch, num)), jnp.full((batch, num), -1)
        carry = (jnp.maximum(prompt.given, 0), order, *nothing, given.sum(1))
        steps, first = _step_inputs(by_step, guidance, replay), 0
        for length, num_known_slots, num_open_slots in static:
            part = jax.tree.map(lambda x, part=slice(first, first + length): x[part], steps)
            sized = functools.partial(step, num_known_slots=num_known_slots, num_open_slots=num_open_slots)
            carry, _ = jax.lax.scan(sized, carry, part)
            first += length
        ids, _, log_probability, decoded_in, _ = carry
        return GeneratedTokens(ids, log_probability, decoded_in)


def _grid_tokens(position, ids, valid, index: int, num_passes: int) -> Tokens:
    """Tokens of the grid with this index among modalities; all passes of guidance have the same."""
    shape = position.shape
    query = jnp.zeros(shape, jnp.int32)
    values = (ids, jnp.full(shape, index), position, query, query, valid)
    return Tokens(*(jnp.repeat(x, num_passes, axis=0) for x in values))


def _step_inputs(by_step, guidance, replay: Replay):
    """By step: counts, temperatures, its index, guidance weights, uniform noise of ids, Gumbel noise of positions."""
    counts, temperatures, progress, step_index, random = (jnp.asarray(x) for x in by_step)
    weights = guidance.weights(progress) if guidance else jnp.ones((*progress.shape, 1))
    gumbel = -jnp.log(-jnp.log(jnp.clip(random[:, :, CHOICE], 1e-7, 1 - 1e-7)))
    noise = random[:, :, DRAW] if replay.noise is None else replay.noise[step_index]
    return counts, temperatures, step_index, weights, noise, gumbel


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGIT(_Parallel):
    """Parallel decoding of a grid (Chang et al. 2022, section 3.2, as used by 4M, section 2.3).

    Each step predicts all open positions, and keeps those of highest confidence: the log-probability with which the
    token was drawn plus Gumbel noise. Without noise the background, which is easiest, comes first and then crowds out
    rare content.
    """

    choice_temperature: float = 0.0
    """Factor of the Gumbel noise in the order of positions, which falls linearly to zero; 0 is none. A very large value
    keeps positions in random order."""
    by_confidence = True

    def check(self, modality: Modality) -> None:
        super().check(modality)
        if self.choice_temperature < 0:
            raise ValueError(f"{self}: choice_temperature must be at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ROAR(_Parallel):
    """Random-order autoregression of a grid (4M, section 2.3): each step decodes the next tokens of a random order.

    Only these are computed, so that many steps are cheap; with as many steps as tokens each token sees all before it.
    """

    schedule: Schedule = "linear"
    """Tokens per step: "linear" equally many, "maskgit" ever more, "cosine" few at first and last."""
