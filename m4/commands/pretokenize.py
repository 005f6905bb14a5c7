"""CONFIG.py [--field value ...]: raw data, tokenizers and token shards of a config, without training.

A killed job goes on at the shard where it was. On several hosts that see the same files, run the same command on
each with its own --host; further --field value pairs override fields of the config.
"""

from __future__ import annotations

from m4.command_line import parser_of
from m4.config import from_cli
from m4.data.pretokenize import prepare
from m4.distributed.worker_group import Team


def main(argv: list[str]) -> None:
    parser = parser_of("pretokenize", __doc__)
    parser.add_argument("config", help="a Python file that defines `config`")
    parser.add_argument("--splits", nargs="+", default=["train"], help="default: train")
    parser.add_argument("--processes", type=int, default=1, help="of this host, each with the tokenizers in memory")
    parser.add_argument("--host", default="0/1", metavar="I/N", help="this is host I (from 0) of N")
    args, overrides = parser.parse_known_args(argv)

    index, slash, count = args.host.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ValueError(f"--host takes I/N, such as 0/4, got {args.host!r}")
    team = Team(index=int(index), count=int(count), workers=args.processes)
    config = from_cli(__doc__, [args.config, *overrides])
    config.check()
    prepared = prepare(
        config.datasets, config.tokenizers, config.data_dir, seed=config.seed, splits=args.splits, team=team
    )
    for dataset, folder in zip(config.datasets, prepared.tokens, strict=True):
        print(f"token shards of {dataset.label}: {folder}")
