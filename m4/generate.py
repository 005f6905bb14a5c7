"""`python -m m4 generate`: files, folders, tables of prompts in; a folder for each sample and a contact sheet out."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Container, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from m4.datasets.files import ALIGNED
from m4.files import write_atomically
from m4.in_context import answer
from m4.modality import Sequence
from m4.pictures import contact_sheet, write_png
from m4.prompts import MASK, check_plan, trim
from m4.sampler import Results, Sampler, Stage, default_scheme, keep_compiled
from m4.samples import fit_mask, kind_of, load_mask, read_mask
from m4.sampling import Autoregressive, Guidance
from m4.shots import Shot, read_shots

FLAGS = ("steps", "temperature", "top_k", "top_p", "min_p", "schedule")  # fields of schemes that flags set
SHEET_ROWS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the folder of a run, e.g. runs/quickstart, or a model that comes with m4")
    parser.add_argument("--inputs", nargs="+", required=True, metavar="NAME=VALUE", help="or PROMPTS.jsonl")
    parser.add_argument("--targets", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--plan", default="", metavar="FILE.py", help="a Python file: plan = [Stage(...), ...]")
    parser.add_argument("--out", required=True, help="folder for the results: OUT/<sample>/rgb.png, depth.png, ...")
    parser.add_argument("--keep", nargs="+", default=[], metavar="NAME=MASK", help="what stays of an input that is a "
                        "target too: a picture, white = stays, or a share (rgb=0.5: variations)")  # fmt: skip
    like = '[{"inputs": {"rgb": "a.png"}, "outputs": {"caption": "a dax"}}, ...]'
    parser.add_argument("--shots", default="", metavar="FILE.json", help=f"labelled examples of a task: {like}")
    parser.add_argument("--shot-tokens", type=int, default=0, help="of each image of --shots (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same results (default: 0)")
    parser.add_argument("--num-samples", type=int, default=1, help="results for each input (different draws)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--scheme", choices=["maskgit", "roar"], help="of grids (default: maskgit)")
    parser.add_argument("--steps", type=int, help="of grids")
    parser.add_argument("--schedule", choices=["maskgit", "cosine", "linear"], help="tokens by step")
    parser.add_argument("--temperature", type=float, help="0: the most likely token")
    parser.add_argument("--top-k", type=float, help="draw among the k most likely tokens; below 1: a share of all")
    parser.add_argument("--top-p", type=float, help="draw among the tokens that hold this probability")
    parser.add_argument("--min-p", type=float, help="draw among tokens at least so likely relative to the likeliest")
    parser.add_argument(
        "--guidance", nargs="+", metavar="SCALE", help="classifier-free: one number, or NAME=WEIGHT ..."
    )
    parser.add_argument("--ensemble", type=int, default=1, help="samples to average, for dense outputs")
    parser.add_argument("--pad", action="store_true", help="pad pictures to a square instead of cropping them")
    parser.add_argument("--with-inputs", action="store_true", help="write inputs, too, to train on what was generated")
    parser.add_argument("--stream", action="store_true", help="print text as it comes (one sample)")


def main(args: argparse.Namespace) -> None:
    for flag in ("num_samples", "batch_size", "ensemble"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1")
    rows = _rows(args.inputs)
    names = list(dict.fromkeys(n for row in rows for n in row))
    keep_compiled()
    sampler = Sampler.load(args.run, batch_size=args.batch_size)
    stages = _stages(args, sampler)
    shots = read_shots(Path(args.shots)) if args.shots else []
    keep = dict(_pair("--keep", item) for item in args.keep)
    masked = {n for row in rows for n, v in row.items() if MASK in v}
    # With examples of a task, an input text that is asked for is a question.
    asked = {n for n in names if shots and sampler.modalities.as_input(n).signal == stages[0].target}
    check_plan(stages, [n for n in names if n not in asked], sampler.modalities, [*keep, *masked])
    if shots and (len(stages) > 1 or keep or masked or args.stream):
        raise ValueError("--shots takes one target, and neither --keep, --stream nor [MASK]")
    if args.stream and len(rows) * args.num_samples > 1:
        raise ValueError(f"--stream prints one sample, and there are {len(rows) * args.num_samples}")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write into --out {out}: {error.strerror}") from error
    rows = [row for row in rows for _ in range(args.num_samples)]
    samples = _sample_names(rows, args.num_samples)

    from tqdm import tqdm

    tiles, failed, started = [], {}, time.monotonic()
    bar = tqdm(total=len(rows), desc="generating", unit="sample", file=sys.stderr, disable=len(rows) <= args.batch_size)
    for first in range(0, len(rows), args.batch_size):
        part = range(first, min(first + args.batch_size, len(rows)))
        signals, kept = {}, {}
        for i in part:
            try:
                signals[i] = _read(sampler, rows[i], args.pad, masked)
                kept[i] = {n: _mask(sampler, n, v, rows[i], args.pad) for n, v in keep.items()}
            except ValueError as error:
                signals.pop(i, None)
                failed[samples[i]] = str(error)
                if len(rows) == args.num_samples:
                    raise
        if signals:
            common = {"seed": args.seed, "indices": list(signals)}
            if shots:
                queries = [Shot(inputs=inputs) for inputs in signals.values()]
                results = answer(sampler, queries, stages[0], shots=shots, num_tokens=args.shot_tokens, **common)
            else:  # a line of a table may lack what others have
                inputs = {n: [s.get(n) for s in signals.values()] for n in names}
                listener = _printer(sampler) if args.stream else None
                masks = {n: [kept[i][n] for i in signals] for n in keep}
                results = sampler(inputs, stages, keep=masks, listener=listener, **common)
            for k, i in enumerate(signals):
                results.write(out / samples[i], k, with_inputs=args.with_inputs)
                for value in [results[name][k] for name in results] if not args.stream else ():
                    if isinstance(value, str):
                        tqdm.write(value)
                if len(tiles) < SHEET_ROWS:
                    tiles.append((samples[i], _pictures(sampler, results, k)))
        bar.update(len(part))
    bar.close()
    if failed:
        lines = "".join(f"{name}\t{message}\n" for name, message in failed.items())
        write_atomically(out / "failed.tsv", lines.encode())
    if len(rows) > 1 and tiles:
        write_png(out / "sheet.png", contact_sheet(tiles))
    seconds = time.monotonic() - started
    done = len(rows) - len(failed)
    say = functools.partial(print, file=sys.stderr)
    say(f"{done} sample(s) in {out}, {seconds:.1f} s, {done / seconds:.2f} samples/s, compilation included")
    if failed:
        say(f"{len(failed)} sample(s) could not be read, see {out}/failed.tsv: {', '.join([*failed][:5])}")
    if not done:
        raise ValueError(f"no input could be read; the first: {next(iter(failed.values()))}")


# ---- Arguments ------------------------------------------------------------------------------------------------------


def _pair(flag: str, item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise ValueError(f"{flag} takes NAME=VALUE, got {item!r}")
    return name, value


def _rows(items: Seq[str]) -> list[dict[str, str]]:
    """One dict of values for each sample. A .jsonl file holds one sample a line, of any inputs each."""
    tables = [i for i in items if i.endswith(".jsonl") and "=" not in i]
    if tables and len(items) > 1:
        raise ValueError(f"--inputs takes one .jsonl file or NAME=VALUE ..., not both: {' '.join(items)}")
    if tables:
        rows = []
        try:
            lines = Path(tables[0]).read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise ValueError(f"{tables[0]} cannot be read: {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{tables[0]}, line {number} is no JSON: {error}") from error
                if not isinstance(row, dict) or not row or not all(isinstance(v, str) for v in row.values()):
                    like = '{"rgb": "photo.png", "caption": "a cat"}'
                    raise ValueError(f"{tables[0]}, line {number} must be like {like}")
                rows.append(row)
        if not rows:
            raise ValueError(f"{tables[0]} is empty")
        return rows
    given = {}
    for item in items:
        name, value = _pair("--inputs", item)
        if name in given:
            raise ValueError(f"input {name!r} is given twice; a folder holds several samples, {name}#x a second one")
        given[name] = _files(name, value)
    longest = max(map(len, given.values()))
    for name, values in given.items():
        if len(values) not in (1, longest):
            raise ValueError(f"input {name!r} has {len(values)} samples, another has {longest}; give 1 or as many")
    return [{n: v[i] if len(v) > 1 else v[0] for n, v in given.items()} for i in range(longest)]


def _files(name: str, value: str) -> list[str]:
    """The values of one input: the sorted files of a folder, or the one value."""
    folder = Path(value)
    if not value or len(value) > 200 or not folder.is_dir():
        return [value]
    files = sorted(str(p) for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise ValueError(f"input {name}={value} is an empty folder")
    return files


def _sample_names(rows: Seq[dict[str, str]], num_samples: int) -> list[str]:
    """The stem of the input file that differs, or 0000, 0001, ...; with several samples an index is added."""
    one = rows[::num_samples]
    columns = [[row.get(name, "") for row in one] for name in one[0]]  # lines of a table may lack inputs
    values = max(columns, key=lambda column: len(set(column)))
    stems = [Path(v).stem if 0 < len(v) < 200 and Path(v).is_file() else "" for v in values]
    stems = [re.sub(r"[^\w.-]", "_", s) for s in stems]
    if not all(stems) or len(set(stems)) < len(stems):
        stems = [f"{i:04d}" for i in range(len(values))]
    return [f"{s}_{k}" if num_samples > 1 else s for s in stems for k in range(num_samples)]


def _stages(args: argparse.Namespace, sampler: Sampler) -> list[Stage]:
    if args.plan:
        if args.targets:
            raise ValueError("--plan and --targets exclude each other: a plan names its targets")
        from m4.config import load_config

        try:
            plan = load_config(args.plan, "plan")
        except (ImportError, SyntaxError, NameError, TypeError) as error:
            raise ValueError(f"{args.plan} cannot be run: {error}") from error
        if not isinstance(plan, list | tuple) or not plan or not all(isinstance(stage, Stage) for stage in plan):
            raise ValueError(f"{args.plan}: plan must be a list of m4.sampler.Stage, got {plan!r}")
        return list(plan)
    if not args.targets:
        raise ValueError(f"give --targets or --plan; allowed: {', '.join(sampler.modalities.signals)}")
    guidance = _guidance(args.guidance) if args.guidance else None
    stages, used = [], set()
    for name in args.targets:
        m = sampler.modalities.as_target(name)
        scheme = default_scheme(m, args.scheme or "maskgit")
        fields = [f.name for f in dataclasses.fields(scheme)]
        changes = {f: getattr(args, f) for f in FLAGS if getattr(args, f) is not None and f in fields}
        used |= {*changes} | ({"scheme"} if not isinstance(m, Sequence) and args.scheme else set())
        scheme = dataclasses.replace(scheme, **changes)
        ensemble = 1 if isinstance(scheme, Autoregressive) else args.ensemble
        stages.append(Stage(target=name, scheme=scheme, guidance=guidance, ensemble=ensemble))
    if args.ensemble > 1:
        used |= {"ensemble"} if any(stage.ensemble > 1 for stage in stages) else set()
    for flag in ("scheme", *FLAGS, *(["ensemble"] if args.ensemble > 1 else [])):
        if getattr(args, flag) is not None and flag not in used:
            raise ValueError(f"--{flag.replace('_', '-')} fits no target of {', '.join(args.targets)}")
    return stages


def _guidance(values: Seq[str]) -> Guidance:
    try:
        if len(values) == 1 and "=" not in values[0]:
            return Guidance(scale=float(values[0]))
        pairs = [_pair("--guidance", v) for v in values]
        return Guidance(scale=tuple((name, float(weight)) for name, weight in pairs))
    except ValueError as error:
        raise ValueError(f"--guidance takes one number, or NAME=WEIGHT ...; got {' '.join(values)}") from error


def _mask(sampler: Sampler, name: str, value: str, row: Mapping[str, str], pad: bool) -> Any:
    """What stays of an input: a share, or True in a mask, the bright part of a picture that lies on the input's."""
    with contextlib.suppress(ValueError):
        return float(value)
    tokenizer = sampler.tokenizer(name)
    if kind_of(tokenizer) in ALIGNED:
        return read_mask(value, tokenizer, row[name], pad=pad) if name in row else None
    mask = load_mask(value)  # of what is no picture, such as other grids of tokens
    return fit_mask(mask, tokenizer, pad=pad) if hasattr(getattr(tokenizer, "recipe", None), "image_size") else mask


def _read(sampler: Sampler, row: Mapping[str, str], pad: bool, masked: Container[str]) -> dict[str, Any]:
    """The signals of a sample; ValueError for whatever is wrong with one, for other samples to go on."""
    signals = sampler.read_sample(row, pad=pad)
    for name, signal in signals.items():
        tokenizer = sampler.input_tokenizer(name)
        if isinstance(tokenizer.modality, Sequence):
            if name in masked and MASK not in signal:
                raise ValueError(f"{name} is to be completed, and has no {MASK}: {row[name][:60]!r}")
            tokenizer.encode(signal.split(MASK) if name in masked else [signal])  # too long, out of range
    return signals


def _printer(sampler: Sampler) -> Any:
    """Prints a text's new letters whenever a token has come."""
    shown = collections.defaultdict(str)

    def show(target: str, ids: np.ndarray, known: np.ndarray) -> None:
        if isinstance(sampler.modalities.as_target(target), Sequence):
            text = sampler.tokenizer(target).decode([trim(ids[0][known[0]], sampler.modalities.as_target(target))])[0]
            if isinstance(text, str):
                whole = text.rstrip("\ufffd")  # a letter of several tokens comes with its last
                print(whole[len(shown[target]) :], end="", flush=True)
                shown[target] = whole

    return show


# ---- Pictures -------------------------------------------------------------------------------------------------------


def _pictures(sampler: Sampler, results: Results, i: int) -> dict[str, np.ndarray]:
    pictures = {}
    for name, signals in results.inputs.items():
        if signals[i] is not None:
            pictures[name] = sampler.input_tokenizer(name).draw(signals[i], image=results.image(i))
    return pictures | {f"{name} >" if name in pictures else name: results.draw(name, i) for name in results}
