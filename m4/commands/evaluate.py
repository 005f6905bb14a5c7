"""RUN [--suite NAME] [--out DIR]: scores a trained model.

directions  generation of one signal from others (ConditionalGeneration), on held-out examples:
            metrics.json, gallery.png
fewshot     tasks that labelled examples in the prompt define, against the number of examples and
            beside controls: fewshot.json, .md, .png
probes      labels predicted from the frozen encoder's embeddings, by nearest neighbours and by a
            linear map: probes.json, .md
subsets     a label predicted from every subset of signals, with probes of every other, and with
            signals missing at random or depending on the label: subsets.json, .md, .png
retrieval   samples found by the embeddings of their other signals: retrieval.json, .md, .png

Evaluators of the run's config are found by their names, too.
"""

from __future__ import annotations

from m4.command_line import parser_of
from m4.evaluation.base import evaluate


def main(argv: list[str]) -> None:
    parser = parser_of("evaluate", __doc__)
    parser.add_argument("run", help="folder of a run, e.g. runs/quickstart, or a model in the package: scenes")
    parser.add_argument("--suite", default="directions", metavar="NAME", help="default: directions")
    parser.add_argument("--out", default="", metavar="DIR", help="folder of the results (default: RUN)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of generation (default: 0)")
    args = parser.parse_args(argv)
    evaluate(args.run, args.suite, args.out, seed=args.seed)
