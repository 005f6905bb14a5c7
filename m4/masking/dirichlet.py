"""Chooses which tokens of examples go in and which must come out: a pure function of examples and their random keys.

4M (Mizrahi et al. 2023, section 2.2): a strategy is drawn from a mixture; a symmetric or skewed Dirichlet splits the
input slots, then the target slots, over the modalities; grids give uniformly random positions, sequences give spans.

    grid       . I . T I . T .          I input, T target, . neither: positions are drawn without replacement
    sequence   a b c d e f $            the tokens, $ = end
      kept     a     d     $
      input    a S1  d S2  $            one sentinel for each masked span
      target   S1 b c S2 e f S3         the decoder reads all but the last token and predicts all but the first

What a modality cannot use of its share (it has fewer tokens, or they are already inputs) goes to the others that the
strategy allows, so that slots stay empty only when nothing is left to put into them. Where all that may be predicted
would go in, an eighth of the grids stays out.

A whole batch is masked at once, but an example's mask depends on its own key (seed, index) alone: it is the same in
any batch, in any process.

B examples, M modalities, S strategies, R rows (an example's modality each), L tokens of a row, T targets of a row
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from m4.errors import closest
from m4.masking.base import ExampleMasking
from m4.masking.draws import CHOICE, SPLIT, Draws
from m4.masking.grids import Grids
from m4.masking.spans import Spans
from m4.tokens.batch import MaskedBatch, Targets, Tokens, interleave
from m4.tokens.modality import Features, Modalities, Sequence

Keep = Literal["random", "all", "binary"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to choose inputs and targets: Dirichlet concentrations by modality.

    A large value (1000) against small ones gives a modality nearly all slots; 0.5 everywhere gives varied subsets.
    """

    inputs: Mapping[str, float]
    """Concentration by name of each modality that may go in. Others never do."""
    targets: Mapping[str, float]
    """Concentration by name of each modality that may be predicted. Others never are."""
    weight: float = 1.0
    """Probability of this strategy, relative to the other weights of the mixture."""
    keep: Keep | Mapping[str, Keep] = "random"
    """How much of an input sequence is kept: a "random" share, "all", or all or nothing ("binary"); by modality name
    where they differ (those not named: random)."""
    input_share: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest share of the input slots that is used, drawn uniformly for each example; in [0, 1]. Parallel
    decoding of a grid needs to have seen few known tokens as well as many."""

    def __post_init__(self):
        low, high = self.input_share
        if not 0 <= low <= high <= 1:
            raise ValueError(f"input_share={self.input_share} must be two rising numbers within [0, 1]")

    def fits(self, names: Seq[str]) -> bool:
        """Whether an example of these modalities has something to read (if the strategy reads) and to predict."""
        has = {*names}
        return (not self.inputs or bool(has & {*self.inputs})) and bool(has & {*self.targets})

    def keep_of(self, name: str) -> Keep:
        if isinstance(self.keep, Mapping):
            return self.keep[name] if name in self.keep else "random"
        return self.keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirichletMasking(ExampleMasking):
    """The mixture of strategies that fills a masked example (4M, section 2.2)."""

    strategies: tuple[Strategy, ...]
    """The mixture of strategies, one of which is drawn for each example."""
    budgets: Literal["filled", "drawn"] = "filled"
    """"filled" gives slots that a modality cannot use to the others. "drawn" leaves them empty, and counts a target
    sequence's opening sentinel: the distribution of 4M."""

    def check(self, modalities: Modalities) -> None:
        """Raises ValueError for unknown names, continuous targets, and weights that are not positive."""
        check_strategies(self.strategies, modalities)

    def serves(self, names: Seq[str]) -> bool:
        return any(strategy.fits(names) for strategy in self.strategies)

    def __call__(self, examples, modalities, keys, num_inputs: int, num_targets: int) -> MaskedBatch:
        return self._mask(examples, modalities, keys, [self.strategies] * len(examples), num_inputs, num_targets)

    @classmethod
    def mask_rows(cls, maskings, examples, modalities, keys, num_inputs: int, num_targets: int) -> MaskedBatch:
        """All rows with the same budgets at once, whatever their mixtures."""
        parts = []
        for budgets in dict.fromkeys(masking.budgets for masking in maskings):
            rows = [i for i, masking in enumerate(maskings) if masking.budgets == budgets]
            mixtures, own = [maskings[i].strategies for i in rows], [examples[i] for i in rows]
            masked = maskings[rows[0]]._mask(own, modalities, keys[rows], mixtures, num_inputs, num_targets)
            parts.append((rows, masked))
        return interleave(parts)

    def _mask(
        self, examples: Seq[Mapping[str, np.ndarray]], modalities: Modalities, keys: UInt64[np.ndarray, "B 2"],
        mixtures: Seq[tuple[Strategy, ...]], num_inputs: int, num_targets: int,
    ) -> MaskedBatch:  # fmt: skip
        if not len(examples):
            raise ValueError("there is no example to mask")
        draws = Draws(keys)
        lengths = _lengths(examples, modalities)
        table = _Table.of(mixtures, modalities)
        uniform = np.stack([draws.at(i, CHOICE).random(4 + 2 * len(modalities)) for i in range(len(examples))])
        chosen = table.choose(lengths > 0, uniform[:, 0], examples)

        # Inputs: budgets, then the spans of sequences, whose masked tokens may leave slots for grids.
        low, high = table.input_share[chosen].T
        input_budget = np.round(num_inputs * (low + uniform[:, 1] * (high - low))).astype(int)
        is_sequence = np.array([isinstance(m, Sequence) for m in modalities])
        inputs, share = _split(table.inputs[chosen] * (lengths > 0), input_budget, draws, 0)
        inputs = np.minimum(inputs, lengths)
        if self.budgets == "filled":
            inputs = _fill(inputs, share, lengths, input_budget, uniform[:, 2])
        spans = Spans.of(examples, modalities, lengths, inputs, table.keep[chosen], uniform[:, 4:], draws)
        used = np.where(is_sequence, 0, inputs)
        used[spans.example, spans.modality] = np.where(inputs[spans.example, spans.modality] > 0, spans.num_inputs, 0)
        if self.budgets == "filled":
            inputs = _fill(used, share, np.where(is_sequence, used, lengths), input_budget, uniform[:, 2])

        # Targets: what is left of grids, and the masked spans of sequences.
        capacity = np.where(is_sequence, 0, lengths - inputs)
        capacity[spans.example, spans.modality] = spans.num_targets
        if self.budgets == "filled":
            held_back = _held_back(capacity, lengths, table.targets[chosen] > 0, is_sequence)
            inputs, capacity = inputs - held_back, capacity + held_back
        target_budget = np.full(len(examples), num_targets)
        targets, share = _split(table.targets[chosen] * (lengths > 0), target_budget, draws, 1)
        cut = uniform[:, 4 + len(modalities) :]
        if self.budgets == "filled":
            targets = _fill(np.minimum(targets, capacity), share, capacity, target_budget, uniform[:, 3])
            # A sequence that is cut may begin too late to use all its slots: they go to grids.
            used = np.where(is_sequence, 0, targets)
            example, *_, modality, _ = spans.targets(targets, cut)
            np.add.at(used, (example, modality), 1)
            targets = _fill(used, share, np.where(is_sequence, used, capacity), target_budget, uniform[:, 3])
        else:
            targets = np.minimum(np.where(is_sequence, targets - 1, targets), capacity)

        rows = Grids.of(examples, modalities, lengths, inputs, targets, draws)
        return MaskedBatch(
            Tokens(*_pack(len(examples), num_inputs, [rows.inputs(), spans.inputs(inputs)])),
            Targets(*_pack(len(examples), num_targets, [rows.targets(), spans.targets(targets, cut)])),
            rows.features(examples, modalities, num_inputs),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking(DirichletMasking):
    """The fixed sizes of a masked example, for all data sets, and the masking of those that have none of their own."""

    num_inputs: int = 128
    """Input tokens of an example, at most."""
    num_targets: int = 128
    """Predicted tokens of an example, at most."""

    def check(self, modalities: Modalities) -> None:
        """Raises ValueError for unknown names, continuous targets, and weights or sizes that are not positive."""
        if self.num_inputs < 1 or self.num_targets < 1:
            raise ValueError(f"num_inputs={self.num_inputs} and num_targets={self.num_targets} must be at least 1")
        super().check(modalities)

    def __call__(  # ty: ignore[incompatible-method-override]  its sizes are its own
        self,
        examples: Seq[Mapping[str, np.ndarray]],
        modalities: Modalities,
        keys: UInt64[np.ndarray, "B 2"],
        strategies: Seq[tuple[Strategy, ...]] | None = None,
    ) -> MaskedBatch:
        """Stored arrays by modality name -> MaskedBatch. `keys`: two numbers for each example, which decide its mask.

        `strategies`: the mixture of each example, where data sets have their own. ValueError for an array that does
        not fit its modality, and for an example of which no strategy can predict anything.
        """
        mixtures = [self.strategies] * len(examples) if strategies is None else strategies
        return self._mask(examples, modalities, keys, mixtures, self.num_inputs, self.num_targets)


def check_strategies(strategies: tuple[Strategy, ...], modalities: Modalities) -> None:
    """Raises ValueError for an empty mixture, unknown names, continuous targets and numbers that are not positive."""
    if not strategies or any(s.weight < 0 for s in strategies) or not sum(s.weight for s in strategies):
        raise ValueError("masking needs strategies with weights >= 0, one of them positive")
    readable = [m.name for m in modalities if m.is_input]
    predictable = [m.name for m in modalities if m.is_target]
    for strategy in strategies:
        kept = strategy.keep if isinstance(strategy.keep, Mapping) else {}
        for names, allowed in ((strategy.inputs, readable), (strategy.targets, predictable), (kept, readable)):
            for name, value in names.items():
                if name not in allowed:
                    raise ValueError(f"masking names modality {name!r}; {closest(name, allowed)}")
                if not isinstance(value, str) and not value > 0:
                    raise ValueError(f"masking gives {name!r} concentration {value}; it must be positive")
        for keep in (strategy.keep,) if isinstance(strategy.keep, str) else kept.values():
            if keep not in Keep.__args__:
                raise ValueError(f"masking has keep={keep!r}; {closest(keep, Keep.__args__)}")
    for m in modalities:
        if isinstance(m, Sequence) and m.num_sentinels < 2:
            raise ValueError(f"{m.name} has {m.num_sentinels} sentinels; masking needs at least 2")


@dataclasses.dataclass
class _Table:
    """Strategies as arrays, and which of them each example may draw."""

    inputs: Float[np.ndarray, "S M"]  # concentrations, 0 = never
    targets: Float[np.ndarray, "S M"]
    keep: Int[np.ndarray, "S M"]  # index in Keep
    input_share: Float[np.ndarray, "S 2"]
    weights: Float[np.ndarray, "B S"]

    @classmethod
    def of(cls, mixtures: Seq[tuple[Strategy, ...]], modalities: Modalities) -> _Table:
        different = {id(mixture): mixture for mixture in mixtures}
        strategies = [s for mixture in different.values() for s in mixture]
        first = dict(zip(different, np.cumsum([0, *map(len, different.values())]), strict=False))
        weights = np.zeros((len(mixtures), len(strategies)))
        for i, mixture in enumerate(mixtures):
            weights[i, first[id(mixture)] : first[id(mixture)] + len(mixture)] = [s.weight for s in mixture]
        names = modalities.names
        return cls(
            np.array([[s.inputs[n] if n in s.inputs else 0.0 for n in names] for s in strategies]),
            np.array([[s.targets[n] if n in s.targets else 0.0 for n in names] for s in strategies]),
            np.array([[Keep.__args__.index(s.keep_of(n)) for n in names] for s in strategies]),
            np.array([s.input_share for s in strategies], float),
            weights,
        )

    def choose(self, present: Bool[np.ndarray, "B M"], uniform: Float[np.ndarray, " B"], examples) -> np.ndarray:
        """A strategy for each example, of those that it has something to read for and something to predict."""
        reads, predicts = self.inputs > 0, self.targets > 0
        possible = ((present @ reads.T) | ~reads.any(1)) & (present @ predicts.T)
        weights = np.cumsum(self.weights * possible, axis=1)
        if not weights[:, -1].all():
            example = examples[int(np.argmin(weights[:, -1]))]
            raise ValueError(f"no masking strategy fits an example that has only {sorted(example)}")
        return (uniform[:, None] * weights[:, -1:] >= weights).sum(1)


def _lengths(examples: Seq[Mapping[str, np.ndarray]], modalities: Modalities) -> Int[np.ndarray, "B M"]:
    """Numbers of tokens, 0 = missing, checked against the modality."""
    lengths = np.array([[len(e[n]) if n in e else 0 for n in modalities.names] for e in examples])
    for j, m in enumerate(modalities):
        full = m.max_length if isinstance(m, Sequence) else m.max_tokens
        allowed = lengths[:, j] <= full if isinstance(m, Sequence | Features) else np.isin(lengths[:, j], (0, full))
        if not allowed.all():
            wrong = lengths[np.argmin(allowed), j]
            raise ValueError(f"an example has {wrong} tokens of {m.name}, which holds {full}")
        if isinstance(m, Features):
            for stored in (e[m.name] for e in examples if m.name in e):
                if stored.dtype != m.dtype:
                    raise ValueError(f"an example has {stored.dtype} vectors of {m.name}, which holds {m.dtype}")
    return lengths


def _held_back(capacity, lengths, is_target, is_sequence) -> Int[np.ndarray, "B M"]:
    """Input tokens of grids that become targets, an eighth of each, in examples that would have nothing to predict."""
    nothing = ~(capacity * is_target).any(1, keepdims=True)
    return -(-lengths // 8) * (nothing & is_target & ~is_sequence)


def _split(alphas: Float[np.ndarray, "B M"], total: Int[np.ndarray, " B"], draws: Draws, part: int):
    """Budgets int [B M] that sum to `total`, by one Dirichlet draw, and its shares float [B M].

    As in 4M: shares are rounded down, and each slot that is left goes to the largest share of a new draw.
    """
    budget, shares = np.zeros(alphas.shape, int), np.zeros(alphas.shape)
    patterns, pattern_of = np.unique(alphas, axis=0, return_inverse=True)
    for p, pattern in enumerate(patterns):
        (named,), (rows,) = pattern.nonzero(), np.nonzero(pattern_of == p)
        if not len(named):
            continue
        if len(named) == 1:
            budget[rows, named[0]], shares[rows, named[0]] = total[rows], 1
            continue
        same = (pattern[named] == pattern[named[0]]).all()  # numpy draws faster with a single number
        concentrations, size = pattern[named[0]] if same else pattern[named], (len(named),) * 2
        gamma = np.stack([draws.at(i, SPLIT, part).standard_gamma(concentrations, size) for i in rows.tolist()])
        gamma = np.maximum(gamma, np.finfo(float).tiny)
        share = gamma[:, 0] / gamma[:, 0].sum(1, keepdims=True)
        slots = np.floor(share * total[rows, None]).astype(int)
        left = total[rows] - slots.sum(1)
        row, extra = np.nonzero(np.arange(1, len(named)) <= left[:, None])
        np.add.at(slots, (row, gamma[row, extra + 1].argmax(1)), 1)
        budget[np.ix_(rows, named)], shares[np.ix_(rows, named)] = slots, share
    return budget, shares


def _fill(budget, share, capacity, total, offset) -> Int[np.ndarray, "B M"]:
    """Hands slots that are left of `total` to modalities below their capacity, in proportion to their shares.

    Rounded by systematic sampling: at a random offset in [0, 1), every whole number that the running sum of the
    proportions passes gives a slot, so that the expected number of slots is exactly proportional.
    """
    left = np.minimum(total - budget.sum(1), (np.where(share > 0, capacity, budget) - budget).sum(1))
    (rows,) = np.nonzero(left > 0)
    budget = budget.copy()
    while len(rows):
        room = (capacity[rows] - budget[rows]) * (share[rows] > 0)
        running = np.cumsum(share[rows] * (room > 0), axis=1)
        passed = np.floor(running / running[:, -1:] * left[rows, None] + offset[rows, None])
        add = np.minimum(np.diff(passed, axis=1, prepend=0).astype(int), room)
        budget[rows] += add
        left[rows] -= add.sum(1)
        offset = (offset + 0.618034) % 1  # another one, should rounding have given slots to a full modality
        rows = rows[left[rows] > 0]
    return budget


def _pack(num_examples: int, length: int, parts) -> tuple[np.ndarray, ...]:
    """Columns of picked tokens -> int32 [B length] each, then `shot` (0) and `valid`.

    Each part is sorted by example; in an example's slots, the tokens of the first part come first.
    """
    packed = [np.zeros((num_examples, length), np.int32) for _ in parts[0][1:]]
    filled = np.zeros(num_examples, int)
    for example, *columns in parts:
        count = np.bincount(example, minlength=num_examples)
        assert (filled + count).max(initial=0) <= length, f"{(filled + count).max()} tokens, {length} slots"
        slot = (
            np.arange(len(example)) + (np.arange(num_examples) * length + filled - (np.cumsum(count) - count))[example]
        )
        for out, column in zip(packed, columns, strict=True):
            out.reshape(-1)[slot] = column
        filled += count
    zeros = np.zeros((num_examples, length), np.int32)  # all of them are the query's first item
    return *packed, zeros, zeros, np.arange(length) < filled[:, None]
