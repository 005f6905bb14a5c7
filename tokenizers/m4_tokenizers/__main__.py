"""`python -m m4_tokenizers VERB`: train, evaluate, table, convert."""

import argparse
import inspect
import sys
from collections.abc import Sequence as Seq
from pathlib import Path


def train(argv: list[str]) -> None:
    """Trains the tokenizers of a config, or resumes those that were stopped.

    CONFIG is a tokenizer's config (configs/tokenizers/*.py) or a run's. Writes for each tokenizer
    OUT/<name>.safetensors, the tokenizer, OUT/<name>.json, its measured quality, and OUT/<name>.png,
    examples above and their reconstructions below. --field value pairs override fields of the config;
    `train CONFIG --help` lists them.
    """
    from m4_tokenizers import train as module

    module.main(argv, description=inspect.getdoc(train) or "")


def evaluate(argv: list[str]) -> None:
    """Measures a tokenizer file on held-out examples of a config.

    Prints the card (its measured quality) and writes it as <name>.json, with examples and their
    reconstructions as <name>.png; with --write, the card is stored in the tokenizer file too.
    """
    from m4_tokenizers import train as module

    module.evaluate(argv, description=inspect.getdoc(evaluate) or "")


def table(argv: list[str]) -> None:
    """Writes the table of tokenizers/README.md from the cards of tokenizers/cards/*.json."""
    from m4_tokenizers import train as module

    module.table(argv, description=inspect.getdoc(table) or "")


def convert(argv: list[str]) -> None:
    """Converts a released 4M tokenizer to a tokenizer file, or such a file back.

    IN is a VQVAE or DiVAE in safetensors; converting back gives the same bytes. --signal says
    which signal it is for, where its config and its file's name leave it open.
    """
    from m4_tokenizers.interchange import fourm_tokenizers
    from m4_tokenizers.interchange.architectures import read_presets

    parser = _parser("convert", inspect.getdoc(convert) or "")
    parser.add_argument("source", metavar="IN", type=Path, help="file to convert")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write")
    parser.add_argument("--signal", default="", metavar="NAME", help=f"one of {', '.join(fourm_tokenizers.RECIPES)}")
    parser.add_argument("--image-size", type=int, default=0, metavar="N", help="pixels a side (default: its own)")
    parser.add_argument(
        "--presets", type=Path, metavar="FILE", help="JSON file with architectures by their enc_type or dec_type"
    )
    args = parser.parse_args(argv)
    presets = read_presets(args.presets) if args.presets else {}
    options = {"signal": args.signal, "image_size": args.image_size, "presets": presets}
    print(fourm_tokenizers.convert(args.source, args.out, **options))


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m m4_tokenizers {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


VERBS = {f.__name__: f for f in (train, evaluate, table, convert)}


def main(argv: Seq[str]) -> None:
    if not argv or argv[0] not in VERBS:
        from m4.errors import closest

        wants_help = bool(argv) and argv[0] in ("-h", "--help")
        lines = [f"  {name:9} {(f.__doc__ or '').splitlines()[0]}" for name, f in VERBS.items()]
        wrong = f"error: no verb {argv[0]!r}; {closest(argv[0], list(VERBS))}\n\n" if argv and not wants_help else ""
        usage = f"{wrong}usage: python -m m4_tokenizers VERB ...\n\n" + "\n".join(lines)
        print(usage, file=sys.stdout if wants_help else sys.stderr)
        raise SystemExit(0 if wants_help else 2)
    from m4.command_line import ends_with_a_sentence

    with ends_with_a_sentence():
        VERBS[argv[0]](list(argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
