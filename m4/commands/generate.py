"""RUN --inputs NAME=VALUE --targets NAME --out OUT: generates signals from others.

VALUE is a file (rgb=photo.png, depth=depth.png, boxes=boxes.json), a folder of such files (one
sample each), or the text itself (caption="a small red cube"; [MASK] in it stands for words to
generate). Instead of NAME=VALUE pairs, a file PROMPTS.jsonl holds one sample per line, with any
inputs. Targets are generated in the order given; each sees those before it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Container, Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from m4.command_line import parser_of
from m4.commands._stages import second_of, stages_of
from m4.data.samples import fit_mask, kind_of, load_mask, read_mask
from m4.data.sources.files import ALIGNED
from m4.errors import check_seed
from m4.files import remove_leftovers, shown, write_atomically
from m4.in_context.prompting import answer
from m4.in_context.shots import read_shots
from m4.inference.chain import continued
from m4.inference.inputs import Sample, beside, pair, read_inputs
from m4.inference.prompts import MASK, BadSamples, check_plan, reason
from m4.inference.results import Results
from m4.inference.sampler import Sampler, keep_compiled
from m4.inference.scheme import Stage
from m4.masking.episodes import Shot
from m4.pictures import contact_sheet, write_png
from m4.tokens.modality import Sequence
from m4.tokens.spans import trim

SHEET_ROWS = 24
SIGNALS = ("rgb", "depth", "normals", "semseg", "instance", "caption", "boxes")  # of most models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", help="folder of a run, e.g. runs/quickstart, or a model in the package: scenes")
    add("--inputs", nargs="+", required=True, metavar="NAME=VALUE", help="what is given, or PROMPTS.jsonl")
    add("--targets", nargs="+", default=[], metavar="NAME", help="signals to generate, e.g. depth caption; all")
    add("--plan", default="", metavar="FILE.py", help="targets and schemes: a Python file, plan = [Stage(...), ...]")
    add("--out", required=True, help="folder for the results: OUT/<sample>/rgb.png, depth.png, ...")
    add("--keep", nargs="+", default=[], metavar="NAME=MASK", help="what stays of an input that is also a target: "
        "an image (white stays) or a share (rgb=0.5: variations)")  # fmt: skip
    like = '[{"inputs": {"rgb": "a.png"}, "outputs": {"caption": "a dax"}}, ...]'
    add("--shots", default="", metavar="FILE.json", help=f"labelled examples of a task: {like}")
    add("--shot-tokens", type=int, default=0, metavar="N", help="tokens of each image of --shots (default: all)")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same results (default: 0)")
    add("--num-samples", type=int, default=1, metavar="N", help="results for each input (default: 1)")
    add("--batch-size", type=int, default=16, metavar="N", help="samples at a time (default: 16)")
    add("--scheme", choices=["maskgit", "roar"], help="how grids are decoded (default: maskgit)")
    add("--steps", type=int, metavar="N", help="decoding steps of grids")
    schedules = ["maskgit", "cosine", "linear"]
    add("--schedule", choices=schedules, help="tokens per step: ever more, few at first and last, or equally many")
    add("--temperature", type=float, metavar="X", help="of sampling; 0 takes the most likely token")
    add("--top-k", type=float, metavar="K", help="draw among the K most likely tokens; below 1: a share of all")
    add("--top-p", type=float, metavar="P", help="draw among the most likely tokens that hold P of the probability")
    add("--min-p", type=float, metavar="P", help="draw among tokens at least P times as likely as the likeliest")
    add("--guidance", nargs="+", metavar="SCALE", help="classifier-free: one number, or NAME=WEIGHT for each input")
    add("--ensemble", type=int, default=1, metavar="N", help="average N samples, for images and maps")
    add("--pad", action="store_true", help="pad images to a square instead of cropping them")
    add("--with-inputs", action="store_true", help="write the inputs too, so that one can train on the results")
    add("--stream", action="store_true", help="print text while it is generated (one sample)")
    add("--super-resolution", action="store_true", help="go on with the second model of an imported 4M model, at 448")


def run(args: argparse.Namespace) -> None:
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a text that the terminal cannot show does not end the job
        reconfigure(errors="backslashreplace")
    for flag in ("num_samples", "batch_size", "ensemble"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1")
    check_seed(args.seed)
    samples, table = read_inputs(args.inputs)
    keep_compiled()
    job = Job.make(args, samples, table)
    out = Path(args.out)
    _prepare_folder(out, job)

    started, failed = time.monotonic(), {}
    try:
        done, tiles = _generate(job, out, failed)
    except BaseException:
        with contextlib.suppress(ValueError):  # the error that ended the run is the one to report
            _write_reports(out, failed, [])
        raise
    _write_reports(out, failed, tiles if len(job.samples) > 1 else [])
    _print_summary(out, job, done, failed, time.monotonic() - started)
    if not done:
        raise ValueError(f"no input could be read; the first: {next(iter(failed.values()))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A checked request. `samples`: one for each result; `masked`: inputs that are text with [MASK] in some sample."""

    args: argparse.Namespace
    sampler: Sampler
    stages: list[Stage]
    samples: list[Sample]
    names: list[str]
    masked: set[str]
    fixed: dict[str, str]
    shots: list[Shot]
    second: Sampler | None
    second_stages: tuple[Stage, ...]

    @classmethod
    def make(cls, args: argparse.Namespace, samples: list[Sample], table: Path | None) -> Job:
        sampler = Sampler.load(args.run, batch_size=args.batch_size)
        names = list(dict.fromkeys(n for s in samples for n in s.values))
        stages = stages_of(args, sampler, names)
        kinds = {name: kind_of(sampler.input_tokenizer(name)) for name in names}
        samples = beside(samples, table, kinds) if table else samples
        shots = read_shots(Path(args.shots)) if args.shots else []
        fixed = _fixed(args)
        masked = {n for s in samples for n, v in s.values.items() if isinstance(v, str) and MASK in v}
        # With examples of a task, an input text that is also the target is a question.
        question_inputs = {n for n in names if shots and sampler.modalities.as_input(n).signal == stages[0].target}
        check_plan(stages, [n for n in names if n not in question_inputs], sampler.modalities, [*fixed, *masked])
        if shots and (len(stages) > 1 or fixed or masked or args.stream):
            raise ValueError("--shots takes one target, and neither --keep, --stream nor [MASK]")
        if args.stream and len(samples) * args.num_samples > 1:
            raise ValueError(f"--stream prints one sample, and there are {len(samples) * args.num_samples}")
        second, second_stages = second_of(args, sampler, stages, names)
        if args.num_samples > 1:
            repeats = range(args.num_samples)
            samples = [dataclasses.replace(s, name=f"{s.name}_{k}") for s in samples for k in repeats]
        return cls(
            args=args, sampler=sampler, stages=stages, samples=samples, names=names, masked=masked, fixed=fixed,
            shots=shots, second=second, second_stages=second_stages,
        )  # fmt: skip

    def read(self, sample: Sample) -> tuple[dict[str, Any], dict[str, Any]]:
        """A sample's signals, and masks of their fixed parts. All its errors are ValueErrors, so that others go on."""
        if sample.error:
            raise ValueError(sample.error)
        try:
            signals = _read(self.sampler, sample.values, self.args.pad, self.masked)
            masks = {n: _mask(self.sampler, n, v, sample.values, self.args.pad) for n, v in self.fixed.items()}
        except Exception as error:
            raise ValueError(reason(error)) from error
        return signals, masks

    def run(self, signals: Seq[Mapping[str, Any]], masks: Seq[Mapping[str, Any]], first: int) -> Results:
        """One batch; `first`: index of its first sample in random streams, where bad samples do not count."""
        common: dict[str, Any] = {"seed": self.args.seed, "indices": range(first, first + len(signals))}
        if self.shots:
            queries = [Shot(inputs=inputs) for inputs in signals]
            return answer(
                self.sampler, queries, self.stages[0], shots=self.shots, num_tokens=self.args.shot_tokens, **common
            )
        # A line of a table may lack inputs that others have.
        inputs = {name: [s[name] if name in s else None for s in signals] for name in self.names}
        on_step = _printer(self.sampler) if self.args.stream else None
        keep = {name: [m[name] for m in masks] for name in self.fixed}
        return self.sampler(inputs, self.stages, keep=keep, on_step=on_step, **common)


def _batches(job: Job, failed: dict[str, str]) -> Iterator[tuple[list[Sample], list[Results]]]:
    """Results of all samples that can be read and encoded, in full batches; errors of the others go to `failed`."""
    waiting = collections.deque(job.samples)
    num_done, batch = 0, []
    while waiting or batch:
        # 1. Fill the batch with samples that can be read.
        while waiting and len(batch) < job.args.batch_size:
            sample = waiting.popleft()
            try:
                batch.append((sample, *job.read(sample)))
            except ValueError as error:
                if len(job.samples) == job.args.num_samples:
                    raise
                failed[sample.name] = str(error)
        if not batch:
            return
        # 2. Samples that cannot be encoded leave it, and it is filled again.
        try:
            results = job.run([signals for _, signals, _ in batch], [masks for *_, masks in batch], num_done)
        except BadSamples as error:
            if len(job.samples) == job.args.num_samples:
                raise
            for k, (name, message) in error.errors.items():
                failed[batch[k][0].name] = _with_input(batch[k][0].values, name, message)
            batch = [item for k, item in enumerate(batch) if k not in error.errors]
            continue
        found = [results]
        if job.second is not None:
            indices = range(num_done, num_done + len(batch))
            found.append(continued(results, job.second, job.second_stages, seed=job.args.seed + 1, indices=indices))
        yield [sample for sample, *_ in batch], found
        num_done, batch = num_done + len(batch), []


def _generate(job: Job, out: Path, failed: dict[str, str]) -> tuple[list[str], list]:
    """Writes each sample's folder when it is done. Names of these samples, and rows of a contact sheet; errors of the
    others go to `failed`."""
    from tqdm import tqdm

    done, tiles, total = [], [], len(job.samples)
    bar = tqdm(total=total, desc="generating", unit="sample", file=sys.stderr, disable=total <= job.args.batch_size)
    with contextlib.closing(bar):
        for samples, (results, *more) in _batches(job, failed):
            for k, sample in enumerate(samples):
                results.write(out / sample.name, k, alone=True, with_inputs=job.args.with_inputs)
                for other in more:
                    other.write(out / sample.name, k)
                for value in [results[name][k] for name in results] if not job.args.stream else ():
                    if isinstance(value, str):
                        tqdm.write(value)
                if len(tiles) < SHEET_ROWS:
                    tiles.append((sample.name, results.pictures(k)))
            done += [sample.name for sample in samples]
            bar.update(len(done) + len(failed) - bar.n)
        bar.update(total - bar.n)
    return done, tiles


def _with_input(row: Mapping[str, str | Path], name: str, message: str) -> str:
    """An error message with the input and its file (or the beginning of its text)."""
    value = shown(row[name]) if name in row else ""
    return message if not value or value in message else f"{name}={value[:200]}: {message}"


# ---- The folder of results ------------------------------------------------------------------------------------------


def _prepare_folder(out: Path, job: Job) -> None:
    """Creates OUT, and removes temporary files of killed runs. ValueError if it cannot be written, or if files that are
    not m4's would be lost."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
    except OSError as error:
        raise ValueError(f"cannot write into --out {shown(out)}: {error.strerror}") from error
    modalities = job.sampler.modalities
    own_prefixes = tuple(f"{name}{end}" for name in {*modalities.names, *modalities.signals, *SIGNALS} for end in "._")
    for name in {sample.name for sample in job.samples}:
        if (out / name).is_symlink() or not (out / name).exists():
            continue
        files = sorted(os.listdir(out / name)) if (out / name).is_dir() else [""]
        foreign = [f for f in files if not f.startswith(own_prefixes) or not (out / name / f).is_file()]
        if foreign:
            first = shown(out / name / foreign[0])
            raise ValueError(
                f"{first} would be lost, for a sample's folder is replaced; move it, or choose another --out"
            )


def _write_reports(out: Path, failed: Mapping[str, str], tiles: Seq[tuple[str, Any]]) -> None:
    """Writes failed.tsv and sheet.png of this run, or removes those of an earlier run."""
    try:
        rows = "".join(f"{shown(name)}\t{shown(message)}\n" for name, message in failed.items())
        if failed:
            write_atomically(out / "failed.tsv", rows.encode())
        else:
            (out / "failed.tsv").unlink(missing_ok=True)
        if tiles:
            write_png(out / "sheet.png", contact_sheet(tiles))
        else:
            (out / "sheet.png").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{shown(error.filename or out)} cannot be written: {error.strerror}") from error


def _print_summary(out: Path, job: Job, done: Seq[str], failed: Mapping[str, str], seconds: float) -> None:
    report = functools.partial(print, file=sys.stderr)
    report(
        f"{len(done)} sample(s) in {shown(out)}, {seconds:.1f} s, {len(done) / seconds:.2f} samples/s, "
        "compilation included"
    )
    if failed:
        report(f"{len(failed)} sample(s) could not be read, see {shown(out)}/failed.tsv: {', '.join([*failed][:5])}")
    others = sorted({p.name for p in out.iterdir() if p.is_dir()} - {*done})
    if others:
        report(f"{len(others)} folder(s) in {shown(out)} are not of this run: {', '.join(map(shown, others[:5]))}")


# ---- Arguments ------------------------------------------------------------------------------------------------------


def _fixed(args: argparse.Namespace) -> dict[str, str]:
    """Share or mask file of the fixed part, by input. ValueError for those that no sample could have."""
    pairs = [pair("--keep", item) for item in args.keep]
    if len(fixed := dict(pairs)) < len(pairs):
        raise ValueError(f"--keep names an input twice: {' '.join(args.keep)}")
    for name, value in fixed.items():
        if not value:
            raise ValueError(f"--keep {name}= needs a picture or a share within [0, 1]")
        try:
            share = float(value)
        except ValueError:
            load_mask(value)
            continue
        if not 0 <= share <= 1:
            raise ValueError(f"--keep {name}={value}: a share must be within [0, 1]")
    return fixed


def _mask(sampler: Sampler, name: str, value: str, row: Mapping[str, str | Path], pad: bool) -> Any:
    """The fixed part of an input: a share, or a mask, True in the bright part of an image that is aligned with it."""
    with contextlib.suppress(ValueError):
        return float(value)
    tokenizer = sampler.tokenizer(name)
    if kind_of(tokenizer) in ALIGNED:
        return read_mask(value, tokenizer, row[name], pad=pad) if name in row else None
    mask = load_mask(value)  # for signals that are no images, such as other grids of tokens
    return fit_mask(mask, tokenizer, pad=pad) if hasattr(getattr(tokenizer, "recipe", None), "image_size") else mask


def _read(sampler: Sampler, row: Mapping[str, str | Path], pad: bool, masked: Container[str]) -> dict[str, Any]:
    """The signals of a sample. All errors of a text are ValueErrors with its input."""
    signals = sampler.read_sample(row, pad=pad)
    for name, signal in signals.items():
        tokenizer = sampler.input_tokenizer(name)
        if isinstance(tokenizer.modality, Sequence):
            if name in masked and MASK not in signal:
                raise ValueError(f"{name} is to be completed, and has no {MASK}: {shown(row[name])[:60]}")
            try:
                tokenizer.encode(signal.split(MASK) if name in masked else [signal])
            except Exception as error:  # too long, out of range
                raise ValueError(_with_input(row, name, reason(error))) from error
    return signals


def _printer(sampler: Sampler) -> Any:
    """A callback that prints a text's new letters after each token."""
    printed = collections.defaultdict(str)

    def show(target: str, ids: np.ndarray, known: np.ndarray) -> None:
        m = sampler.modalities.as_target(target)
        if isinstance(m, Sequence):
            text = sampler.tokenizer(target).decode([trim(ids[0][known[0]], m)])[0]
            if isinstance(text, str):
                complete = text.rstrip("\ufffd")  # a letter of several tokens is decoded with its last
                print(complete[len(printed[target]) :], end="", flush=True)
                printed[target] = complete

    return show


def main(argv: list[str]) -> None:
    parser = parser_of("generate", __doc__)
    add_arguments(parser)
    run(parser.parse_args(argv))
