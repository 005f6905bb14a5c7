"""CONFIG.py --topology NAME: memory and speed of a run on devices that are not there.

Compiles the run's training step for a TPU topology (v5e:16x16, v5p:4x4x8, v5e:16x16*2 for two
slices; libtpu is needed, a TPU is not) or for simulated devices (cpu:8), and prints memory,
communication and time of a step. Exits with 0 if it compiles and fits, 1 if it does not fit, 2 if
it cannot be tried. --field value pairs override fields of the config, such as --mesh.fsdp 64;
`train.py CONFIG.py --help` lists them.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from m4.command_line import parser_of
from m4.config import Config, from_cli
from m4.data.stream import ApplyMasking
from m4.distributed.constraints import BATCH
from m4.distributed.mesh import check_sizes
from m4.interchange import fourm
from m4.tokens.batch import MaskedBatch, Targets, Tokens
from m4.tokens.modality import Features, Grid, Modalities
from m4.training import flops
from m4.training.trainer import Trainer

TPU_KINDS = {
    "v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"
}  # fmt: skip

ENVIRONMENT = {  # libtpu would look for a TPU otherwise
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}  # fmt: skip

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
AS_4M = "num_parameters_as_4m_counts"


class CannotTry(ValueError):
    """The topology cannot be compiled for here."""


def devices_of(topology: str) -> list[Any]:
    """Devices of "cpu:8", "v5e:16x16", or "v5e:16x16*2" for two slices. CannotTry names what is missing."""
    name, _, shape = topology.partition(":")
    if name == "cpu":
        if not shape.isdigit() or int(shape) < 1:
            raise CannotTry(f"topology {topology!r}: cpu:N takes a number of simulated devices, such as cpu:8")
        try:
            jax.config.update("jax_num_cpu_devices", int(shape))
        except RuntimeError as error:
            raise CannotTry(f"topology {topology!r}: {error}") from error
        return jax.devices("cpu")
    if name not in TPU_KINDS:
        kinds = ", ".join(f"{kind}:..." for kind in ("cpu", *TPU_KINDS))
        raise CannotTry(f"unknown topology {topology!r}; allowed: {kinds}, such as v5e:16x16, v5p:4x4x8, v5e:16x16*2")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise CannotTry(
            f'topology {topology!r} needs libtpu (no TPU): pip install "jax[tpu]=={jax.__version__}"'
        ) from error
    from jax.experimental import topologies

    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    slice_name, _, slices = topology.partition("*")
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_name, **({"num_slices": int(slices)} if slices else {})
        )
    except Exception as error:  # libtpu has errors of its own
        raise CannotTry(f"topology {topology!r}: {str(error).splitlines()[0]}") from error
    return list(description.devices)


def abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> MaskedBatch:
    """Shapes, dtypes and shardings of a masked batch."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH))
    masking = config.masking

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)

    def slots(kind, count):
        fields = [array(np.bool_ if name == "valid" else np.int32, count) for name in kind._fields]
        return kind(*fields)

    features = {
        m.name: array(m.dtype, min(m.max_tokens, masking.num_inputs), m.size)
        for m in config.modalities
        if isinstance(m, Features)
    }
    return MaskedBatch(slots(Tokens, masking.num_inputs), slots(Targets, masking.num_targets), features)


def random_example(modalities: Modalities, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """An example with every modality; a sequence has a random length."""
    example = {}
    for m in modalities:
        if isinstance(m, Features):
            example[m.name] = np.zeros((m.max_tokens, m.size), m.dtype)
        elif isinstance(m, Grid):
            example[m.name] = rng.integers(0, m.vocab_size, m.max_tokens)
        else:
            ids = rng.integers(m.first_sentinel + m.num_sentinels, m.vocab_size, rng.integers(1, m.max_length))
            example[m.name] = np.append(ids, m.end_id)
    return example


def mean_targets(config: Config, count: int = 256) -> dict[str, float]:
    """Target tokens of each modality in an example, on average over random ones that have all modalities."""
    rng, names = np.random.default_rng(0), config.modalities.names
    dataset = config.datasets[0]
    size = dataset.masked_by(config.masking).num_records
    example = lambda: random_example(config.modalities, rng)  # noqa: E731
    examples = [[example() for _ in range(size)] if size else example() for _ in range(count)]
    mask = ApplyMasking(config.masking, (dataset,), config.modalities, seed=0)
    targets = mask([(i, (0, e)) for i, e in enumerate(examples)]).targets
    return dict(zip(names, np.bincount(targets.modality[targets.valid], minlength=len(names)) / count, strict=True))


def plan(config: Config, topology: str) -> dict[str, Any]:
    """The table as one dict; "fits" says whether the step compiles and fits. CannotTry or ValueError otherwise.

    Memory per device and the list of collectives are those of the compiled step. Time is a roofline: what arithmetic,
    memory (all used bytes, written and read once) and network would each take at their data sheets' speeds.
    """
    config.check()
    devices = devices_of(topology)
    mesh = config.mesh.make(devices)
    check_sizes(config.batch_size, config.masking.num_targets, config.micro_batches, config.model.width, mesh)
    trainer = Trainer(config, mesh)
    state, batch = trainer.abstract_state, abstract_batch(config, mesh)
    loaded = trainer.abstract(trainer.load())
    kind = devices[0].device_kind
    data = flops.device_data(kind)
    model_flops = config.batch_size * flops.model_flops(
        config.model, config.modalities, config.masking.num_inputs, config.masking.num_targets, mean_targets(config)
    )
    result: dict[str, Any] = {
        "topology": topology,
        "device": kind,
        "num_devices": mesh.size,
        "mesh": dict(mesh.shape),
        "num_parameters": trainer.num_parameters,
        AS_4M: fourm.num_parameters(config.model, config.modalities),
        "bytes_per_device": {
            "weights": _bytes_on_device(state.params), "optimizer": _bytes_on_device(state.optimizer),
            "average": _bytes_on_device(state.average), "objectives": _bytes_on_device(loaded),
        },
        "model_flops_per_step": model_flops,
        "tokens_per_step": config.batch_size * (config.masking.num_inputs + config.masking.num_targets),
    }  # fmt: skip
    limit = data[1] if data else None
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = trainer.step.trace(state, batch, jax.ShapeDtypeStruct((), np.int32), loaded)
        compiled, why = _compiled(traced.lower(lowering_platforms=(devices[0].platform,)))
    if compiled is None:
        return {**result, "fits": False, "why": why, "advice": _advice(config, mesh)}
    result["compile_s"] = round(time.perf_counter() - start, 1)
    memory = compiled.memory_analysis()
    arguments_and_outputs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = arguments_and_outputs + memory.temp_size_in_bytes
    compiled_bytes = {"activations": memory.temp_size_in_bytes, "peak": peak, "limit": limit}
    result["bytes_per_device"] = {**result["bytes_per_device"], **compiled_bytes}
    result["fits"] = limit is None or peak <= limit
    if limit is not None and not result["fits"]:
        result["why"] = f"{peak / 2**30:.1f} GiB are needed, {limit / 2**30:.1f} GiB are there"
        result["advice"] = _advice(config, mesh)
    sent = collections.Counter()
    for name, num_bytes, times in collectives(compiled.as_text()):
        sent[name] += num_bytes * times
    result["collective_bytes_per_device"] = dict(sent)
    if data is not None:
        result["roofline"] = _roofline(config, data, model_flops / mesh.size, peak, sum(sent.values()))
        result["roofline"]["tokens_per_s"] = result["tokens_per_step"] / result["roofline"]["step_s"]
    return result


def _roofline(config: Config, data: Any, model_flops: float, used_bytes: int, sent_bytes: float) -> dict[str, float]:
    """Seconds of a step on one device, by its data sheet."""
    arithmetic = hardware_flops(config, model_flops) / data[0]
    traffic = 2 * used_bytes / data[2]  # each used byte is written once and read once
    network = sent_bytes / data[3]
    step_s = max(arithmetic, traffic, network)
    return {
        "arithmetic_s": arithmetic, "memory_s": traffic, "network_s": network, "step_s": step_s,
        "mfu": model_flops / data[0] / step_s,
    }  # fmt: skip


def _compiled(lowered: Any) -> tuple[Any, str]:
    """The compiled step; or None, and the compiler's reason why it does not fit."""
    try:
        return lowered.compile(), ""
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        lines = [line.strip() for line in str(error).splitlines() if re.search(r"Used|Exceeded|exceeded", line)]
        return None, (lines or [str(error).splitlines()[0]])[0]


def hardware_flops(config: Config, model_flops: float) -> float:
    """FLOPs including those that the backward pass computes again."""
    return model_flops * {"none": 1.0, "blocks": 4 / 3}[config.model.remat]


def _bytes_on_device(tree: Any) -> int:
    """Bytes of a tree's arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def collectives(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, bytes that a device sends, times a step) of every collective in a compiled program's text.

    In a group of n devices a ring moves (n - 1) / n of the larger array, twice for an all-reduce. A collective in a
    loop counts once for each turn, if the compiler knows their number. TPU compilers write one collective that overlaps
    with several fusions into each of them: a channel counts once.
    """
    # 1. The lines of each computation.
    computations, current = collections.defaultdict(list), ""
    for line in text.splitlines():
        if (begin := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line)) and not line.startswith(" "):
            current = begin[1]
        computations[current].append(line)
    # 2. Who calls a computation, and how often: the body of a loop once for each turn.
    called_by: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            count = 1
            if known := re.search(r'known_trip_count.{0,4}\{.{0,2}n.{0,4}"(\d+)"', line):
                count = int(known[1])
            elif condition := re.search(r" while\(.*condition=%?([\w.-]+)", line):  # on TPUs
                # A condition whose computation is not printed has no known limit.
                limits = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", "\n".join(computations.get(condition[1], ())))
                count = int(limits[0]) if len(limits) == 1 else 1
            for callee in re.findall(r"(?:body|to_apply|calls|condition)=%?([\w.-]+)", line):
                called_by[callee].append((name, count if f"body=%{callee}" in line or f"body={callee}" in line else 1))

    def times(name: str) -> int:
        return sum(count * times(caller) for caller, count in called_by[name]) if called_by[name] else 1

    # 3. The collectives of each computation.
    seen = set()
    pattern = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
    for name, lines in computations.items():
        for line in lines:
            if (match := pattern.search(line)) is None:
                continue
            shapes, kind, is_start = match.groups()
            channel = re.search(r"channel_id=(\d+)", line)
            if channel and (kind, channel[1]) in seen:
                continue
            if channel:
                seen.add((kind, channel[1]))
            sizes = [
                _dtype_bytes(dtype) * math.prod(int(n) for n in dims.split(",") if n)
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
            ]
            # An asynchronous operation has the shapes of operand and result, others those of all results.
            size = max(sizes) if is_start and kind != "all-reduce" else sum(sizes)
            n = _group_size(line)
            if kind == "reduce-scatter" and not is_start:
                size *= n
            if name.startswith("all-reduce-scatter"):  # on TPUs: a fused all-reduce
                kind = "reduce-scatter"
            factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
            yield kind, int(size * (factor[kind] if kind in factor else (n - 1) / n)), times(name)


def _dtype_bytes(dtype: str) -> int:
    """Bytes of a type by XLA's name, which has the bits: bf16, s32, f8e4m3fn; pred takes a byte."""
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1


def _group_size(line: str) -> int:
    if match := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    return 2


def _advice(config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    advice = []
    if mesh.shape["fsdp"] < mesh.size and config.model.width % (2 * mesh.shape["fsdp"] * mesh.shape["tensor"]) == 0:
        advice.append(f"shard parameters over more devices: --mesh.fsdp {min(mesh.size, 2 * mesh.shape['fsdp'])}")
    if config.model.remat == "none":
        advice.append("keep less for the backward pass: --model.remat blocks")
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size // (ways * config.micro_batches) >= 2:
        advice.append(f"compute a batch in more parts: --micro-batches {2 * config.micro_batches}")
    elif config.batch_size > ways:
        advice.append(f"a smaller batch: --batch-size {config.batch_size // 2}")
    return advice or ["use more devices, or devices with more memory"]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    gib = lambda n: "-" if n is None else f"{n / 2**30:.2f} GiB"  # noqa: E731
    rows = [
        ("devices", f"{result['num_devices']} x {result['device']}, mesh {result['mesh']}"),
        ("parameters", f"{result['num_parameters']:,} (as 4M counts: {result[AS_4M]:,})"),
        *((f"{name} per device", gib(size)) for name, size in result["bytes_per_device"].items() if size),
        ("model FLOPs per step", f"{result['model_flops_per_step']:.4g}"),
    ]
    if "compile_s" in result:
        rows.append(("compiled in", f"{result['compile_s']} s"))
    # A plan that did not compile has no collectives.
    for name, size in result.get("collective_bytes_per_device", {}).items():
        rows.append((f"{name} per step", gib(size)))
    if "roofline" in result:
        r = result["roofline"]
        parts = f"arithmetic {r['arithmetic_s']:.4f}, memory {r['memory_s']:.4f}, network {r['network_s']:.4f}"
        rows.append(("step, at best", f"{r['step_s']:.4f} s ({parts})"))
        rows.append(("MFU, at best", f"{r['mfu']:.0%} ({r['tokens_per_s']:,.0f} tokens/s)"))
    rows.append(("fits", "yes" if result["fits"] else f"no: {result['why']}"))
    # A plan that fits has no advice.
    rows += [("instead", line) for line in result.get("advice", [])]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)


def main(argv: list[str]) -> None:
    parser = parser_of("plan", __doc__)
    parser.add_argument("config", help="the Python file with the config, e.g. configs/quickstart.py")
    parser.add_argument("--topology", required=True, metavar="NAME", help="devices, e.g. v5e:16x16 or cpu:8")
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")
    args, overrides = parser.parse_known_args(argv)

    jax.config.update("jax_platforms", "cpu")  # this machine's own devices are not used

    config = from_cli(__doc__, [args.config, *overrides])
    try:
        result = plan(config, args.topology)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(json.dumps(result) if args.json else table(result))
    raise SystemExit(0 if result["fits"] else 1)
