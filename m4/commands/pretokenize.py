"""CONFIG.py [--field value ...]: prepares the data of a config, without training.

Raw data, tokenizers and token shards are written into the config's data_dir. A killed job goes on
at the shard where it stopped. On several hosts that see the same files, give the same command on
each with its own --host. --field value pairs override fields of the config;
`train.py CONFIG.py --help` lists them.
"""

from __future__ import annotations

from m4.command_line import parser_of
from m4.config import from_cli
from m4.data.pretokenize import prepare
from m4.distributed.worker_group import WorkerGroup


def main(argv: list[str]) -> None:
    parser = parser_of("pretokenize", __doc__)
    parser.add_argument("config", help="the Python file with the config, e.g. configs/quickstart.py")
    parser.add_argument("--splits", nargs="+", default=["train"], metavar="NAME", help="default: train")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes of this host (default: 1)")
    parser.add_argument("--host", default="0/1", metavar="I/N", help="this is host I of N, from 0 (default: 0/1)")
    args, overrides = parser.parse_known_args(argv)

    index, slash, count = args.host.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ValueError(f"--host takes I/N, such as 0/4, got {args.host!r}")
    team = WorkerGroup(index=int(index), count=int(count), workers=args.processes)
    config = from_cli(__doc__, [args.config, *overrides])
    config.check()
    prepared = prepare(
        config.datasets, config.tokenizers, config.data_dir, seed=config.seed, splits=args.splits, team=team
    )
    for dataset, folder in zip(config.datasets, prepared.tokens, strict=True):
        print(f"token shards of {dataset.label}: {folder}")
