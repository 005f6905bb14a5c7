"""Span masking of sequences (T5, Raffel et al. 2020): spans become sentinels, and the target lists what they hid."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from m4.masking.draws import NUM_TRIES, SPANS, Draws
from m4.tokens.modality import Modalities, Sequence


def mask_spans(ids: np.ndarray, masked: np.ndarray, first_sentinel: int) -> tuple[np.ndarray, np.ndarray]:
    """Replaces masked spans by sentinels: (input ids, target ids), both int32 [*]; m4.masking.dirichlet draws them.

    Nothing masked: the target is the single opening sentinel, which leaves the decoder nothing to predict.
    """
    one = np.zeros(1, int)
    spans = Spans(one, one, ids[None], np.ones((1, len(ids)), bool), masked[None], one + first_sentinel)
    _, inputs, _, _ = spans.inputs(np.full((1, 1), len(ids)))
    _, targets, _, _, _ = spans.targets(np.full((1, 1), 2 * len(ids) + 1), np.zeros((1, 1)))
    return inputs.astype(np.int32), np.append(first_sentinel, targets).astype(np.int32)


@dataclasses.dataclass
class Spans:
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
    def of(cls, examples, modalities: Modalities, lengths, budgets, keep, uniform, draws: Draws) -> Spans:
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
        # 4M's scheme: masks are drawn with ever smaller shares of kept tokens until one fits its budget.
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
            some_fits, first = fits.any(1), fits.argmax(1)
            masked[active[some_fits]] = tries[some_fits, first[some_fits]]
            active, attempt = active[~some_fits], attempt + 1
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
        after it, at the first sentinel of which that is true, as in 4M, for ends to be targets too.
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
