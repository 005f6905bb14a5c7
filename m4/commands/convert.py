"""IN OUT: converts a released 4M checkpoint to an m4 model file, or back, bit for bit.

Both are safetensors. Each tensor keeps its dtype, and the way back restores the very bytes.
Pickles (.pth) are refused. A modality that m4 does not know is declared in a Python file:
modalities = (Grid(name=..., ...),); the error message drafts it.
"""

from __future__ import annotations

from pathlib import Path

from m4.command_line import parser_of
from m4.config import load_config
from m4.interchange.fourm_convert import convert as convert_file


def main(argv: list[str]) -> None:
    parser = parser_of("convert", __doc__)
    parser.add_argument(
        "source", metavar="IN", help="checkpoint: a .safetensors file, or a folder with model.safetensors"
    )
    parser.add_argument("out", metavar="OUT", help="the file to write, e.g. 4m_21_l.m4.safetensors")
    parser.add_argument("--declare", metavar="FILE", default="", help="Python file that defines `modalities`")
    args = parser.parse_args(argv)

    declared = load_config(args.declare, "modalities") if args.declare else ()
    print(convert_file(Path(args.source), Path(args.out), declared))
