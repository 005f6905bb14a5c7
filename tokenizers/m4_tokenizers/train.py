"""Trains the tokenizers of a config, measures them, and keeps the table of their cards."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from m4.checkpoints.runs import replace_tokenizer
from m4.config import load_config
from m4.data.sources.files import read_for
from m4.errors import check_numbers, closest
from m4.field_help import parse
from m4.files import locked, read_json, write_atomically, write_json
from m4.pictures import write_png
from m4.registry import to_json
from m4.tokens.modality import Features
from m4.tokens.tokenizer import load_tokenizer, save_tokenizer
from m4_tokenizers.training import sheet
from m4_tokenizers.vq import VQRecipe, VQTokenizer

CARDS = Path(__file__).parent.parent / "cards"
README = Path(__file__).parent.parent / "README.md"
MARKS = ("<!-- cards -->", "<!-- end of cards -->")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A training of tokenizers alone: configs/tokenizers/*.py expose one as `config`."""

    source: Any
    """Raw data (m4.data.dataset.Source), such as m4.data.sources.scenes.Scenes."""
    tokenizers: tuple[Any, ...]
    """Recipes of the tokenizers that are trained."""
    seed: int = 0
    """Seed of parameters and batches."""
    data_dir: str = "data"
    """Folder of prepared data and of the tokenizers."""


def main(argv: Seq[str], *, description: str) -> None:
    parser = _parser("train", description)
    parser.add_argument("config", metavar="CONFIG", help="the Python file with the config")
    parser.add_argument("--signal", nargs="+", default=[], metavar="NAME", help="only the tokenizers of these signals")
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"), help="default: runs/tokenizers")
    wants_help = bool({"-h", "--help"} & {*argv}) and len(argv) > 1  # with a config: its fields too
    args, overrides = parser.parse_known_args([x for x in argv if x not in ("-h", "--help")] if wants_help else argv)
    config = load_config(args.config)
    description = f"{parser.format_help().partition(chr(10) * 2)[2]}\nFields of the config:"
    overrides = ["--help"] if wants_help else overrides
    config = parse(config, overrides, prog=f"{parser.prog} {args.config}", description=description)
    train(config, signals=args.signal, out=args.out)


def train(config: Any, *, signals: Seq[str], out: Path) -> None:
    """Writes OUT/<modality>.safetensors, .json (the card) and .png for the config's tokenizers (of these signals)."""
    allowed = [recipe.modality.signal for recipe in config.tokenizers]
    for signal in signals:
        if signal not in allowed:
            raise ValueError(f"the config has no tokenizer of signal {signal!r}; {closest(signal, allowed)}")
    check_numbers(config)
    source = source_of(config)
    source.prepare(config.data_dir)
    examples, held_out = (
        read_for(source.split(name, config.data_dir), config.tokenizers) for name in ("train", "validation")
    )
    for recipe in config.tokenizers:
        if signals and recipe.modality.signal not in signals:
            continue
        name = recipe.modality.name
        if isinstance(recipe, VQRecipe):
            with locked(out / name / ".lock", f"folder {out / name}"):
                content = {"recipe": to_json(recipe), "source": to_json(source), "seed": config.seed}
                save_or_check(out / name, content)
                tokenizer = recipe.fit(examples, seed=config.seed, folder=out / name)
        else:
            tokenizer = recipe.fit(examples, seed=config.seed)
        save_tokenizer(tokenizer, out / f"{name}.safetensors")
        write_atomically(out / f"{name}.json", json.dumps(tokenizer.card, indent=1).encode())
        if not isinstance(recipe.modality, Features):
            shown = [held_out[i] for i in range(min(8, len(held_out)))]
            write_png(out / f"{name}.png", sheet([tokenizer], shown))
        print(name, json.dumps(tokenizer.card), flush=True)


def source_of(config: Any) -> Any:
    """The raw data of a tokenizer's config, or of a run's first data set. ValueError if there are none."""
    if hasattr(config, "source"):
        return config.source
    sources = [d.source for d in config.datasets if d.source is not None] if hasattr(config, "datasets") else []
    if not sources:
        raise ValueError(f"a {type(config).__name__} without raw data cannot train tokenizers; allowed: a `source`")
    return sources[0]


def save_or_check(folder: Path, content: dict[str, Any]) -> None:
    """Writes config.json, or raises ValueError if the folder holds the training of another config."""
    file = folder / "config.json"
    if file.exists() and read_json(file) != json.loads(json.dumps(content)):
        raise ValueError(f"{folder} holds the training of another config; give another --out, or delete it")
    write_json(file, content)


def evaluate(argv: Seq[str], *, description: str) -> None:
    parser = _parser("evaluate", description)
    parser.add_argument("file", type=Path, metavar="FILE", help="the tokenizer file")
    parser.add_argument(
        "config", metavar="CONFIG", help="the Python file with the config, whose source has the examples"
    )
    parser.add_argument("--split", default="validation", metavar="NAME", help="default: validation")
    parser.add_argument("--num-samples", type=int, default=512, metavar="N", help="examples measured (default: 512)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: that of FILE)")
    parser.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="FILE", help="other tokenizers to show beside it"
    )
    parser.add_argument("--write", action="store_true", help="store the card in the tokenizer file too")
    args = parser.parse_args(argv)
    tokenizer, config = load_tokenizer(args.file), load_config(args.config)
    if not isinstance(tokenizer, VQTokenizer):
        raise ValueError(f"{args.file} is a {type(tokenizer).__name__}, which learns nothing that could be measured")
    source = source_of(config)
    source.prepare(config.data_dir)
    split, training = (read_for(source.split(name, config.data_dir), [tokenizer]) for name in (args.split, "train"))
    if args.num_samples < 1 or not len(split):
        raise ValueError(f"--num-samples {args.num_samples} of {len(split)} {args.split} examples: one is needed")
    recipe = tokenizer.recipe
    examples = [split[i] for i in range(min(args.num_samples, len(split)))]
    known = [recipe.signal_of(training[i]) for i in range(min(1024, len(training)))]
    tokenizer.card |= {
        **tokenizer.evaluate(examples, mean=recipe.mean_signal(recipe.to_arrays(known))),
        "split": args.split,
    }
    out, name = args.out or args.file.parent, recipe.name
    write_atomically(out / f"{name}.json", json.dumps(tokenizer.card, indent=1).encode())
    write_png(out / f"{name}.png", sheet([*map(load_tokenizer, args.beside), tokenizer], examples[:8]))
    if args.write:
        replace_tokenizer(tokenizer, args.file)
    print(json.dumps(tokenizer.card))


# Measures of a card that the table shows: the name, and the digits behind the point.
MEASURES = {
    "psnr": ("PSNR dB", 1), "psnr_on_objects": ("on objects", 1), "ssim": ("SSIM", 3), "delta1": ("delta1", 3),
    "delta1_on_objects": ("on objects", 3), "abs_rel": ("AbsRel", 3), "mean_angle": ("mean angle", 1),
    "mean_angle_on_objects": ("on objects", 1), "miou": ("mIoU", 3), "accuracy": ("accuracy", 3), "iou": ("IoU", 3),
    "f1": ("F1", 3), "cosine": ("cosine", 3), "relative_error": ("relative error", 3),
    "perceptual": ("perceptual", 3), "frechet": ("Frechet", 0), "spectral_distance": ("spectral distance dB", 1),
    "cepstral_distortion": ("cepstral distortion dB", 1),
}  # fmt: skip


def row(name: str, card: dict[str, Any]) -> str:
    parts = []
    for key, (title, digits) in MEASURES.items():
        if key in card:
            trivial = f" ({card[f'{key}_of_mean']:.{digits}f})" if f"{key}_of_mean" in card else ""
            parts.append(f"{title} {card[key]:.{digits}f}{trivial}")
    used = f"{card['codes_used']:.0%} of codes, perplexity {card['perplexity']:.0f}"
    cells = [f"`{name}`", card["signal"], card["tokens_per_sample"], card["vocab_size"], "; ".join(parts), used]
    speed = f"{card['encoded_per_second']:,.0f} / {card['decoded_per_second']:,.0f}"
    return "| " + " | ".join(map(str, [*cells, f"{card['fit_seconds']:.0f} s", speed])) + " |"


def table(argv: Seq[str], *, description: str) -> None:
    parser = _parser("table", description)
    parser.add_argument("--cards", type=Path, default=CARDS, metavar="DIR", help="folder of the cards")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="page that holds the table")
    args = parser.parse_args(argv)
    cards = {file.stem: json.loads(file.read_text()) for file in sorted(args.cards.glob("*.json"))}
    if not cards:
        raise ValueError(f"no cards (*.json) in {args.cards}")
    text = args.readme.read_text()
    if any(mark not in text for mark in MARKS):
        raise ValueError(f"{args.readme} has no lines {' and '.join(MARKS)} to write between")
    head = ["card", "signal", "tokens", "vocabulary", "held-out quality (the mean signal's)", "use", "training"]
    head.append("encoded / decoded per s")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(row(name, card) for name, card in cards.items())]
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    new = f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{after}"
    write_atomically(args.readme, new.encode())
    print("\n".join(lines))


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m m4_tokenizers {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
