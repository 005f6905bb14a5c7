"""Samples for `python -m m4 generate`, from --inputs: folders paired by name, files, texts, or a table of prompts."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

from m4.data.samples import file_of
from m4.data.sources.contents import content
from m4.files import check_name, parse_json, shown

logger = logging.getLogger(__name__)

MAX_TABLE = 2**28  # bytes of a table of prompts
TAKEN = ("failed.tsv", "sheet.png")  # files beside the samples' folders
LIKE = '{"rgb": "photo.png", "caption": "a cat"}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample to generate from.

    `name`: that of its folder of results, safe in a path and unique. `values`: by input, a Path of a file, or a str
    that names one or is the signal itself (m4.data.samples.file_of). `error`: why there are no values (a line of a
    table that cannot be read).
    """

    name: str
    values: Mapping[str, str | Path]
    error: str = ""


def pair(flag: str, item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise ValueError(f"{flag} takes NAME=VALUE, got {item!r}")
    return name, value


def read_inputs(items: Seq[str]) -> tuple[list[Sample], Path | None]:
    """Samples, and the table from which they come, if any.

    A folder has one sample a file; several folders are paired by the names of their files without extensions, and
    single values are in every sample. ValueError names what has no partner.
    """
    tables = [i for i in items if i.endswith(".jsonl") and "=" not in i]
    if tables and len(items) > 1:
        raise ValueError(f"--inputs takes one .jsonl file or NAME=VALUE ..., not both: {' '.join(items)}")
    if tables:
        return _table(Path(tables[0])), Path(tables[0])
    singles: dict[str, str] = {}
    folders: dict[str, dict[str, list[Path]]] = {}
    for item in items:
        name, value = pair("--inputs", item)
        if name in singles or name in folders:
            raise ValueError(f"input {name!r} is given twice; a folder holds several samples, {name}#x a second one")
        if value and os.path.isdir(value):
            folders[name] = _by_stem(name, value)
        else:
            singles[name] = value
    if not folders:
        first = next(iter(singles.values()))
        (name,) = sample_names([Path(first).stem if os.path.isfile(first) else ""])
        return [Sample(name=name, values=singles)], None
    stems, rows = _one_folder(*folders.items()) if len(folders) == 1 else _paired(folders, items)
    order = [pair("--inputs", item)[0] for item in items]
    rows = [{name: row[name] if name in row else singles[name] for name in order} for row in rows]
    return [Sample(name=n, values=row) for n, row in zip(sample_names(stems), rows, strict=True)], None


def beside(samples: Seq[Sample], table: Path, kinds: Mapping[str, str]) -> list[Sample]:
    """Files that a table names: those beside the table, else those of the working folder.

    `kinds`: by input, what its tokenizer reads (m4.data.samples.kind_of). Samples are named by the stems of the files
    that differ from line to line, if every line has such a file.
    """

    def find(name: str, value: str | Path) -> str | Path:
        file = file_of(value, kinds[name], table.parent, notice=False)
        return file if file is not None and os.path.isfile(file) else value

    rows = [{name: find(name, value) for name, value in s.values.items()} for s in samples]
    filled = [row for row in rows if row]
    stems_of = lambda name: [_stem_of_file(row[name], kinds[name]) if name in row else "" for row in filled]  # noqa: E731
    stems = max((stems_of(name) for name in filled[0]), key=lambda column: len(set(column)))
    if all(stems) and len(set(stems)) == len(stems):
        remaining = iter(stems)
        names = sample_names([next(remaining) if row else "" for row in rows])
    else:
        names = sample_names([""] * len(rows))
    return [dataclasses.replace(s, name=n, values=row) for s, n, row in zip(samples, names, rows, strict=True)]


def _stem_of_file(value: str | Path, kind: str) -> str:
    file = file_of(value, kind, notice=False)
    return file.stem if file is not None else ""


# ---- Folders --------------------------------------------------------------------------------------------------------


def _by_stem(name: str, folder: str) -> dict[str, list[Path]]:
    """A folder's files, sorted, by their names without extension. Reading refuses those that are no regular files."""
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    subfolders = [shown(e.name) for e in visible if os.path.isdir(e.path)]
    if subfolders:
        some = ", ".join(subfolders[:5])
        logger.warning(f"input {name}={shown(folder)}: {len(subfolders)} folder(s) in it are not read: {some}")
    files = collections.defaultdict(list)
    for entry in visible:
        if not os.path.isdir(entry.path):
            files[Path(entry.name).stem].append(Path(entry.path))
    if not files:
        raise ValueError(f"input {name}={shown(folder)} is an empty folder")
    return dict(files)


def _one_folder(item: tuple[str, dict[str, list[Path]]]) -> tuple[list[str], list[dict[str, Path]]]:
    """A sample for each file, by its whole name where another has the same without extension."""
    name, files = item
    named = [(stem if len(paths) == 1 else p.name, p) for stem, paths in files.items() for p in paths]
    return [stem for stem, _ in named], [{name: path} for _, path in named]


def _paired(
    folders: Mapping[str, Mapping[str, list[Path]]], items: Seq[str]
) -> tuple[list[str], list[dict[str, Path]]]:
    """A sample for each stem, which every folder must have once."""
    for name, files in folders.items():
        for paths in files.values():
            if len(paths) > 1:
                both = " and ".join(shown(p) for p in paths)
                raise ValueError(f"input {name!r} has two files of one name, {both}; files are paired by their names")
    union = dict.fromkeys(stem for files in folders.values() for stem in files)
    lacks = {name: [stem for stem in union if stem not in files] for name, files in folders.items()}
    if any(lacks.values()):
        given = dict(pair("--inputs", item) for item in items)
        problems = []
        for name, missing in lacks.items():
            some = ", ".join(_missing_stem(stem, folders, name) for stem in missing[:5])
            more = f", and {len(missing) - 5} more" if len(missing) > 5 else ""
            problems += [f"{name}={shown(given[name])} lacks {some}{more}"] if missing else []
        raise ValueError(f"files of several folders are paired by their names: {'; '.join(problems)}")
    return list(union), [{name: files[stem][0] for name, files in folders.items()} for stem in union]


def _missing_stem(stem: str, folders: Mapping[str, Mapping[str, list[Path]]], name: str) -> str:
    """A stem that a folder lacks, with a file that has it, and a stem that differs only in case or Unicode form."""
    file = next(files[stem][0] for files in folders.values() if stem in files)
    form = lambda text: unicodedata.normalize("NFC", text)  # noqa: E731
    near = [other for other in folders[name] if form(other).casefold() == form(stem).casefold()]
    if not near:
        return f"{shown(stem)} ({shown(file)})"
    how = "Unicode form" if form(stem) == form(near[0]) else "case"
    return f"{ascii(stem)} ({shown(file)}; it has {ascii(near[0])}, another {how}: rename one)"


# ---- Tables ---------------------------------------------------------------------------------------------------------


def _table(file: Path) -> list[Sample]:
    """One sample a line, numbered. A line that cannot be read becomes a sample with an error."""
    rows, errors = [], []
    for number, line in enumerate(content(file, max_bytes=MAX_TABLE).splitlines(), 1):
        if line.strip():
            try:
                rows.append(_row(line))
                errors.append("")
            except ValueError as error:
                rows.append({})
                errors.append(f"{shown(file)}, line {number}: {error}")
    if not rows:
        raise ValueError(f"{shown(file)} is empty; its lines must be like {LIKE}")
    if all(errors):
        raise ValueError(errors[0])
    names = sample_names([""] * len(rows))
    return [Sample(name=n, values=row, error=e) for n, row, e in zip(names, rows, errors, strict=True)]


def _row(line: bytes) -> dict[str, str]:
    row = parse_json(line)
    if not isinstance(row, dict) or not row or not all(isinstance(v, str) for v in row.values()):
        raise ValueError(f"a line must be like {LIKE}, not {ascii(row)[:60]}")
    return row


# ---- Names ----------------------------------------------------------------------------------------------------------


def sample_names(stems: Seq[str]) -> list[str]:
    """A safe and unique folder's name for each sample: its stem, or for the stem "" its index, 0000, 0001, ...

    A safe stem stays unchanged, unless it is `TAKEN`; in others unsafe letters become _, and a suffix -2, -3, ...
    tells equal names apart.
    """
    names = [_safe(stem) if stem else f"{i:04d}" for i, stem in enumerate(stems)]
    unchanged = {stem: i for i, stem in reversed([*enumerate(stems)]) if stem == names[i]}
    taken = {*unchanged}
    for i, name in enumerate(names):
        if name in unchanged and unchanged[name] == i:
            continue
        number = 2
        while names[i] in taken:
            names[i], number = f"{name}-{number}", number + 1
        taken.add(names[i])
    return names


def _safe(stem: str) -> str:
    name = "".join(c if c.isalnum() or c in "_.-@+" or unicodedata.category(c) in ("Mn", "Mc") else "_" for c in stem)
    name = re.sub(r"^\.", "_", name)
    if len(name.encode()) > 160:
        name = f"{name.encode()[:120].decode(errors='ignore')}-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:12]}"
    try:
        check_name(name, "a sample")
    except ValueError:
        return f"_{name}"
    return f"_{name}" if name.casefold() in TAKEN else name
