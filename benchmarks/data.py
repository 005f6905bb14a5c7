"""Speed and memory of the training stream: token shards of 4M-7 read, mixed, masked and batched.

Writes two data sets of random tokens (all 7 token modalities, and captions alone; with pixels too if asked for) into a
temporary folder, and reads their mixture 4 : 1 with budgets of 128 / 128. Prints one JSON line per number of worker
processes, the headline (the fastest) last. rss_mib: memory of this process and its workers after the first tenth of
the batches and at the end.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tokenizers"))

import measure
import numpy as np
import psutil
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from examples import random_example

from m4.data.dataset import Dataset
from m4.data.stream import Stream
from m4.data.token_shards import VERSION, TokenShards
from m4.interchange import fourm
from m4.masking.dirichlet import DirichletMasking, Masking, Strategy
from m4.tokens.modality import Features, Modalities
from m4.tokens.records import compact


def write(folder: Path, modalities: Modalities, names: list[str], count: int) -> None:
    folder.mkdir()
    rng, path = np.random.default_rng(0), folder / "train-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(count):
        example = random_example(modalities, rng)
        writer.write(safetensors.numpy.save({n: compact(example[n], modalities.named(n)) for n in names}))
    writer.close()
    manifest = {
        "version": VERSION,
        "num_examples": count,
        "shards": {path.name: {"num_examples": count, "bytes": path.stat().st_size}},
        "tokenizers": {},
        "sets": [{"modalities": names, "num_examples": count}],
    }
    (folder / "train.json").write_text(json.dumps(manifest))


def rss_mib() -> int:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return round(sum(p.memory_info().rss for p in processes) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", action="store_true", help="with patches of 224 x 224 pixels (150 kB an example)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-batches", type=int, default=500)
    parser.add_argument("--num-examples", type=int, default=4096, help="of the larger data set")
    args = parser.parse_args()
    names = [n for n in fourm.MOD7 if args.pixels or n != "rgb@224"]
    modalities = Modalities([fourm.modality(name) for name in names])
    targets = {m.name: 0.5 for m in modalities if m.is_target}
    strategies = (
        Strategy(inputs={names[0]: 1000.0}, targets=targets),
        Strategy(inputs={m.name: 0.5 for m in modalities}, targets=targets),
    )
    masking = Masking(strategies=strategies)
    words = (Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0}),)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("all", "captions")]
        write(folders[0], modalities, names, args.num_examples)
        write(folders[1], modalities, ["caption"], args.num_examples // 4)
        datasets = [
            Dataset(tokens=str(folders[0]), weight=4.0),
            Dataset(tokens=str(folders[1]), weight=1.0, masking=DirichletMasking(strategies=words)),
        ]
        for num_workers in args.workers:
            shards = [TokenShards(f, "train") for f in folders]
            stream = Stream(
                shards, datasets, masking, modalities, batch_size=args.batch_size, seed=0, num_workers=num_workers
            )
            for _ in range(20):
                next(stream)
            start = last = time.perf_counter()
            part, rates, memory = max(1, args.num_batches // 10), [], []
            for i in range(1, args.num_batches + 1):
                next(stream)
                if i % part == 0:
                    now = time.perf_counter()
                    rates.append(part * args.batch_size / (now - last))
                    last = now
                    memory.append(rss_mib())
            seconds = time.perf_counter() - start
            stream.close()
            lines.append(
                {
                    "setting": "4m_mod7_128_128" + "_pixels" * any(isinstance(m, Features) for m in modalities),
                    "samples_per_s": round(args.num_batches * args.batch_size / seconds, 1),
                    "samples_per_s_range": [round(min(rates), 1), round(max(rates), 1)],
                    "num_workers": num_workers,
                    "batch_size": args.batch_size,
                    "num_batches": args.num_batches,
                    "rss_mib": [memory[0], memory[-1]],
                }
            )
    for line in sorted(lines, key=lambda line: line["samples_per_s"]):
        print(json.dumps({**line, **measure.machine()}), flush=True)


if __name__ == "__main__":
    main()
