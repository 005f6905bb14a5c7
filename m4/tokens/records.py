"""Raw examples -> records: the stored array of every modality that an example has."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from m4.files import shown
from m4.tokens.modality import Features, Grid, Modality, Sequence
from m4.tokens.tokenizer import Tokenizer


def encode(examples: Seq[dict[str, Any]], tokenizers: Mapping[str, Tokenizer]) -> list[dict[str, np.ndarray]]:
    """Raw examples -> stored arrays by modality. ValueErrors name the example's file.

    A 1-D array of integers under a modality's own name is taken as its ids. A modality whose signal an example lacks
    is left out of its record, which must have at least one. The crop, if any, is stored too.
    """
    records: list[dict[str, np.ndarray]] = [{"crop": e["crop"]} if "crop" in e else {} for e in examples]
    for name, tokenizer in tokenizers.items():
        signals: list[tuple[int, Any]] = []
        for i, example in enumerate(examples):
            with _naming(example, name):
                if is_tokenized(example, tokenizer.modality):
                    records[i][name] = _given(example[name], tokenizer.modality)
                elif (signal := tokenizer.signal_of(example)) is not None:
                    signals.append((i, signal))
        encoded = []
        with _naming(examples[signals[0][0]] if len(signals) == 1 else {}, name):
            encoded = tokenizer.encode([signal for _, signal in signals]) if signals else []
        for (i, _), stored in zip(signals, encoded, strict=True):
            with _naming(examples[i], name):
                records[i][name] = compact(stored, tokenizer.modality)
    for example, record in zip(examples, records, strict=True):
        with _naming(example, ""):
            if not record.keys() - {"crop"}:
                raise ValueError(f"has none of {', '.join(tokenizers)}, but: {', '.join(example) or 'nothing'}")
    return records


@contextlib.contextmanager
def _naming(example: Mapping[str, Any], modality: str):
    try:
        yield
    except Exception as error:
        raise named_error(error, name_of(example, "id", "file"), modality) from error


def name_of(example: Mapping[str, Any], *keys: str) -> str:
    """The name of an example in errors: the first of these keys that it has; "" if it has none."""
    return next((str(example[key]) for key in keys if key in example), "")


def named_error(error: Exception, *names: str) -> ValueError:
    """The error with `names` in front, those that its text lacks; in printable characters."""
    text = shown(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
    prefixes = [shown(name) for name in names]
    return ValueError(": ".join([*(name for name in prefixes if name and name not in text), text]))


def is_tokenized(example: Mapping[str, Any], modality: Modality) -> bool:
    if modality.name not in example or isinstance(modality, Features):
        return False
    value = example[modality.name]
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return True
    if modality.name != modality.signal:
        kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{modality.name} must be a 1-D array of integers (token ids), not {kind}")
    return False


def _given(ids: np.ndarray, modality: Modality) -> np.ndarray:
    """Ids from elsewhere, compact. ValueError if they cannot be this modality's."""
    if isinstance(modality, Sequence) and len(ids):
        last_sentinel = modality.first_sentinel + modality.num_sentinels - 1
        if ((ids >= modality.first_sentinel) & (ids <= last_sentinel)).any():
            raise ValueError(f"{modality.name}: ids {modality.first_sentinel}..{last_sentinel} are masking's sentinels")
        if ids[-1] != modality.end_id and len(ids) < modality.max_length:
            raise ValueError(f"{modality.name}: ids end in {ids[-1]}, not in [EOS] ({modality.end_id})")
    return compact(ids, modality)


def check_stored(stored: np.ndarray, modality: Modality) -> None:
    """ValueError unless an array of a record can be this modality's."""
    if isinstance(modality, Features):
        is_whole = stored.ndim == 2 and stored.shape[1] == modality.size and len(stored) <= modality.max_tokens
        if not is_whole or stored.dtype != modality.dtype:
            given, allowed = f"{stored.dtype} {list(stored.shape)}", f"[{modality.max_tokens}, {modality.size}]"
            raise ValueError(f"{modality.name}: {given} is stored, but must be {modality.dtype} {allowed}")
        if stored.dtype.kind == "f" and not np.isfinite(stored).all():
            raise ValueError(f"{modality.name}: numbers that are not finite are stored")
    elif stored.ndim != 1 or stored.dtype.kind not in "iu":
        raise ValueError(f"{modality.name}: {stored.dtype} {list(stored.shape)} is stored, but ids are integers [n]")
    else:
        _check_ids(stored, modality)


def _check_ids(stored: np.ndarray, modality: Modality) -> None:
    if len(stored) and not 0 <= stored.min() <= stored.max() < modality.vocab_size:
        raise ValueError(f"{modality.name}: ids {stored.min()}..{stored.max()} outside [0, {modality.vocab_size})")
    if isinstance(modality, Grid) and len(stored) != modality.max_tokens:
        raise ValueError(f"{modality.name}: {len(stored)} ids, the grid has {modality.max_tokens}")
    if isinstance(modality, Sequence) and not 0 < len(stored) <= modality.max_length:
        raise ValueError(f"{modality.name}: {len(stored)} ids, the sequence holds 1 to {modality.max_length}")


def compact(stored: np.ndarray, modality: Modality) -> np.ndarray:
    """Ids in the smallest unsigned type that holds the vocabulary; features as `dtype`. ValueError if not ids."""
    if isinstance(modality, Features):
        return np.ascontiguousarray(stored, modality.dtype)
    _check_ids(stored, modality)
    return np.ascontiguousarray(stored, np.min_scalar_type(modality.vocab_size - 1))
