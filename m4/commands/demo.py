"""RUN [--port 7860]: a local web page that generates any signals from any others."""

from __future__ import annotations

from pathlib import Path

from m4.command_line import parser_of
from m4.inference.sampler import Sampler, keep_compiled


def main(argv: list[str]) -> None:
    parser = parser_of("demo", __doc__)
    parser.add_argument("run", help="folder of a run, e.g. runs/quickstart, or a model in the package: scenes")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: the network (default: 127.0.0.1, this machine)",
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860")
    parser.add_argument(
        "--allow-host", nargs="+", default=[], metavar="NAME", help="other host names under which it is reached"
    )
    parser.add_argument("--max-upload-mb", type=int, default=10, metavar="N", help="largest file, MiB (default: 10)")
    parser.add_argument(
        "--max-storage-mb",
        type=int,
        default=512,
        metavar="N",
        help="MiB kept of uploads and results; the oldest are deleted (default: 512)",
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
