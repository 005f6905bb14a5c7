"""CONFIG.py [--field value ...]: measures what training reads: counts, lengths, speed.

Prepares the data first (as training would), then reads and masks examples of the training stream.
Writes OUT/data.json and OUT/samples.png: a row for each example, a column for each modality with
the example, its input tokens and its targets. --field value pairs override fields of the config;
`train.py CONFIG.py --help` lists them.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from m4.command_line import parser_of
from m4.config import Config, from_cli
from m4.data.pretokenize import prepare
from m4.data.stream import ApplyMasking, Stream, by_example, examples
from m4.files import shown, write_atomically
from m4.pictures import write_png
from m4.tokens.batch import MaskedBatch
from m4.tokens.modality import Features, Grid, Modality, Sequence
from m4.tokens.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BATCH = 256
NUM_SAMPLES, TILE = 8, 128
UNSEEN = (200, 200, 200)


def inspect(config: Config, out: Path, *, num_examples: int) -> dict[str, Any]:
    """Prints statistics of the stream's first `num_examples` examples; writes OUT/data.json and OUT/samples.png."""
    prepared = prepare(config.datasets, config.tokenizers, config.data_dir, seed=config.seed)
    shards = prepared.shards("train")
    stream = examples(
        by_example(shards, config.datasets, config.masking), [d.weight for d in config.datasets], seed=config.seed
    )
    mask = ApplyMasking(config.masking, config.datasets, config.modalities, config.seed)
    counts = _Counts(config)
    for start in tqdm(range(0, num_examples, BATCH), desc="masking", unit="batch", mininterval=1):
        batch = [stream[i] for i in range(start, min(start + BATCH, num_examples))]
        masked = mask(batch)
        counts.add(batch, masked)
        if start == 0:
            picture = sheet(batch, masked, config, prepared.tokenizers)
    result = {
        "num_examples": num_examples,
        "datasets": {
            d.label: {
                "weight": d.weight / sum(x.weight for x in config.datasets),
                "share": counts.of_dataset[k] / num_examples,
                "num_examples": len(shards[k]),
                "bytes": sum(shard["bytes"] for shard in shards[k].shards.values()),
                "skipped": shards[k].manifest["skipped"]["num_examples"],
                "modalities": {
                    name: stored | counts.modality(k, name)
                    for name, stored in shards[k].manifest["modalities"].items()
                    if stored["num_examples"] and name in config.modalities.names
                },
            }
            for k, d in enumerate(config.datasets)
        },
        "modalities": {name: counts.modality(slice(None), name) for name in config.modalities.names},
        "slots": counts.slots(),
        "samples_per_s": round(_speed(config, shards), 1),
    }
    _print(result, config)
    out.mkdir(parents=True, exist_ok=True)
    write_png(out / "samples.png", picture)
    write_atomically(out / "data.json", json.dumps(result, indent=1).encode())
    logger.info(shown(f"{out}/samples.png, {out}/data.json"))
    return result


class _Counts:
    """Sums over examples of the stream: D data sets, M modalities."""

    def __init__(self, config: Config):
        self.config, self.names = config, config.modalities.names
        self.of_dataset = np.zeros(len(config.datasets), int)
        shape = len(config.datasets), len(self.names)
        self.present, self.tokens, self.longest, self.inputs, self.targets = (np.zeros(shape, int) for _ in range(5))
        self.without_targets = 0

    def add(self, batch, masked: MaskedBatch) -> None:
        dataset = np.array([k for _, (k, _) in batch])
        lengths = np.array([[sum(len(r[n]) for r in _records(e) if n in r) for n in self.names] for _, (_, e) in batch])
        self.of_dataset += np.bincount(dataset, minlength=len(self.of_dataset))
        np.add.at(self.present, dataset, lengths > 0)
        np.add.at(self.tokens, dataset, lengths)
        np.maximum.at(self.longest, dataset, lengths)
        for total, part in ((self.inputs, masked.inputs), (self.targets, masked.targets)):
            row, slot = np.nonzero(part.valid)
            np.add.at(total, (dataset[row], part.modality[row, slot]), 1)
        self.without_targets += int((~masked.targets.valid.any(1)).sum())

    def modality(self, dataset: int | slice, name: str) -> dict[str, Any]:
        """Figures of one modality in the stream's examples of one data set, or of all."""
        j = self.names.index(name)
        present, num_examples = self.present[dataset, j].sum(), self.of_dataset[dataset].sum()
        return {
            "examples_with_it": present / max(num_examples, 1),
            "mean_tokens": round(self.tokens[dataset, j].sum() / max(present, 1), 2),
            "longest": int(self.longest[dataset, j].max()),
            "input_share": self.inputs[dataset, j].sum() / max(self.inputs[dataset].sum(), 1),
            "target_share": self.targets[dataset, j].sum() / max(self.targets[dataset].sum(), 1),
        }

    def slots(self) -> dict[str, float]:
        """Shares of the batch's slots that hold a token (the others are padding, a waste of compute), and of the
        examples without anything to predict."""
        masking, num_examples = self.config.masking, self.of_dataset.sum()
        return {
            "inputs_filled": self.inputs.sum() / num_examples / masking.num_inputs,
            "targets_filled": self.targets.sum() / num_examples / masking.num_targets,
            "examples_without_targets": self.without_targets / num_examples,
        }


def _speed(config: Config, shards: Seq[Any]) -> float:
    """Examples a second, read, mixed, masked and batched: without the first batches, which start workers."""
    stream = Stream(
        shards, config.datasets, config.masking, config.modalities, batch_size=config.batch_size, seed=config.seed,
        num_workers=config.num_workers,
    )  # fmt: skip
    count = max(20, 2000 // config.batch_size)
    for _ in range(5):
        next(stream)
    start = time.perf_counter()
    for _ in range(count):
        next(stream)
    seconds = time.perf_counter() - start
    stream.close()
    return count * config.batch_size / seconds


def _print(result: dict[str, Any], config: Config) -> None:
    print(f"\nmeasured on {result['num_examples']:,} examples of the training stream\n")
    print(f"{'data set':<16}{'weight':>8}{'share':>8}{'examples':>12}{'MiB':>9}{'skipped':>9}")
    for name, d in result["datasets"].items():
        figures = f"{d['weight']:>8.3f}{d['share']:>8.3f}{d['num_examples']:>12,}{d['bytes'] / 2**20:>9.1f}"
        print(f"{name:<16}{figures}{d['skipped']:>9,}")
    print(f"\n{'modality':<32}{'present':>8}{'tokens':>8}{'longest':>9}{'inputs':>8}{'targets':>9}{'codes used':>22}")
    several = len(result["datasets"]) > 1
    for name, total in result["modalities"].items():
        parts = {label: d["modalities"][name] for label, d in result["datasets"].items() if name in d["modalities"]}
        for label, m in {"": total, **(parts if several else {})}.items():
            stored = parts[label] if label else next(iter(parts.values()), {}) if not several else {}
            vocab = stored["vocab_size"] if stored else 0
            used = f"{stored['codes_used']:,} of {vocab:,}" if vocab else ""
            figures = f"{m['examples_with_it']:>8.3f}{m['mean_tokens']:>8.1f}{m['longest']:>9}"
            title = f"  of {label}" if label else name
            print(f"{title:<32}{figures}{m['input_share']:>8.3f}{m['target_share']:>9.3f}{used:>22}")
    slots = result["slots"]
    masking = config.masking
    print(
        f"\nslots with a token: {slots['inputs_filled']:.1%} of {masking.num_inputs} inputs, "
        f"{slots['targets_filled']:.1%} of {masking.num_targets} targets; "
        f"{slots['examples_without_targets']:.1%} of the examples leave nothing to predict; "
        f"{result['samples_per_s']:,.0f} examples/s with num_workers={config.num_workers}, "
        f"batch_size={config.batch_size}"
    )


def _records(example: Any) -> list[dict[str, np.ndarray]]:
    """An episode's examples; an ordinary example is one."""
    return example if isinstance(example, list) else [example]


def sheet(batch, masked: MaskedBatch, config: Config, tokenizers: dict[str, Tokenizer]) -> np.ndarray:
    """uint8 picture: rows = examples of all data sets; columns = modalities: the example above its input and target."""
    modalities = config.modalities
    of_dataset = [[i for i, (_, (k, _)) in enumerate(batch) if k == d] for d in range(len(config.datasets))]
    shown = [i for i in itertools.chain(*itertools.zip_longest(*of_dataset)) if i is not None][:NUM_SAMPLES]
    header, gap, left = 32, 4, 70
    width, height = TILE + gap, TILE + TILE // 2 + 2 * gap
    canvas = Image.new("RGB", (left + len(modalities) * width + gap, header + len(shown) * height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((3, 3), "below each example: what goes in (blue), what must come out (orange)", fill="black")
    for (row, i), (j, m) in itertools.product(enumerate(shown), enumerate(modalities)):
        dataset, example = batch[i][1]
        example = _records(example)[-1]  # an episode's query
        x, y = left + gap + j * width, header + row * height
        pen.text((x, 18), m.name[:20], fill="black")
        pen.text((3, y), config.datasets[dataset].label[:10], fill="black")
        if m.name not in example:
            pen.text((x + 4, y + 4), "missing", fill="grey")
            continue
        tile = Image.fromarray(_draw(m, example[m.name], tokenizers[m.name]))
        tile.thumbnail((TILE, TILE))
        side = min(TILE / tile.width, TILE / tile.height)
        tile = tile.resize((round(tile.width * side), round(tile.height * side)), Image.Resampling.NEAREST)
        canvas.paste(tile, (x, y))
        for part, offset in ((masked.inputs, 0), (masked.targets, TILE // 2 + gap // 2)):
            position, modality = np.asarray(part.position[i]), np.asarray(part.modality[i])
            picked = position[np.asarray(part.valid[i]) & (modality == j)]
            small = Image.fromarray(_picked(m, picked, part is masked.inputs)).resize(
                (TILE // 2 - gap, TILE // 2 - gap), Image.Resampling.NEAREST
            )
            canvas.paste(small, (x + offset, y + TILE + gap))
    return np.asarray(canvas)


def _draw(m: Modality, stored: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    if isinstance(m, Features) and not hasattr(tokenizer, "decode"):
        return np.full((TILE, TILE, 3), 255, np.uint8)
    return tokenizer.draw(
        tokenizer.decode([stored.astype(np.int32) if not isinstance(m, Features) else stored])[0], image=None
    )


def _picked(m: Modality, positions: np.ndarray, is_input: bool) -> np.ndarray:
    """uint8 [h w 3]: blue (inputs) or orange (targets) at these positions; a sequence fills rows from the left."""
    shape = m.shape if isinstance(m, Grid | Features) and len(m.shape) == 2 else None
    if shape is None:
        side = int(np.ceil(np.sqrt(max(m.max_tokens, positions.max(initial=0) + 1))))
        shape = (side, side)
    picture = np.full((int(np.prod(shape)), 3), UNSEEN, np.uint8)
    picture[positions] = (40, 90, 200) if is_input else (230, 120, 20)
    if isinstance(m, Sequence):
        picture[m.max_tokens :] = 255
    return picture.reshape(*shape, 3)


def main(argv: list[str]) -> None:
    parser = parser_of("data", __doc__)
    parser.add_argument("config", help="the Python file with the config, e.g. configs/quickstart.py")
    parser.add_argument("--num-examples", type=int, default=4096, metavar="N", help="examples measured (default: 4096)")
    parser.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="folder of the results (default: data in the run's)"
    )
    args, overrides = parser.parse_known_args(argv)
    if args.num_examples < 1:
        raise ValueError(f"--num-examples {args.num_examples} must be at least 1")

    config = from_cli(__doc__, [args.config, *overrides])
    config.check()
    inspect(config, args.out or config.folder / "data", num_examples=args.num_examples)
