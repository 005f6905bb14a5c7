"""`python -m m4_tokenizers train CONFIG.py [--signal rgb ...] [--out DIR]`"""

import argparse
from pathlib import Path

from m4.config import load_config
from m4_tokenizers.train import train

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m m4_tokenizers", description="Trains the tokenizers of a config.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train", help="fit tokenizers, write their files and a sheet of reconstructions")
    verb.add_argument("config", help="a Python file that defines `config`")
    verb.add_argument("--signal", nargs="+", default=[], help="only the tokenizers of these signals")
    verb.add_argument("--out", type=Path, default=Path("out/tokenizers"))
    arguments = parser.parse_args()
    try:
        train(load_config(arguments.config), signals=arguments.signal, out=arguments.out)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
