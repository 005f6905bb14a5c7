"""Conditional generation: any subset of signals in, any others out, one compiled loop for each stage.

B batch, N context slots, n tokens of the target modality, V vocabulary

A plan is a list of stages, one target each; what a stage generated is context for the next. A scheme is a frozen
dataclass with `generate`; adding one edits nothing else. Randomness belongs to (seed, index of the sample, stage), so
that a sample's result does not depend on its batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from m4.checkpoints import load_run
from m4.modality import Features, Grid, Modalities, Modality, Sequence, Tokenizer
from m4.model import Model
from m4.tokens import Targets, Tokens, concatenate, pad


class Generated(NamedTuple):
    """Ids of one modality, and the log-probability that the model gave each of them."""

    ids: Int[Array, "B n"]
    log_probability: Float[Array, "B n"]


class Scheme(Protocol):
    def check(self, modality: Modality) -> None:
        """ValueError if the scheme cannot generate this kind of modality."""

    def generate(
        self, model: Model, modality: Modality, inputs: Tokens, features: Any, keys: PRNGKeyArray
    ) -> Generated: ...


def sample(logits: Float[Array, "*B V"], temperature: float, top_p: float, noise: Float[Array, "*B V"]):
    """Draws ids by Gumbel noise among the smallest set of tokens that holds `top_p` of the probability.

    Returns ids and the log-probability of each under temperature 1. Temperature 0 takes the most likely.
    """
    log_probability = jax.nn.log_softmax(logits)
    if temperature == 0:
        ids = jnp.argmax(logits, -1)
    else:
        scaled = jax.nn.log_softmax(logits / temperature)
        if top_p < 1:
            ordered = jnp.sort(scaled, axis=-1, descending=True)
            before = jnp.cumsum(jnp.exp(ordered), -1) - jnp.exp(ordered)
            threshold = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
            scaled = jnp.where(scaled >= threshold, scaled, -jnp.inf)
        ids = jnp.argmax(scaled + noise, -1)
    return ids, jnp.take_along_axis(log_probability, ids[..., None], axis=-1)[..., 0]


def _check_sampling(scheme: Any) -> None:
    if scheme.temperature < 0 or not 0 < scheme.top_p <= 1:
        raise ValueError(f"{scheme}: temperature must be at least 0 and top_p within (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGIT:
    """Parallel decoding of a grid (Chang et al. 2022, section 3.2, as used by 4M, section 2.3).

    Each step predicts all open positions, and keeps those it is surest of; the number kept follows a cosine. Sureness
    is the log-probability of the drawn token plus Gumbel noise times `choice_temperature`, which falls linearly to
    zero: without it background, being easiest, comes first and then crowds out what is rare. A very large value keeps
    positions in random order.
    """

    steps: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    choice_temperature: float = 0.0

    def check(self, modality: Modality) -> None:
        _check_sampling(self)
        if not isinstance(modality, Grid):
            raise ValueError(f"MaskGIT generates grids; {modality.name!r} is a {type(modality).__name__}")
        if self.steps < 1 or self.choice_temperature < 0:
            raise ValueError(f"{self}: steps must be at least 1 and choice_temperature at least 0")

    def num_kept(self, num_tokens: int) -> np.ndarray:
        """Tokens fixed by each step: int [steps], each at least 1, sum = num_tokens."""
        steps = min(self.steps, num_tokens)
        known = np.floor(num_tokens * (1 - np.cos(np.pi / 2 * np.arange(1, steps + 1) / steps)) + 1e-6).astype(int)
        known = np.maximum(known, np.arange(1, steps + 1))
        known[-1] = num_tokens
        return np.diff(known, prepend=0)

    def generate(
        self, model: Model, modality: Modality, inputs: Tokens, features: Any, keys: PRNGKeyArray
    ) -> Generated:
        batch, num = inputs.ids.shape[0], modality.max_tokens
        shape = (batch, num)
        position = jnp.broadcast_to(jnp.arange(num), shape)
        index = jnp.full(shape, model.modalities.index(modality.name))
        zeros = jnp.zeros(shape, jnp.int32)

        def step(carry, count_and_left):
            count, left = count_and_left
            ids, log_probability, known, keys = carry
            keys, now, choice = jnp.swapaxes(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 0, 1)
            so_far = concatenate(inputs, Tokens(ids, index, position, zeros, known))
            context = model.encode(so_far, features)
            targets = Targets(ids, jnp.full(shape, -1), index, position, zeros, ~known)
            logits = model.logits(model.decode(targets, context, so_far.valid), modality.name)
            noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(now)
            drawn, sure = sample(logits, self.temperature, self.top_p, noise)
            luck = self.choice_temperature * left * jax.vmap(lambda k: jax.random.gumbel(k, (num,)))(choice)
            order = jnp.argsort(jnp.where(known, -jnp.inf, sure + luck), axis=-1, descending=True)
            rank = jnp.argsort(order, axis=-1)
            new = ~known & (rank < count)
            return (jnp.where(new, drawn, ids), jnp.where(new, sure, log_probability), known | new, keys), None

        start = (zeros, jnp.zeros(shape), jnp.zeros(shape, bool), keys)
        kept = self.num_kept(num)
        left = 1 - np.arange(1, len(kept) + 1, dtype=np.float32) / len(kept)
        (ids, log_probability, _, _), _ = jax.lax.scan(step, start, (jnp.asarray(kept), jnp.asarray(left)))
        return Generated(ids, log_probability)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """Left to right with a key/value cache, from the opening sentinel until every row has closed its span."""

    temperature: float = 0.0
    top_p: float = 1.0

    def check(self, modality: Modality) -> None:
        _check_sampling(self)
        if not isinstance(modality, Sequence):
            raise ValueError(f"Autoregressive generates sequences; {modality.name!r} is a {type(modality).__name__}")

    def generate(
        self, model: Model, modality: Modality, inputs: Tokens, features: Any, keys: PRNGKeyArray
    ) -> Generated:
        batch, length = inputs.ids.shape[0], modality.max_length + 1
        context = model.encode(inputs, features)
        one = jnp.ones((batch, 1), jnp.int32)
        index = one * model.modalities.index(modality.name)

        def unfinished(carry):
            step, _, _, _, done, _, _ = carry
            return (step < length) & ~done.all()

        def body(carry):
            step, previous, ids, log_probability, done, cache, keys = carry
            keys, now = jnp.swapaxes(jax.vmap(lambda k: jax.random.split(k, 2))(keys), 0, 1)
            target = Targets(previous, previous, index, one * step, 0 * one, one > 0)
            hidden, cache = model.decode_step(target, cache, step, inputs.valid)
            logits = model.logits(hidden[:, 0], modality.name)
            noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(now)
            drawn, sure = sample(logits, self.temperature, self.top_p, noise)
            drawn = jnp.where(done, 0, drawn)
            ids = ids.at[:, step].set(drawn)
            log_probability = log_probability.at[:, step].set(jnp.where(done, 0.0, sure))
            done = done | (drawn == modality.end_id) | (drawn == modality.first_sentinel + 1)
            return step + 1, drawn[:, None], ids, log_probability, done, cache, keys

        ids = jnp.zeros((batch, length), jnp.int32)
        start = (0, one * modality.first_sentinel, ids, jnp.zeros((batch, length)), jnp.zeros(batch, bool),
                 model.start_cache(context, length), keys)  # fmt: skip
        _, _, ids, log_probability, _, _, _ = jax.lax.while_loop(unfinished, body, start)
        return Generated(ids, log_probability)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One target (a signal or an exact modality name) and how to generate it."""

    target: str
    scheme: Any


def default_scheme(modality: Modality) -> Scheme:
    return Autoregressive() if isinstance(modality, Sequence) else MaskGIT(temperature=0.7, top_p=0.9)


def check_plan(stages: Seq[Stage], inputs: Seq[str], modalities: Modalities) -> None:
    """ValueError for unknown or repeated names, input-only targets and schemes that do not fit."""
    given = {modalities.as_input(name).signal for name in inputs}
    if not stages:
        raise ValueError(f"no targets given; allowed: {', '.join(modalities.signals)}")
    for stage in stages:
        modality = modalities.as_target(stage.target)
        stage.scheme.check(modality)
        if modality.signal in given:
            raise ValueError(f"{stage.target!r} is already given or generated; each signal may appear once")
        given.add(modality.signal)


def pack(records: Seq[Mapping[str, np.ndarray]], modalities: Modalities, *, length: int) -> tuple[Tokens, dict]:
    """Stored arrays by modality -> Tokens [B length], features. A sequence goes in whole, as in training."""
    rows: list[list[np.ndarray]] = []
    features = {
        m.name: np.zeros((len(records), m.max_tokens, m.size), np.float32)
        for m in modalities
        if isinstance(m, Features)
    }
    for b, record in enumerate(records):
        ids, modality, position = [], [], []
        for name, stored in record.items():
            m = modalities.named(name)
            ids.append(np.arange(len(stored)) if isinstance(m, Features) else stored)
            modality.append(np.full(len(stored), modalities.index(name)))
            position.append(np.arange(len(stored)))
            if isinstance(m, Features):
                features[name][b] = m.normalize(stored)
        valid = np.arange(length) < sum(len(i) for i in ids)
        rows.append([pad(ids, length), pad(modality, length), pad(position, length), np.zeros(length, np.int32), valid])
    return Tokens(*(np.stack(column) for column in zip(*rows, strict=True))), features


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _run_stage(graph, params, scheme: Scheme, modality: Modality, inputs: Tokens, features: Any, keys) -> Generated:
    return scheme.generate(nnx.merge(graph, params), modality, inputs, features, keys)


@dataclasses.dataclass
class Sampler:
    """A trained model ready to generate: `Sampler.load("runs/quickstart")({"rgb": [image]}, ["depth", "boxes"])`."""

    model: Model
    tokenizers: dict[str, Tokenizer]
    batch_size: int = 64

    def __post_init__(self):
        self.modalities = self.model.modalities
        self.graph, self.params = nnx.split(self.model)

    @classmethod
    def load(cls, path: str | Path, *, batch_size: int = 64) -> Sampler:
        """From a run's folder."""
        run = load_run(Path(path))
        return cls(run.model, run.tokenizers, batch_size)

    def plan(self, targets: Seq[str | Stage]) -> list[Stage]:
        """Names become stages with the default scheme of their kind."""
        named = lambda t: Stage(target=t, scheme=default_scheme(self.modalities.as_target(t)))  # noqa: E731
        return [t if isinstance(t, Stage) else named(t) for t in targets]

    def __call__(
        self,
        inputs: Mapping[str, Seq[Any]],
        targets: Seq[str | Stage],
        *,
        seed: int = 0,
        progress: Any = lambda batches: batches,
    ) -> dict[str, list[Any]]:
        """Raw signals in (equally long lists by name), raw signals out (lists by name).

        Stages run in the given order, and each sees the results of those before. `progress` may wrap the list of
        batches (tqdm).
        """
        stages = self.plan(targets)
        check_plan(stages, list(inputs), self.modalities)
        lengths = {name: len(signals) for name, signals in inputs.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"inputs must be non-empty lists of one length; got {lengths}")
        records = self.encode(inputs)
        out: dict[str, list[Any]] = {s.target: [] for s in stages}
        starts = range(0, len(records), self.batch_size)
        for first in progress(starts):
            for name, results in self.generate(records[first : first + self.batch_size], stages, seed, first).items():
                out[name].extend(results)
        return out

    def encode(self, inputs: Mapping[str, Seq[Any]]) -> list[dict[str, np.ndarray]]:
        """Raw signals -> stored arrays by modality, one dict a sample."""
        names = {self.modalities.as_input(name).name: signals for name, signals in inputs.items()}
        encoded = {name: self.tokenizers[name].encode(list(signals)) for name, signals in names.items()}
        return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]

    def generate(
        self, records: Seq[dict[str, np.ndarray]], stages: Seq[Stage], seed: int, first: int
    ) -> dict[str, list]:
        """One batch of encoded conditions through all stages; `first` is the index of its first sample."""
        records = [dict(r) for r in records]
        num = len(records)
        # A short batch is filled up with its last row, so that one compilation serves every batch.
        padded = records + [records[-1]] * (self.batch_size - num if num < self.batch_size and first else 0)
        records = [dict(r) for r in padded]
        out = {}
        for s, stage in enumerate(stages):
            modality = self.modalities.as_target(stage.target)
            length = sum(self.modalities.named(n).max_tokens for n in dict.fromkeys(n for r in records for n in r))
            inputs, features = pack(records, self.modalities, length=length)
            key = lambda i, s=s: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), s)  # noqa: E731
            keys = jnp.stack([key(first + i) for i in range(len(records))])
            generated = jax.device_get(
                _run_stage(self.graph, self.params, stage.scheme, modality, inputs, features, keys)
            )
            ids = [_trim(row, modality) for row in generated.ids]
            for record, row in zip(records, ids, strict=True):
                record[modality.name] = row
            out[stage.target] = self._decode(modality, ids[:num], generated.log_probability)
        return out

    def _decode(
        self, modality: Modality, ids: list[np.ndarray], log_probability: Float[np.ndarray, "B n"]
    ) -> list[Any]:
        tokenizer = self.tokenizers[modality.name]
        if hasattr(tokenizer, "decode_with_scores"):
            return [tokenizer.decode_with_scores(i, lp[: len(i)]) for i, lp in zip(ids, log_probability, strict=False)]
        return tokenizer.decode(ids)


def _trim(ids: Int[np.ndarray, " n"], modality: Modality) -> np.ndarray:
    """A sequence up to its end token, which is added if the model closed the span without one or ran out of room."""
    if not isinstance(modality, Sequence):
        return ids
    stop = np.flatnonzero((ids == modality.end_id) | (ids == modality.first_sentinel + 1))
    kept = ids[: stop[0] if len(stop) else modality.max_length - 1]
    return np.append(kept[: modality.max_length - 1], modality.end_id)
