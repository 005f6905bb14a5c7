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
from jaxtyping import Bool, Float, Int, Integer, UInt, UInt64

from m4.modality import Features, Grid, Modalities, Sequence, closest
from m4.tokens import MaskedBatch, Targets, Tokens

Keep = Literal["random", "all", "binary"]
NUM_TRIES = 8  # shares of kept tokens that are tried at once, each 0.9 of the last
CHOICE, SPLIT, POSITIONS, SPANS = range(4)  # what random numbers are for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """Dirichlet concentrations by modality name; a modality that is not named is never picked.

    A large value (1000) against small ones gives a modality nearly all slots; 0.5 everywhere gives varied subsets.
    `keep` says how much of a sequence that goes in is kept: a random share, all of it, or all or nothing; by modality
    name where they differ (what is not named there: random).
    `input_share` bounds the share of the input slots that is used, drawn uniformly for each example: parallel decoding
    of a grid needs to have seen few known tokens as well as many.
    """

    inputs: Mapping[str, float]
    targets: Mapping[str, float]
    weight: float = 1.0
    keep: Keep | Mapping[str, Keep] = "random"
    input_share: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self):
        low, high = self.input_share
        if not 0 <= low <= high <= 1:
            raise ValueError(f"input_share={self.input_share} must be two rising numbers within [0, 1]")

    def fits(self, names: Seq[str]) -> bool:
        """Whether an example of these modalities has something to read (if the strategy reads) and to predict."""
        has = {*names}
        return (not self.inputs or bool(has & {*self.inputs})) and bool(has & {*self.targets})

    def keep_of(self, name: str) -> Keep:
        if isinstance(self.keep, str):
            return self.keep
        return self.keep[name] if name in self.keep else "random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """Static numbers of slots, and the mixture of strategies that fills them.

    `budgets`: "filled" hands what a modality cannot use to the others. "drawn" leaves those slots empty, and counts a
    target sequence's opening sentinel: the distribution of the original 4M.
    """

    num_inputs: int = 128
    num_targets: int = 128
    strategies: tuple[Strategy, ...]
    budgets: Literal["filled", "drawn"] = "filled"

    def check(self, modalities: Modalities) -> None:
        """Raises ValueError for unknown names, continuous targets, and weights or budgets that are not positive."""
        if self.num_inputs < 1 or self.num_targets < 1:
            raise ValueError(f"num_inputs={self.num_inputs} and num_targets={self.num_targets} must be at least 1")
        check_strategies(self.strategies, modalities)

    def __call__(
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
        if not len(examples):
            raise ValueError("there is no example to mask")
        draws = _Draws(keys)
        lengths = _lengths(examples, modalities)
        table = _Table.of([self.strategies] * len(examples) if strategies is None else strategies, modalities)
        uniform = np.stack([draws.at(i, CHOICE).random(4 + 2 * len(modalities)) for i in range(len(examples))])
        chosen = table.choose(lengths > 0, uniform[:, 0], examples)

        # Inputs: budgets, then the spans of sequences, whose masked tokens may leave slots for grids.
        low, high = table.input_share[chosen].T
        num_inputs = np.round(self.num_inputs * (low + uniform[:, 1] * (high - low))).astype(int)
        is_sequence = np.array([isinstance(m, Sequence) for m in modalities])
        inputs, share = _split(table.inputs[chosen] * (lengths > 0), num_inputs, draws, 0)
        inputs = np.minimum(inputs, lengths)
        if self.budgets == "filled":
            inputs = _fill(inputs, share, lengths, num_inputs, uniform[:, 2])
        spans = _Spans.of(examples, modalities, lengths, inputs, table.keep[chosen], uniform[:, 4:], draws)
        used = np.where(is_sequence, 0, inputs)
        used[spans.example, spans.modality] = np.where(inputs[spans.example, spans.modality] > 0, spans.num_inputs, 0)
        if self.budgets == "filled":
            inputs = _fill(used, share, np.where(is_sequence, used, lengths), num_inputs, uniform[:, 2])

        # Targets: what is left of grids, and the masked spans of sequences.
        capacity = np.where(is_sequence, 0, lengths - inputs)
        capacity[spans.example, spans.modality] = spans.num_targets
        if self.budgets == "filled":
            predictable = ~is_sequence & (table.targets[chosen] > 0)
            nothing = ~(capacity * (table.targets[chosen] > 0)).any(1, keepdims=True)
            held_back = -(-lengths // 8) * (nothing & predictable)
            inputs, capacity = inputs - held_back, capacity + held_back
        num_targets = np.full(len(examples), self.num_targets)
        targets, share = _split(table.targets[chosen] * (lengths > 0), num_targets, draws, 1)
        cut = uniform[:, 4 + len(modalities) :]
        if self.budgets == "filled":
            targets = _fill(np.minimum(targets, capacity), share, capacity, num_targets, uniform[:, 3])
            # A sequence that is cut may begin too late to use all its slots: they go to grids.
            used = np.where(is_sequence, 0, targets)
            example, *_, modality, _ = spans.targets(targets, cut)
            np.add.at(used, (example, modality), 1)
            targets = _fill(used, share, np.where(is_sequence, used, capacity), num_targets, uniform[:, 3])
        else:
            targets = np.minimum(np.where(is_sequence, targets - 1, targets), capacity)

        rows = _Grids.of(examples, modalities, lengths, inputs, targets, draws)
        return MaskedBatch(
            Tokens(*_pack(len(examples), self.num_inputs, [rows.inputs(), spans.inputs(inputs)])),
            Targets(*_pack(len(examples), self.num_targets, [rows.targets(), spans.targets(targets, cut)])),
            rows.features(examples, modalities, self.num_inputs),
        )


def check_strategies(strategies: tuple[Strategy, ...], modalities: Modalities) -> None:
    """Raises ValueError for an empty mixture, unknown names, continuous targets and numbers that are not positive."""
    if not strategies or any(s.weight < 0 for s in strategies) or not sum(s.weight for s in strategies):
        raise ValueError("masking needs strategies with weights >= 0, one of them positive")
    readable = [m.name for m in modalities if m.is_input]
    predictable = [m.name for m in modalities if m.is_target]
    for strategy in strategies:
        kept = {} if isinstance(strategy.keep, str) else strategy.keep
        for names, allowed in ((strategy.inputs, readable), (strategy.targets, predictable), (kept, readable)):
            for name, value in names.items():
                if name not in allowed:
                    raise ValueError(f"masking names modality {name!r}; {closest(name, allowed)}")
                if names is not kept and not value > 0:
                    raise ValueError(f"masking gives {name!r} concentration {value}; it must be positive")
        for keep in (strategy.keep,) if isinstance(strategy.keep, str) else kept.values():
            if keep not in Keep.__args__:
                raise ValueError(f"masking has keep={keep!r}; {closest(keep, Keep.__args__)}")
    for m in modalities:
        if isinstance(m, Sequence) and m.num_sentinels < 2:
            raise ValueError(f"{m.name} has {m.num_sentinels} sentinels; masking needs at least 2")


class _Draws:
    """Random numbers by address: an example's key, and what they are for (a counter-based generator, no state)."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys
        self.bits = np.random.Philox(0)
        self.state = self.bits.state
        self.generator = np.random.Generator(self.bits)

    def at(self, example: int, purpose: int, part: int = 0, attempt: int = 0) -> np.random.Generator:
        self.state["state"]["key"][:] = self.keys[example]
        self.state["state"]["counter"][:] = (0, attempt, part, purpose)
        self.bits.state = self.state
        return self.generator


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


def _split(alphas: Float[np.ndarray, "B M"], total: Int[np.ndarray, " B"], draws: _Draws, part: int):
    """Budgets int [B M] that sum to `total`, by one Dirichlet draw, and its shares float [B M].

    As in the original: shares are rounded down, and each slot that is left goes to the largest share of a new draw.
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


def mask_spans(ids: np.ndarray, masked: np.ndarray, first_sentinel: int) -> tuple[np.ndarray, np.ndarray]:
    """Replaces masked spans by sentinels: (input ids, target ids), both int32 [*]; see the drawing above.

    Nothing masked: the target is the single opening sentinel, which leaves the decoder nothing to predict.
    """
    one = np.zeros(1, int)
    spans = _Spans(one, one, ids[None], np.ones((1, len(ids)), bool), masked[None], one + first_sentinel)
    _, inputs, _, _ = spans.inputs(np.full((1, 1), len(ids)))
    _, targets, _, _, _ = spans.targets(np.full((1, 1), 2 * len(ids) + 1), np.zeros((1, 1)))
    return inputs.astype(np.int32), np.append(first_sentinel, targets).astype(np.int32)


@dataclasses.dataclass
class _Spans:
    """The sequences of a batch, padded, and which of their tokens are masked."""

    example: Int[np.ndarray, " R"]
    modality: Int[np.ndarray, " R"]
    ids: Int[np.ndarray, "R L"]
    valid: Bool[np.ndarray, "R L"]
    masked: Bool[np.ndarray, "R L"]
    first_sentinel: Int[np.ndarray, " R"]

    def __post_init__(self):
        self.starts = _starts(self.masked)
        self.num_spans = self.starts.sum(1)
        self.num_targets = self.masked.sum(1) + self.num_spans  # decoder slots: the opening sentinel is only read
        self.num_inputs = self.valid.sum(1) - self.num_targets + 2 * self.num_spans

    @classmethod
    def of(cls, examples, modalities: Modalities, lengths, budgets, keep, uniform, draws: _Draws) -> _Spans:
        """Masks of all sequences: what does not go in is masked whole."""
        sequences = np.array([isinstance(m, Sequence) for m in modalities])
        example, modality = np.nonzero(lengths * sequences)
        length = lengths[example, modality]
        valid = np.arange(length.max(initial=0)) < length[:, None]
        ids = np.zeros(valid.shape, int)
        stored = [examples[i][modalities.names[j]] for i, j in zip(example.tolist(), modality.tolist(), strict=True)]
        ids[valid] = np.concatenate([np.zeros(0, int), *stored])
        kinds = [modalities[j] for j in modality.tolist()]
        opens = _opens_chunk(ids, valid, kinds)
        limits = np.array([k.num_sentinels for k in kinds], int)
        masked = valid.copy()
        budget = budgets[example, modality]
        # The original's scheme: masks are drawn with ever smaller shares of kept tokens until one fits its budget.
        share = np.choose(keep[example, modality], [u := uniform[example, modality], np.ones_like(u), np.round(u)])
        (active,), attempt = np.nonzero(budget > 0), 0
        while len(active):
            draw = np.zeros((len(active), NUM_TRIES, valid.shape[1]), np.float32)
            rows = zip(*(x[active].tolist() for x in (example, modality, length)), strict=True)
            for a, (i, j, count) in enumerate(rows):
                draw[a, :, :count] = draws.at(i, SPANS, j, attempt).random((NUM_TRIES, count), np.float32)
            shares = share[active, None] * 0.9 ** (attempt * NUM_TRIES + np.arange(NUM_TRIES))
            tries = draw > shares[..., None].astype(np.float32)
            if opens is not None:  # the first token of a chunk decides for all of it
                tries = np.take_along_axis(tries, opens[active][:, None], axis=2)
            tries &= valid[active][:, None]
            spans, hidden = _starts(tries).sum(2), tries.sum(2)
            fits = (length[active, None] - hidden + spans <= budget[active, None]) & (spans < limits[active, None])
            found, first = fits.any(1), fits.argmax(1)
            masked[active[found]] = tries[found, first[found]]
            active, attempt = active[~found], attempt + 1
        return cls(example, modality, ids, valid, masked, np.array([k.first_sentinel for k in kinds], int))

    def inputs(self, budgets):
        """(example, ids, modality, position) of every input token: masked spans are replaced by sentinels."""
        shown = self.valid & (self.starts | ~self.masked) & (budgets[self.example, self.modality] > 0)[:, None]
        sentinels = self.first_sentinel[:, None] + np.cumsum(self.starts, axis=1) - 1
        ids = np.where(self.starts, sentinels, self.ids)[shown]
        row, _ = np.nonzero(shown)
        return self.example[row], ids, self.modality[row], (np.cumsum(shown, axis=1) - 1)[shown]

    def targets(self, budgets, uniform):
        """(example, ids, previous, modality, position) of every decoder slot, at most `budgets` for a sequence.

        Columns: sentinel before token 0, token 0, sentinel before token 1, token 1, ..., closing sentinel. What is too
        long begins at the sentinel of a randomly chosen span (not the closing one); where fewer tokens than slots come
        after it, at the first sentinel of which that is true, as in the original, for ends to be targets too.
        """
        (kept,) = np.nonzero(budgets[self.example, self.modality] > 0)
        num_rows, num_columns = len(kept), 2 * self.ids.shape[1] + 1
        ids, shown = np.zeros((num_rows, num_columns), int), np.ones((num_rows, num_columns), bool)
        shown[:, :-1:2], shown[:, 1::2] = self.starts[kept], self.masked[kept]
        ids[:, 1::2] = self.ids[kept]
        is_sentinel = shown.copy()
        is_sentinel[:, 1::2] = False
        ids[:, ::2] = self.first_sentinel[kept, None] + np.cumsum(is_sentinel[:, ::2], axis=1) - 1
        rank = np.cumsum(shown, axis=1) - 1
        budget, total = budgets[self.example[kept], self.modality[kept]], self.num_targets[kept]
        # Where the cut begins, as a rank: total + 1 tokens, of which budget + 1 may stay.
        number = np.cumsum(is_sentinel, axis=1) - 1
        choice = np.floor(uniform[self.example[kept], self.modality[kept]] * np.maximum(self.num_spans[kept], 1))
        chosen = (rank * (is_sentinel & (number == choice[:, None]))).sum(1)
        enough = is_sentinel & (rank >= (total - budget)[:, None])
        earliest = np.where(enough, rank, num_columns).min(1, initial=num_columns)
        start = np.where(chosen > total - budget, earliest, chosen) * (total > budget)
        shown &= (rank >= start[:, None]) & (rank <= (start + budget)[:, None])
        row, _ = np.nonzero(shown)
        ids, position = ids[shown], (rank - start[:, None])[shown] - 1
        previous = np.concatenate([np.zeros(1, int), ids[:-1]])
        row, predicted = kept[row], position >= 0
        columns = (self.example[row], ids, previous, self.modality[row], position)
        return tuple(column[predicted] for column in columns)


def _starts(masked: Bool[np.ndarray, "... L"]) -> Bool[np.ndarray, "... L"]:
    """The first token of each masked span."""
    starts = masked.copy()
    starts[..., 1:] &= ~masked[..., :-1]
    return starts


def _opens_chunk(ids, valid, kinds: list[Sequence]) -> Int[np.ndarray, "R L"] | None:
    """For each token the place of its chunk's first token; None if no sequence has chunks."""
    ranges = np.array([k.chunk_ids for k in kinds], int).reshape(-1, 2)
    if not ranges.any():
        return None
    ends = np.array([k.end_id for k in kinds], int)
    first, last = ranges[:, :1], ranges[:, 1:]
    opens = ((first <= ids) & (ids < last)) | (ids == ends[:, None]) | (first == last)
    return np.maximum.accumulate(np.where(opens & valid, np.arange(ids.shape[1]), 0), axis=1)


@dataclasses.dataclass
class _Grids:
    """The grids and features of a batch of which something is picked, their positions in random order."""

    example: Int[np.ndarray, " R"]
    modality: Int[np.ndarray, " R"]
    order: UInt[np.ndarray, "R L"]  # positions: inputs come first, targets next
    num_inputs: Int[np.ndarray, " R"]
    num_targets: Int[np.ndarray, " R"]
    ids: Integer[np.ndarray, " N"]  # of all rows, one after the other
    first_id: Int[np.ndarray, " R"]  # where those of a row begin; -1: features, whose id is their place

    @classmethod
    def of(cls, examples, modalities: Modalities, lengths, inputs, targets, draws: _Draws) -> _Grids:
        others = np.array([not isinstance(m, Sequence) for m in modalities])
        example, modality = np.nonzero((inputs + targets) * others)
        length = lengths[example, modality]
        # Of the model, not of the batch, for an example's mask not to depend on what else is in its batch.
        longest = max([2, *(m.max_tokens for m in modalities if not isinstance(m, Sequence))])
        longest += longest % 2
        # Sorting random numbers whose low bits are the position shuffles positions, far faster than argsort.
        bits = int(longest - 1).bit_length()
        dtype, words = (np.uint32, longest // 2) if bits <= 10 else (np.uint64, longest)
        counts = np.bincount(example, minlength=len(examples)).tolist()
        raw = [draws.at(i, POSITIONS).bit_generator.random_raw(n * words) for i, n in enumerate(counts) if n]
        order = np.concatenate([np.zeros(0, np.uint64), *raw]).view(dtype).reshape(len(example), longest)
        low, columns = dtype((1 << bits) - 1), np.arange(longest, dtype=dtype)
        order >>= dtype(1)
        order &= ~low
        order |= columns
        if (length < longest).any():
            order[columns >= length[:, None]] = ~dtype(0)
        order.sort(axis=1)
        order &= low
        is_grid = np.array([isinstance(m, Grid) for m in modalities])[modality]
        names = modalities.names
        pairs = zip(example[is_grid].tolist(), modality[is_grid].tolist(), strict=True)
        ids = np.concatenate([np.zeros(1, np.uint8), *(examples[i][names[j]] for i, j in pairs)])
        first_id = np.where(is_grid, 1 + np.cumsum(length * is_grid) - length, -1)
        return cls(example, modality, order, inputs[example, modality], targets[example, modality], ids, first_id)

    def _picked(self, start: np.ndarray, count: np.ndarray):
        row = np.repeat(np.arange(len(count)), count)
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count - start, count)
        position = self.order[row, place].astype(int)
        first = self.first_id[row]
        ids = np.where(first < 0, place, self.ids[np.where(first < 0, 0, first + position)])
        return self.example[row], ids, self.modality[row], position

    def inputs(self):
        """(example, ids, modality, position) of every input."""
        return self._picked(np.zeros_like(self.num_inputs), self.num_inputs)

    def targets(self):
        """(example, ids, previous, modality, position) of every target."""
        example, ids, modality, position = self._picked(self.num_inputs, self.num_targets)
        return example, ids, np.full(len(ids), -1), modality, position

    def features(self, examples, modalities: Modalities, num_inputs: int) -> dict[str, np.ndarray]:
        """The picked vectors as they are stored, [B K F] with K = the most that can be picked, zeros behind them."""
        features = {}
        for j, m in enumerate(modalities):
            if isinstance(m, Features):
                out = np.empty((len(examples), min(m.max_tokens, num_inputs), m.size), m.dtype)
                counts = np.zeros(len(examples), int)
                rows = np.flatnonzero(self.modality == j)
                counts[self.example[rows]] = self.num_inputs[rows]
                for row, i in zip(rows.tolist(), self.example[rows].tolist(), strict=True):
                    count = counts[i]
                    examples[i][m.name].take(self.order[row, :count], axis=0, out=out[i, :count], mode="clip")
                for i, count in enumerate(counts.tolist()):
                    out[i, count:] = 0
                features[m.name] = out
        return features


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
    return *packed, np.zeros((num_examples, length), np.int32), np.arange(length) < filled[:, None]
