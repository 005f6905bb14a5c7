"""`python -m m4 VERB`: pretokenize, data, plan, generate, evaluate, demo, export, merge, convert."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from m4.commands import ends_with_a_sentence
from m4.components import closest


def pretokenize(argv: list[str]) -> None:
    """CONFIG.py [--field value ...]: raw data, tokenizers and token shards of a config, without training.

    A killed job goes on at the shard where it was. On several hosts that see the same files, run the same command on
    each with its own --host; further --field value pairs override fields of the config.
    """
    parser = argparse.ArgumentParser(
        prog="python -m m4 pretokenize",
        description=pretokenize.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a Python file that defines `config`")
    parser.add_argument("--splits", nargs="+", default=["train"], help="default: train")
    parser.add_argument("--processes", type=int, default=1, help="of this host, each with the tokenizers in memory")
    parser.add_argument("--host", default="0/1", metavar="I/N", help="this is host I (from 0) of N")
    args, overrides = parser.parse_known_args(argv)
    from m4.config import from_cli
    from m4.pretokenize import prepare
    from m4.team import Team

    index, slash, count = args.host.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ValueError(f"--host takes I/N, such as 0/4, got {args.host!r}")
    team = Team(index=int(index), count=int(count), workers=args.processes)
    config = from_cli(pretokenize.__doc__, [args.config, *overrides])
    config.check()
    prepared = prepare(
        config.datasets, config.tokenizers, config.data_dir, seed=config.seed, splits=args.splits, team=team
    )
    for dataset, folder in zip(config.datasets, prepared.tokens, strict=True):
        print(f"token shards of {dataset.label}: {folder}")


def data(argv: list[str]) -> None:
    """CONFIG.py [--field value ...]: what a config will read, measured: counts, lengths, shares, samples, speed.

    Prepares the data first (as training would), then reads and masks examples of the training stream. Writes
    OUT/samples.png (rows = samples, columns = modalities: the example, what goes in, what must come out) and
    OUT/data.json.
    """
    parser = argparse.ArgumentParser(
        prog="python -m m4 data", description=data.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a Python file that defines `config`")
    parser.add_argument("--num-examples", type=int, default=4096, help="of the stream that are measured")
    parser.add_argument("--out", type=Path, default=None, help="default: <the run's folder>/data")
    args, overrides = parser.parse_known_args(argv)
    if args.num_examples < 1:
        raise ValueError(f"--num-examples {args.num_examples} must be at least 1")
    from m4 import overview
    from m4.config import from_cli

    config = from_cli(data.__doc__, [args.config, *overrides])
    config.check()
    overview.show(config, args.out or config.folder / "data", num_examples=args.num_examples)


def evaluate(argv: list[str]) -> None:
    """RUN [--suite NAME] [--out DIR]: scores a trained model.

    directions: the config's conditional tasks on its test split; writes metrics.json and gallery.png.
    fewshot: tasks that labelled examples in the context define, against the number of examples and beside controls;
    writes fewshot.json, fewshot.md and fewshot.png.
    probes: labels read from the frozen encoder's embeddings by neighbours and by a linear map; probes.json and .md.
    subsets: a label read from every subset of signals, with probes of every other, and with signals that are missing
    by chance or by the label; subsets.json, .md and .png.
    retrieval: samples found by embeddings of other signals of theirs; retrieval.json, .md and .png.
    """
    parser = argparse.ArgumentParser(
        prog="python -m m4 evaluate", description=evaluate.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="the folder of a run, e.g. runs/quickstart, or a model of the package")
    suites = ["directions", "fewshot", "probes", "retrieval", "subsets"]
    parser.add_argument("--suite", choices=suites, default="directions")
    parser.add_argument("--out", default="", help="folder of the results (default: RUN)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from m4.evals import fewshot, probes, retrieval, subsets, suite

    if args.suite == "fewshot":
        fewshot.evaluate(args.run, args.out)
    elif args.suite == "probes":
        probes.evaluate(args.run, args.out)
    elif args.suite == "retrieval":
        retrieval.evaluate(args.run, args.out)
    elif args.suite == "subsets":
        subsets.evaluate(args.run, args.out, seed=args.seed)
    else:
        suite.evaluate(args.run, args.out, seed=args.seed)


def plan(argv: list[str]) -> None:
    """CONFIG.py --topology NAME [--field value ...]: memory, collectives and speed of a run, without its devices.

    Compiles the run's training step for a TPU topology (v5e:16x16, v5p:4x4x8, v5e:16x16*2 for two slices; libtpu is
    needed, a TPU is not) or for simulated devices (cpu:8). Exits with 0 if it compiles and fits, 1 if it does not fit,
    2 if it cannot be tried. Further --field value pairs override fields of the config, such as --mesh.fsdp 64.
    """
    parser = argparse.ArgumentParser(
        prog="python -m m4 plan", description=plan.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a Python file that defines `config`")
    parser.add_argument("--topology", required=True, metavar="NAME")
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")
    args, overrides = parser.parse_known_args(argv)
    import jax

    jax.config.update("jax_platforms", "cpu")  # a device that is here is not wanted
    from m4 import plan as planning
    from m4.config import from_cli

    config = from_cli(plan.__doc__, [args.config, *overrides])
    try:
        result = planning.plan(config, args.topology)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(json.dumps(result) if args.json else planning.table(result))
    raise SystemExit(0 if result["fits"] else 1)


def generate(argv: list[str]) -> None:
    """RUN --inputs NAME=VALUE ... --targets NAME ... --out OUT: any signals in, any others out.

    VALUE is a file (rgb=photo.png, depth=depth.png, boxes=boxes.json), a folder of such files (one sample each), or the
    text itself (caption="a small red cube"; [MASK] in it stands for words to generate). A file PROMPTS.jsonl instead
    holds one sample a line, of any inputs each. Targets are generated in the order given, each seeing those before it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m m4 generate", description=generate.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    from m4 import generate as generation

    generation.add_arguments(parser)
    generation.main(parser.parse_args(argv))


def demo(argv: list[str]) -> None:
    """RUN [--port 7860]: a local page that takes any signals and shows how others are generated."""
    parser = argparse.ArgumentParser(prog="python -m m4 demo", description=demo.__doc__)
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
    from m4.sampler import Sampler, keep_compiled

    keep_compiled()
    sampler = Sampler.load(args.run, batch_size=1)
    try:
        from m4.demo import launch
    except ImportError as error:
        raise ValueError(f'the demo needs Gradio: pip install "m4-jax[demo]" ({error})') from error
    launch(
        sampler, Path(args.run).name, host=args.host, port=args.port, max_mb=args.max_upload_mb,
        max_storage_mb=args.max_storage_mb, allowed_hosts=args.allow_host,
    )  # fmt: skip


def export(argv: list[str]) -> None:
    """RUN OUT: a trained model as a folder of its own: config, tokenizers, and the parameters in one file."""
    from m4.checkpoints import export as export_run
    from m4.model_file import DTYPES

    parser = argparse.ArgumentParser(prog="python -m m4 export", description=export.__doc__)
    parser.add_argument("run", help="the folder of a run, e.g. runs/quickstart, or of one of its checkpoints")
    parser.add_argument("out", metavar="OUT", help="the folder to write; RUN elsewhere may name it, too")
    parser.add_argument("--dtype", default="BF16", choices=list(DTYPES), help="of the parameters (default: BF16)")
    args = parser.parse_args(argv)
    export_run(args.run, args.out, dtype=args.dtype)
    print(f"{args.out}: {sum(p.stat().st_size for p in Path(args.out).rglob('*') if p.is_file()) / 2**20:.1f} MiB")


def merge(argv: list[str]) -> None:
    """RUN_A RUN_B --out DIR: scores the models between two that are fine-tuned from one, and keeps the best.

    Writes merge.json, merge.md and merge.png (normalised validation scores over alpha; test scores of both ends and of
    the best), and the model whose validation scores have the highest mean into DIR, for RUN elsewhere to name it.
    Directions are those of RUN_B's config. A modality that RUN_B alone has keeps its parameters.
    """
    parser = argparse.ArgumentParser(
        prog="python -m m4 merge", description=merge.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_a", help="alpha 0: the folder of a run, or a model of the package")
    parser.add_argument("run_b", help="alpha 1: another, with all modalities of the first")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    from m4 import merging

    merging.sweep(args.run_a, args.run_b, args.alphas, args.out)


def convert(argv: list[str]) -> None:
    """IN OUT: a released 4M checkpoint (safetensors) to an m4 model file, or such a file back, bit for bit.

    Each tensor keeps its dtype, and the way back restores the very bytes. Pickles (.pth) are refused. A modality that
    m4 does not know is declared in a Python file: modalities = (Grid(name=..., ...),); the error message drafts it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m m4 convert", description=convert.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", help="a .safetensors file, or a folder with model.safetensors")
    parser.add_argument("out", metavar="OUT", help="the file to write, e.g. 4m_21_l.m4.safetensors")
    parser.add_argument("--declare", metavar="FILE", default="", help="a Python file with `modalities = (...)`")
    args = parser.parse_args(argv)
    from m4.config import load_config
    from m4.convert import convert as convert_file

    declared = load_config(args.declare, "modalities") if args.declare else ()
    print(convert_file(Path(args.source), Path(args.out), declared))


VERBS = {f.__name__: f for f in (pretokenize, data, plan, generate, evaluate, demo, export, merge, convert)}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<12}{f.__doc__.splitlines()[0]}" for name, f in VERBS.items()]
        print("usage: python -m m4 VERB ...\n\n" + "\n".join(lines) + "\n\npython -m m4 VERB --help tells more")
        raise SystemExit(0 if argv else 2)
    if argv[0] not in VERBS:
        raise ValueError(f"unknown verb {argv[0]!r}; {closest(argv[0], list(VERBS))}")
    VERBS[argv[0]](argv[1:])


if __name__ == "__main__":
    with ends_with_a_sentence():
        main(sys.argv[1:])
