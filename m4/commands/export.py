"""RUN OUT: a trained model as one folder: config, tokenizers and a file of parameters."""

from __future__ import annotations

from pathlib import Path

from m4.checkpoints.runs import export as export_run
from m4.command_line import parser_of
from m4.tensor_file import DTYPES


def main(argv: list[str]) -> None:
    parser = parser_of("export", __doc__)
    parser.add_argument("run", help="folder of a run, e.g. runs/quickstart, or of one of its checkpoints")
    parser.add_argument("out", metavar="OUT", help="folder to write; other commands take it as RUN")
    parser.add_argument("--dtype", default="BF16", choices=list(DTYPES), help="type of the parameters (default: BF16)")
    args = parser.parse_args(argv)
    export_run(args.run, args.out, dtype=args.dtype)
    print(f"{args.out}: {sum(p.stat().st_size for p in Path(args.out).rglob('*') if p.is_file()) / 2**20:.1f} MiB")
