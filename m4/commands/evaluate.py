"""RUN [--suite NAME] [--out DIR]: scores a trained model.

directions: the config's conditional tasks on its test split; writes metrics.json and gallery.png.
fewshot: tasks that labelled examples in the context define, against the number of examples and beside controls;
writes fewshot.json, fewshot.md and fewshot.png.
probes: labels read from the frozen encoder's embeddings by neighbours and by a linear map; probes.json and .md.
subsets: a label read from every subset of signals, with probes of every other, and with signals that are missing
by chance or by the label; subsets.json, .md and .png.
retrieval: samples found by embeddings of other signals of theirs; retrieval.json, .md and .png.
"""

from __future__ import annotations

from m4.command_line import parser_of
from m4.evaluation import conditional_generation, few_shot, modality_subsets, probes, retrieval


def main(argv: list[str]) -> None:
    parser = parser_of("evaluate", __doc__)
    parser.add_argument("run", help="the folder of a run, e.g. runs/quickstart, or a model of the package")
    suites = ["directions", "fewshot", "probes", "retrieval", "subsets"]
    parser.add_argument("--suite", choices=suites, default="directions")
    parser.add_argument("--out", default="", help="folder of the results (default: RUN)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    if args.suite == "fewshot":
        few_shot.evaluate(args.run, args.out)
    elif args.suite == "probes":
        probes.evaluate(args.run, args.out)
    elif args.suite == "retrieval":
        retrieval.evaluate(args.run, args.out)
    elif args.suite == "subsets":
        modality_subsets.evaluate(args.run, args.out, seed=args.seed)
    else:
        conditional_generation.evaluate(args.run, args.out, seed=args.seed)
