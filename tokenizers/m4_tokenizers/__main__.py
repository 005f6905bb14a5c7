"""`python -m m4_tokenizers VERB`: train, evaluate, table, convert."""

import argparse
import sys
from collections.abc import Sequence as Seq
from pathlib import Path


def train(argv: list[str]) -> None:
    """Trains the tokenizers of a config, or goes on with those that were killed.

    CONFIG is a tokenizer's config (configs/tokenizers/*.py, any field as --field value) or a run's (its `tokenizers`,
    or those of --signal). Writes OUT/<name>.safetensors with its card, and OUT/<name>.png: given above, decoded below.
    """
    from m4_tokenizers import train as module

    module.main(argv, description=train.__doc__ or "")


def evaluate(argv: list[str]) -> None:
    """Measures a tokenizer file on a config's held-out examples: prints the card, draws a sheet, and, with --write,
    stores the card in the file.
    """
    from m4_tokenizers import train as module

    module.evaluate(argv, description=evaluate.__doc__ or "")


def table(argv: list[str]) -> None:
    """Writes the table of tokenizers/README.md from the cards of tokenizers/cards/*.json."""
    from m4_tokenizers import train as module

    module.table(argv, description=table.__doc__ or "")


def convert(argv: list[str]) -> None:
    """Converts a released 4M tokenizer (VQVAE or DiVAE, safetensors) to a tokenizer file, or such a file back.

    The way back gives the bytes that came in. --signal says what the tokenizer is of, where its config and its file's
    name leave it open; --image-size makes it one for images of another size.
    """
    from m4_tokenizers.interchange import fourm_tokenizers as released
    from m4_tokenizers.interchange.architectures import read_presets

    parser = _parser("convert", convert.__doc__ or "")
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--signal", default="", help=f"one of {', '.join(released.RECIPES)}")
    parser.add_argument("--image-size", type=int, default=0, help="pixels a side; default: the checkpoint's own")
    parser.add_argument("--presets", type=Path, help="JSON file: architectures by enc_type / dec_type")
    args = parser.parse_args(argv)
    presets = read_presets(args.presets) if args.presets else {}
    print(released.convert(args.source, args.out, signal=args.signal, image_size=args.image_size, presets=presets))


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

        asked = bool(argv) and argv[0] in ("-h", "--help")
        lines = [f"  {name:9} {(f.__doc__ or '').splitlines()[0]}" for name, f in VERBS.items()]
        wrong = f"error: no verb {argv[0]!r}; {closest(argv[0], list(VERBS))}\n\n" if argv and not asked else ""
        usage = f"{wrong}usage: python -m m4_tokenizers VERB ...\n\n" + "\n".join(lines)
        print(usage, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    from m4.command_line import ends_with_a_sentence

    with ends_with_a_sentence():
        VERBS[argv[0]](list(argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
