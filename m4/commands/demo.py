"""RUN [--port 7860]: a local page that takes any signals and shows how others are generated."""

from __future__ import annotations

from pathlib import Path

from m4.command_line import parser_of
from m4.inference.sampler import Sampler, keep_compiled


def main(argv: list[str]) -> None:
    parser = parser_of("demo", __doc__)
    parser.add_argument("run", help="the folder of a run, or a model that comes with m4")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: anybody on the network may use it")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--allow-host", nargs="+", default=[], metavar="NAME", help="by which browsers may call it, too"
    )
    parser.add_argument("--max-upload-mb", type=int, default=10, help="MiB of a file (default: 10)")
    parser.add_argument(
        "--max-storage-mb", type=int, default=512, help="MiB of all uploads and results; the oldest go (default: 512)"
    )
    args = parser.parse_args(argv)

    keep_compiled()
    sampler = Sampler.load(args.run, batch_size=1)
    try:
        from m4.demo.page import launch
    except ImportError as error:
        raise ValueError(f'the demo needs Gradio: pip install "m4-jax[demo]" ({error})') from error
    launch(
        sampler, Path(args.run).name, host=args.host, port=args.port, max_mb=args.max_upload_mb,
        max_storage_mb=args.max_storage_mb, allowed_hosts=args.allow_host,
    )  # fmt: skip
