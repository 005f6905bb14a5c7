"""Files of labelled examples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m4.data.samples import read_sample
from m4.data.sources.contents import content
from m4.data.sources.files import extension_of
from m4.files import parse_json, shown
from m4.masking.episodes import Shot, is_several, raw_examples
from m4.tokens.modality import Modalities
from m4.tokens.packing import Record
from m4.tokens.tokenizer import Tokenizer


def encode(shot: Shot, tokenizers: Mapping[str, Tokenizer], modalities: Modalities) -> list[Record]:
    """A labelled shot as the model reads it: one record for each image."""
    names = {name: modalities.as_input(name) for name in {**shot.inputs, **shot.outputs}}
    records = []
    for example in raw_examples(shot):
        record, own = {}, {name: tokenizers[names[name].name] for name in example}
        for name, value in read_sample(example, own, words_name_files=False).items():
            (record[names[name].name],) = own[name].encode([value])
        records.append(record)
    return records


def read_shots(file: Path) -> list[Shot]:
    """Labelled examples from JSON: [{"inputs": {NAME: VALUE}, "outputs": {NAME: VALUE}}, ...].

    A VALUE is text, a file's name (with an extension such as .png) beside FILE, or a list: of files, of text and
    numbers of images, or of the parts of a structured answer ({"concept": ..., "kind": ..., "target": ...}). ValueError
    for anything else.
    """
    like = '[{"inputs": {"rgb": "a.png"}, "outputs": {"caption": "a dax"}}, ...]'
    data = content(file)
    try:
        items = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{shown(file)} cannot be read: {error}; it should hold {like}") from error
    if not isinstance(items, list) or not items:
        raise ValueError(f"{file} must hold a list of examples, such as {like}")
    shots = []
    for number, item in enumerate(items, 1):
        given = set(item) if isinstance(item, dict) else set()
        if given != {"inputs", "outputs"} or not all(isinstance(v, dict) and v for v in item.values()):
            raise ValueError(f"{file}, example {number} must have inputs and outputs by name, such as {like}: {item!r}")
        shots.append(Shot(**{kind: {n: _value(v, file) for n, v in item[kind].items()} for kind in item}))
    return shots


def _value(value: Any, file: Path) -> Any:
    if isinstance(value, list) and value and not is_several(value):
        return value
    if isinstance(value, list) and any(isinstance(v, int) for v in value):
        return tuple(value)
    if isinstance(value, list):
        return [_value(v, file) for v in value]
    if not isinstance(value, str):
        raise ValueError(f"{file}: {value!r} must be text, a file's name, or a list of them")
    beside = file.parent / value
    return beside if extension_of(value) and os.path.isfile(beside) else value
