"""From records (stored arrays by modality) to what a stage reads: packed rows, spans, fixed tokens.

B rows, P passes of guidance, N context slots, n tokens of the target, K vectors of F values
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from m4.errors import closest
from m4.inference.guidance import Guidance
from m4.inference.scheme import Prompt, Stage
from m4.tokens.batch import Tokens
from m4.tokens.modality import Features, Grid, Modalities, Modality, Sequence
from m4.tokens.packing import Packed, Record, pack, stack
from m4.tokens.spans import show_spans
from m4.tokens.tokenizer import Tokenizer

MASK = "[MASK]"  # in a text: a gap of any length that is to be generated
BUCKET = 16  # prompts are padded to a multiple of this length, so that few lengths are compiled


def check_plan(stages: Seq[Stage], inputs: Seq[str], modalities: Modalities, kept: Seq[str] = ()) -> None:
    """ValueError for unknown or repeated names, input-only targets, schemes that do not fit, guidance by nothing.

    `kept`: signals that are given in part, and must be targets too. A signal that is given may be a target by the name
    of another modality (a finer grid of it: super-resolution).
    """
    given = [modalities.as_input(name.partition("#")[0]) for name in inputs]
    partial = {modalities.as_target(name).name for name in kept}
    taken = {m.name for m in given} | {m.signal for m in given}
    names = [n for name, m in zip(inputs, given, strict=True) for n in dict.fromkeys((name, m.name))]
    if not stages:
        raise ValueError(f"no targets given; allowed: {', '.join(modalities.signals)}")
    for stage in stages:
        if not isinstance(stage.target, str) or not hasattr(stage.scheme, "check"):
            raise ValueError(f"{stage} needs a target's name and a scheme such as MaskGIT")
        if not isinstance(stage.guidance, Guidance | None):
            raise ValueError(f"guidance of {stage.target} is {stage.guidance!r}; allowed: a Guidance, or None")
        modality = modalities.as_target(stage.target)
        stage.scheme.check(modality)
        if stage.target in taken and modality.name not in partial:
            raise ValueError(f"{stage.target!r} is already given or generated; each signal may appear once")
        if not isinstance(stage.ensemble, int) or stage.ensemble < 1:
            raise ValueError(f"ensemble={stage.ensemble} of {stage.target} must be at least 1")
        g = stage.guidance
        for name in () if g is None else g.drop or ([n for n, _ in g.scale] if isinstance(g.scale, tuple) else ()):
            if name not in names:
                raise ValueError(f"guidance of {stage.target} names {name!r}; {closest(name, names)}")
        taken |= {modality.name, modality.signal}
        partial.discard(modality.name)
        names += [stage.target, modality.name]
    if partial:
        raise ValueError(f"{', '.join(sorted(partial))} is given in part, to be completed, but is no target")


def token_mask(mask: Any, m: Grid | Features, rng: np.random.Generator) -> Bool[np.ndarray, " n"]:
    """Fixed tokens: those of which all pixels are fixed, or a random share."""
    if isinstance(mask, numbers.Real) and not isinstance(mask, bool | np.bool_):
        if not 0 <= mask <= 1:
            raise ValueError(f"keep={mask} of {m.name} must be a share within [0, 1]")
        return rng.permutation(m.max_tokens) < round(mask * m.max_tokens)
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != len(m.shape) or any(a % b for a, b in zip(mask.shape, m.shape, strict=True)):
        raise ValueError(
            f"a mask of {mask.dtype} {list(mask.shape)} was given for {m.name}; allowed: bool, a multiple of "
            f"{list(m.shape)}, True where it stays"
        )
    blocks = [n for a, b in zip(mask.shape, m.shape, strict=True) for n in (b, a // b)]
    return mask.reshape(blocks).all(axis=tuple(range(1, len(blocks), 2))).ravel()


class BadSamples(ValueError):
    """Samples that cannot be encoded. `errors`: by a sample's index in the lists, its input and what is wrong."""

    def __init__(self, errors: Mapping[int, tuple[str, str]], count: int):
        first = min(errors)
        name, message = errors[first]
        more = f" (and {len(errors) - 1} more of {count} samples)" if len(errors) > 1 else ""
        super().__init__(f"{name}: {message}" if count == 1 else f"sample {first}, {name}: {message}{more}")
        self.errors = dict(errors)


def reason(error: Exception) -> str:
    """What is wrong with a sample. Foreign decoders and encoders meet bad input with errors of nearly every kind."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def encode_each(tokenizer: Tokenizer, signals: Seq[Any]) -> tuple[list[np.ndarray], dict[int, str]]:
    """Stored arrays of signals. If a batch fails, each signal is tried alone: no arrays, and what is wrong by index."""
    try:
        return tokenizer.encode(signals), {}
    except Exception:
        errors = {}
        for i, signal in enumerate(signals):
            try:
                tokenizer.encode([signal])
            except Exception as error:
                errors[i] = reason(error)
        if not errors:  # no single signal is at fault
            raise
        return [], errors


class Context(NamedTuple):
    """What is read beside a record: further images of its example, each an item of its own, and labelled examples."""

    others: tuple[Record, ...] = ()
    shots: Packed = Packed.nothing()


def in_buckets(rows: Seq[Packed], modalities: Modalities) -> tuple[Tokens, dict[str, np.ndarray]]:
    """Rows padded to a multiple of `BUCKET`; features float32, normalised."""
    round_up = lambda count: max(-(-count // BUCKET) * BUCKET, 1)  # noqa: E731
    length = round_up(max(row.columns.shape[1] for row in rows))
    num_vectors = round_up(max([0, *(len(x) for row in rows for x in row.features.values())]))
    inputs, features = stack(rows, modalities, length, num_vectors)
    kinds = {m.name: m for m in modalities if isinstance(m, Features)}
    return inputs, {name: kinds[name].normalize(x) for name, x in features.items()}


def make_prompt(
    records: Seq[Mapping[str, np.ndarray]], partial: Seq[np.ndarray | None], modality: Modality,
    modalities: Modalities, guidance: Guidance | None = None, generated: Seq[str] = (), grammar: Any = None,
    contexts: Seq[Context] | None = None,
) -> Prompt:  # fmt: skip
    """What a stage reads: records by modality (or modality#tag), and the target's given tokens (`partial`), if any.

    `generated`: names of signals that earlier stages generated. `contexts`: for each record, what every pass reads too.
    """
    names = list(dict.fromkeys(n for r in records for n in r))
    tagged = {n for n in names if "#" in n}
    dropped_by_pass = [tagged]
    if guidance is not None:
        key_of = lambda name: _key(name, modalities, names)  # noqa: E731
        dropped_by_pass = guidance.passes([n for n in names if n not in generated], generated, key_of)
    drops_to_sentinel = guidance is not None and guidance.dropped_sequences == "masked"
    rows, num_spans, has_fixed, open_end, given = [], [], [], [], []
    contexts = contexts or [Context()] * len(records)
    for record, part, query in zip(records, partial, contexts, strict=True):
        # Fixed tokens of a sequence are inputs, with a sentinel for each span to generate; a grid's are in `given`.
        own = {}
        if isinstance(modality, Sequence):
            spans, opened = 1, True
            if part is not None:
                own[modality.name], spans, opened = show_spans(part, modality)
            num_spans.append(spans)
            has_fixed.append(part is not None and bool((part >= 0).any()))
            open_end.append(opened)
        given.append(part if part is not None and isinstance(modality, Grid) else np.full(modality.max_tokens, -1))
        for dropped in dropped_by_pass:
            row = {name: ids for name, ids in record.items() if name not in dropped}
            for name in [n for n in record if n in dropped and drops_to_sentinel and n not in tagged]:
                if isinstance(m := modalities.named(name), Sequence):
                    row[name] = np.array([m.first_sentinel])
            packed = pack([{**row, **own}, *query.others], range(1 + len(query.others)), modalities)
            rows.append(Packed.join([packed, query.shots], modalities))
    inputs, features = in_buckets(rows, modalities)
    zeros = np.zeros(len(records), np.int32)
    return Prompt(
        Tokens(*(x.reshape(len(records), len(dropped_by_pass), -1) for x in inputs)),
        {name: x.reshape(len(records), len(dropped_by_pass), *x.shape[1:]) for name, x in features.items()},
        np.stack(given).astype(np.int32),
        np.array(num_spans or zeros, np.int32), np.array(has_fixed or zeros, bool), np.array(open_end or zeros, bool),
        grammar,
    )  # fmt: skip


def _key(name: str, modalities: Modalities, present: Seq[str]) -> str:
    """A record's name for what users call `name`: an input or an earlier target, perhaps with a tag."""
    base, hash_, tag = name.partition("#")
    candidates = [modalities.as_input(base).name]
    candidates += [m.name for m in modalities if m.signal == base]
    return next((n for n in (c + hash_ + tag for c in candidates) if n in present), candidates[0] + hash_ + tag)
