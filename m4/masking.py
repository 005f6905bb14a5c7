"""Chooses which tokens of an example go in and which must come out: pure functions of (example, random generator).

4M (Mizrahi et al. 2023, section 2.2): a strategy is drawn from a mixture; a symmetric or skewed Dirichlet splits the
input slots, then the target slots, over the modalities; grids give uniformly random positions, sequences give spans.

    grid       . I . T I . T .          I input, T target, . neither: positions are drawn without replacement
    sequence   a b c d e f $            the tokens, $ = end
      kept     a     d     $
      input    a S1  d S2  $            one sentinel for each masked span
      target   S1 b c S2 e f S3         the decoder reads all but the last token and predicts all but the first

What a modality cannot use of its share (it has fewer tokens, or they are already inputs) goes to the others that the
strategy allows, so that slots stay empty only when nothing is left to put into them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from m4.modality import Features, Grid, Modalities, Sequence, closest
from m4.tokens import MaskedBatch, Targets, Tokens, pad


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """Dirichlet concentrations by modality name; a modality that is not named is never picked.

    A large value (1000) against small ones gives a modality nearly all slots; 0.5 everywhere gives varied subsets.
    `keep` says how much of a sequence that goes in is kept: a random share, all of it, or all or nothing.
    `input_share` bounds the share of the input slots that is used, drawn uniformly for each example: parallel decoding
    of a grid needs to have seen few known tokens as well as many.
    """

    inputs: Mapping[str, float]
    targets: Mapping[str, float]
    weight: float = 1.0
    keep: Literal["random", "all", "binary"] = "random"
    input_share: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self):
        low, high = self.input_share
        if not 0 <= low <= high <= 1:
            raise ValueError(f"input_share={self.input_share} must be two rising numbers within [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """Static numbers of slots, and the mixture of strategies that fills them."""

    num_inputs: int = 128
    num_targets: int = 128
    strategies: tuple[Strategy, ...]

    def check(self, modalities: Modalities) -> None:
        """Raises ValueError for unknown names, continuous targets, and weights or budgets that are not positive."""
        if self.num_inputs < 1 or self.num_targets < 1:
            raise ValueError(f"num_inputs={self.num_inputs} and num_targets={self.num_targets} must be at least 1")
        if (
            not self.strategies
            or any(s.weight < 0 for s in self.strategies)
            or not sum(s.weight for s in self.strategies)
        ):
            raise ValueError("masking needs strategies with weights >= 0, one of them positive")
        readable = [m.name for m in modalities if m.is_input]
        predictable = [m.name for m in modalities if m.is_target]
        for strategy in self.strategies:
            for names, allowed in ((strategy.inputs, readable), (strategy.targets, predictable)):
                for name, alpha in names.items():
                    if name not in allowed:
                        raise ValueError(f"masking names modality {name!r}; {closest(name, allowed)}")
                    if not alpha > 0:
                        raise ValueError(f"masking gives {name!r} concentration {alpha}; it must be positive")

    def __call__(self, example: Mapping[str, np.ndarray], modalities: Modalities, rng: np.random.Generator):
        """One example's tokens by modality name -> MaskedBatch without the batch axis."""
        weights = np.array([s.weight for s in self.strategies])
        strategy = self.strategies[rng.choice(len(self.strategies), p=weights / weights.sum())]
        pick = _Picker(example, modalities, rng)
        present = [n for n in strategy.inputs if n in example]
        capacity = np.array([pick.available(n) for n in present], int)
        num_inputs = round(self.num_inputs * rng.uniform(*strategy.input_share))
        for name, budget in zip(present, _split(strategy.inputs, present, capacity, num_inputs, rng), strict=True):
            pick.inputs(name, int(budget), strategy.keep)
        present = [n for n in strategy.targets if n in example]
        capacity = np.array([pick.remaining(n) for n in present], int)
        for name, budget in zip(
            present, _split(strategy.targets, present, capacity, self.num_targets, rng), strict=True
        ):
            pick.targets(name, int(budget))
        return pick.pack(self.num_inputs, self.num_targets)


def _split(alphas: Mapping[str, float], names: list[str], capacity: np.ndarray, total: int, rng: np.random.Generator):
    """Splits `total` slots over `names` by one Dirichlet draw, none above its capacity: int [len(names)].

    Shares over capacity are handed on in proportion to the draw of the others, until all is placed or all is full.
    """
    budget = np.zeros(len(names), int)
    if not names:
        return budget
    share = rng.dirichlet([alphas[n] for n in names]) + 1e-9
    left = min(total, int(capacity.sum()))
    while left:
        open_share = np.where(budget < capacity, share, 0)
        wanted = left * open_share / open_share.sum()
        add = np.floor(wanted).astype(int)
        # The rounding remainder goes to modalities drawn by their fractional part.
        rest = left - add.sum()
        if rest:
            fraction = wanted - add + 1e-12 * (open_share > 0)
            add += rng.multinomial(rest, fraction / fraction.sum())
        add = np.minimum(add, capacity - budget)
        budget += add
        left -= int(add.sum())
    return budget


def mask_spans(ids: np.ndarray, masked: np.ndarray, first_sentinel: int) -> tuple[np.ndarray, np.ndarray]:
    """Replaces masked spans by sentinels: (input ids, target ids), both int32 [*]; see the drawing above.

    Nothing masked: the target is the single opening sentinel, which leaves the decoder nothing to predict.
    """
    starts = masked & ~np.concatenate([[False], masked[:-1]])
    sentinel = first_sentinel + np.cumsum(starts) - 1
    inputs = np.where(starts, sentinel, ids)[starts | ~masked]
    insert_at = np.flatnonzero(starts[masked])
    targets = np.insert(ids[masked], insert_at, sentinel[starts])
    return inputs.astype(np.int32), np.append(targets, first_sentinel + starts.sum()).astype(np.int32)


class _Picker:
    """Collects the picked tokens of one example."""

    def __init__(self, example: Mapping[str, np.ndarray], modalities: Modalities, rng: np.random.Generator):
        self.example, self.modalities, self.rng = example, modalities, rng
        self.order: dict[str, np.ndarray] = {}  # shuffled positions of a grid: inputs come first, targets next
        self.num_inputs: dict[str, int] = {}
        self.spans: dict[str, np.ndarray] = {}  # target spans of a sequence
        self.input_rows: list[tuple[np.ndarray, ...]] = []
        self.target_rows: list[tuple[np.ndarray, ...]] = []
        self.features = {}

    def available(self, name: str) -> int:
        return len(self.example[name])

    def inputs(self, name: str, budget: int, keep: str) -> None:
        if not budget:
            return
        modality, stored = self.modalities.named(name), self.example[name]
        if isinstance(modality, Sequence):
            ids, self.spans[name] = self._spans(modality, stored, budget, keep)
            position = np.arange(len(ids))
        else:
            self.order[name] = self.rng.permutation(len(stored))
            position = self.order[name][:budget]
            ids = np.arange(budget) if isinstance(modality, Features) else stored[position]
            if isinstance(modality, Features):
                self.features[name] = modality.normalize(stored[position])
        self.num_inputs[name] = len(ids)
        self.input_rows.append((ids, np.full(len(ids), self.modalities.index(name)), position))

    def _spans(self, modality: Sequence, ids: np.ndarray, budget: int, keep: str):
        """Lowers the share of kept tokens until the input fits its budget and the spans their sentinels."""
        share = {"random": self.rng.random(), "all": 1.0, "binary": float(self.rng.integers(2))}[keep]
        while True:
            masked = self.rng.random(len(ids)) > share
            inputs, targets = mask_spans(ids, masked, modality.first_sentinel)
            if len(inputs) <= budget and len(targets) - masked.sum() <= modality.num_sentinels:
                return inputs, targets
            share = share * 0.9 if share > 0.01 else 0.0

    def remaining(self, name: str) -> int:
        """Decoder slots that the modality could still fill."""
        modality, stored = self.modalities.named(name), self.example[name]
        if isinstance(modality, Grid):
            return len(stored) - (self.num_inputs[name] if name in self.num_inputs else 0)
        if name not in self.spans:
            self.spans[name] = mask_spans(stored, np.ones(len(stored), bool), modality.first_sentinel)[1]
        return len(self.spans[name]) - 1

    def targets(self, name: str, budget: int) -> None:
        if not budget:
            return
        modality, stored = self.modalities.named(name), self.example[name]
        if isinstance(modality, Grid):
            if name not in self.order:
                self.order[name] = self.rng.permutation(len(stored))
            first = self.num_inputs[name] if name in self.num_inputs else 0
            position = self.order[name][first : first + budget]
            ids, previous = stored[position], np.full(len(position), -1)
        else:
            spans = self._cut(modality, self.spans[name], budget)
            ids, previous, position = spans[1:], spans[:-1], np.arange(len(spans) - 1)
        self.target_rows.append((ids, previous, np.full(len(ids), self.modalities.index(name)), position))

    def _cut(self, modality: Sequence, spans: np.ndarray, budget: int) -> np.ndarray:
        """At most budget + 1 tokens, beginning with the sentinel of a randomly chosen span."""
        if len(spans) <= budget + 1:
            return spans
        is_sentinel = (spans >= modality.first_sentinel) & (spans < modality.first_sentinel + modality.num_sentinels)
        starts = np.flatnonzero(is_sentinel)
        start = starts[self.rng.integers(max(1, len(starts) - 1))]
        if len(spans) - start <= budget:  # an earlier start uses the whole budget
            start = starts[np.argmax(len(spans) - starts <= budget + 1)]
        return spans[start : start + budget + 1]

    def pack(self, num_inputs: int, num_targets: int) -> MaskedBatch:
        def stack(rows, length, num_columns):
            columns = [pad([row[c] for row in rows], length) for c in range(num_columns)]
            return columns, np.zeros(length, np.int32), np.arange(length) < sum(len(row[0]) for row in rows)

        (ids, modality, position), shot, valid = stack(self.input_rows, num_inputs, 3)
        inputs = Tokens(ids, modality, position, shot, valid)
        (ids, previous, modality, position), shot, valid = stack(self.target_rows, num_targets, 4)
        targets = Targets(ids, previous, modality, position, shot, valid)
        features = {}
        for modality in self.modalities:
            if isinstance(modality, Features):
                features[modality.name] = np.zeros((min(modality.max_tokens, num_inputs), modality.size), np.float32)
                if modality.name in self.features:
                    features[modality.name][: len(self.features[modality.name])] = self.features[modality.name]
        return MaskedBatch(inputs, targets, features)
