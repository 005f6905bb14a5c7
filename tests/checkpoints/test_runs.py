"""What goes wrong around a run ends in a sentence: numbers, config files, measures, signals, locks, a full disk."""

import dataclasses
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, environment
from flax import nnx
from PIL import Image

from m4.checkpoints.numbered import Checkpoints, steps_in
from m4.checkpoints.runs import load_run, write_run
from m4.command_line import ends_with_a_sentence, error_sentence, finishing, system_error
from m4.config import load_config
from m4.data.dataset import Dataset
from m4.data.sources.folders import Folders
from m4.errors import MAX_SEED, check_seed
from m4.evaluation.base import evaluate
from m4.evaluation.conditional_generation import ConditionalGeneration, ConditionalTask, model_digest
from m4.evaluation.gallery import gallery
from m4.evaluation.measures.attributes import ForegroundOverlap
from m4.evaluation.measures.boxes import BoxAccuracy
from m4.evaluation.measures.depth import DepthAccuracy
from m4.evaluation.measures.maps import MapAccuracy
from m4.inference.parallel import MaskGIT
from m4.inference.sampler import Sampler
from m4.model.encoder_decoder import Model
from m4.tokens.modality import Modalities
from m4.training import flops
from m4.training.health import Health
from m4.training.metrics import Metrics
from m4.training.optimizer import OptimizerConfig
from m4.training.trainer import random_key
from m4_tokenizers.modalities.boxes import BoxRecipe

TINY = "tests/tiny_config.py"


@pytest.fixture(scope="module")
def tiny():
    return load_config(str(ROOT / TINY))


# ---- Numbers --------------------------------------------------------------------------------------------------------


def with_number(value, kind, number):
    """Copies of a config, each with `number` in place of another field of this kind, wherever it is; with its place."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.init:
                for place, item in with_number(getattr(value, field.name), kind, number):
                    yield (
                        f"{field.name}.{place}",
                        lambda v=value, n=field.name, i=item: dataclasses.replace(v, **{n: i()}),
                    )
    elif isinstance(value, tuple | list):
        for k, old in enumerate(value):
            for place, item in with_number(old, kind, number):
                yield f"{k}.{place}", lambda k=k, i=item: type(value)([*value[:k], i(), *value[k + 1 :]])
    elif isinstance(value, dict):
        for key, old in value.items():
            for place, item in with_number(old, kind, number):
                yield f"{key}.{place}", lambda key=key, i=item: {**value, key: i()}
    elif type(value) is kind:
        yield "", lambda: number


@pytest.mark.parametrize("kind,number", [(float, math.nan), (float, math.inf), (float, -math.inf), (int, 10**20)])
def test_no_number_of_a_config_may_be_without_meaning(tiny, kind, number):
    places = list(with_number(tiny, kind, number))
    assert len(places) > (30 if kind is float else 60)
    for place, make in places:
        with pytest.raises(ValueError):
            make().check()
            pytest.fail(f"{place}={number} is taken")


def test_values_of_the_optimizer_have_bounds(tiny):
    refused = {
        "learning_rate": [0.0, -1.0, 1e39, 1e-50], "b1": [1.0, 1.5, -0.1, 1 - 1e-9], "b2": [1.0, -1.0, 1 - 1e-9],
        "weight_decay": [-1.0, 1e300],
        "warmup_steps": [-5], "clip_norm": [-1.0],
    }  # fmt: skip
    for field, values in refused.items():
        for value in values:
            config = dataclasses.replace(tiny, optimizer=dataclasses.replace(tiny.optimizer, **{field: value}))
            with pytest.raises(ValueError, match=re.escape(f"optimizer.{field}={value} must be")):
                config.check()
    for field, value in {"b1": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "clip_norm": 0.0}.items():
        dataclasses.replace(tiny, optimizer=dataclasses.replace(tiny.optimizer, **{field: value})).check()
    with pytest.raises(ValueError, match="num_steps=10.5 must be a whole number"):
        dataclasses.replace(tiny, num_steps=10.5).check()


def test_a_run_of_one_step_trains():
    for warmup in (0, 1, 100):
        rate = [float(OptimizerConfig(learning_rate=0.5, warmup_steps=warmup).schedule(n)(0)) for n in (1, 2)]
        assert rate[0] == 0.5 and rate[1] == (0.5 if warmup == 0 else 0.0)


def test_seeds_are_taken_whole_or_refused(tiny):
    seeds = (0, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1)
    keys = [tuple(np.asarray(jax.random.key_data(random_key(seed)))) for seed in seeds]
    assert len({*keys}) == len(seeds)
    for seed, key in zip(seeds[:4], keys, strict=False):  # runs of before stay what they were
        assert key == tuple(np.asarray(jax.random.key_data(jax.random.key(seed))))
    for seed in (*seeds, MAX_SEED):
        check_seed(seed)
        dataclasses.replace(tiny, seed=seed).check()
    for seed in (-1, 2**63, 10**20):
        for check in (lambda s=seed: check_seed(s), lambda s=seed: dataclasses.replace(tiny, seed=s).check()):
            with pytest.raises(ValueError, match=f"seed={seed} must be a whole number from 0 to {2**63 - 1}"):
                check()


# ---- Config files ---------------------------------------------------------------------------------------------------

BAD_FILES = {
    "config = = 3": (1, "SyntaxError: invalid syntax"),
    "import os\n\nimport no_such_module_here": (3, "ModuleNotFoundError: No module named 'no_such_module_here'"),
    "a = 1\nconfig = a / 0": (2, "ZeroDivisionError: division by zero"),
    "raise SystemExit(0)": (1, "SystemExit: 0"),
    "def f(n):\n    return f(n + 1)\n\n\nf(0)": (2, "RecursionError"),
    "raise ValueError('no such thing')": (1, "no such thing"),
    "config = nothing": (1, "NameError: name 'nothing' is not defined"),
    "class Own(BaseException):\n    pass\n\n\nraise Own('odd')": (5, "Own: odd"),
    "assert False": (1, "AssertionError"),
    "config = " + "(" * 500 + ")" * 500: (1, "SyntaxError: too many nested parentheses"),
    "x = 'a\0b'": (0, "SyntaxError: source code string cannot contain null bytes"),
    "from m4.masking.dirichlet import Strategy\n\nStrategy(inputs={}, targets={}, input_share=(2.0, 1.0))": (
        3,
        "input_share=(2.0, 1.0)",
    ),
}


def test_a_config_that_raises_is_one_sentence_with_its_line(tmp_path):
    for i, (text, (line, words)) in enumerate(BAD_FILES.items()):
        file = tmp_path / f"bad_{i}.py"
        file.write_text(text)
        with pytest.raises(ValueError) as caught:
            load_config(str(file))
        message = str(caught.value)
        assert message.startswith(f"{file}, line {line}: {words}" if line else str(file)), message
        assert words in message and "\n" not in message
    (tmp_path / "latin.py").write_bytes(b"config = '\xe9'")
    with pytest.raises(ValueError, match="latin.py.*SyntaxError"):
        load_config(str(tmp_path / "latin.py"))
    (tmp_path / "outer.py").write_text(
        f"from m4.config import load_config\n\nconfig = load_config('{tmp_path}/bad_2.py')"
    )
    with pytest.raises(ValueError, match="outer.py, line 3: .*bad_2.py, line 2: ZeroDivisionError"):
        load_config(str(tmp_path / "outer.py"))
    (tmp_path / "config.txt").write_text("config = 3")  # any extension is read as Python
    assert load_config(str(tmp_path / "config.txt")) == 3


# ---- Measures -------------------------------------------------------------------------------------------------------


def test_depth_and_maps_take_all_pixels_where_no_instance_is_known():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 5, (3, 4, 4)).astype(np.float32)
    depth[0, 0] = 0
    none = [{"depth": d} for d in depth]
    unknown = [{"depth": d, "instance": np.zeros((4, 4), np.int32)} for d in depth]
    objects = [{"depth": d, "instance": np.eye(4, dtype=np.int32)} for d in depth]
    some = [*objects[:1], *unknown[1:]]
    known = [depth[0][depth[0] > 0], depth[1].ravel(), depth[2].ravel()]
    guess = [np.full((4, 4), 2.0)] * 3
    right = lambda values: np.mean([np.maximum(2 / v, v / 2) < 1.25 for v in np.concatenate(values)])  # noqa: E731
    for examples in (none, unknown):
        assert DepthAccuracy().score(guess, examples)["value"] == right(known)
        assert DepthAccuracy().baseline(examples, examples)["value"] >= 0
    diagonals = [np.diag(d)[np.diag(d) > 0] for d in depth]
    assert DepthAccuracy().score(guess, objects)["value"] == right(diagonals)
    assert DepthAccuracy().score(guess, some)["value"] == right(diagonals[:1])
    with pytest.raises(ValueError, match="no pixel of 3 examples has a known depth"):
        DepthAccuracy().score(guess, [{"depth": np.zeros((4, 4), np.float32)}] * 3)
    measure = MapAccuracy(signal="depth", tolerance=0.5)
    for examples in (none, unknown):
        assert measure.score(guess, examples)["value"] == np.mean(abs(depth - 2) <= 0.5)
        assert np.isfinite(measure.baseline(examples, examples)["mean_error"])
    assert measure.score(guess, objects)["value"] == np.mean([abs(np.diag(d) - 2) <= 0.5 for d in depth])


@pytest.fixture(scope="module")
def own(tmp_path_factory, tiny):
    """A run on folders of rgb and depth, without instances; from the ninth on every fourth example has no depth."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 16)):
        for i in range(count):
            signals = {"rgb": rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)}
            if i < 8 or i % 4:
                signals["depth"] = rng.integers(1000, 9000, (64, 64)).astype(np.uint16)
            for name, array in signals.items():
                (root / split / name).mkdir(exist_ok=True, parents=True)
                Image.fromarray(array).save(root / split / name / f"{i:03d}.png")
    source = Folders(root=str(root), allow_missing=True)
    return dataclasses.replace(tiny, datasets=(Dataset(source=source),), evaluators=())


def direction(measure, target: str = "depth", **options) -> ConditionalTask:
    return ConditionalTask(
        name="one", inputs=("rgb",), target=target, scheme=MaskGIT(steps=2), metric=measure, **options
    )


def test_measures_are_tried_before_training(own, tmp_path):
    depth = ConditionalGeneration(tasks=(direction(DepthAccuracy()),), num_samples=12)
    config = dataclasses.replace(own, evaluators=(depth,), data_dir=str(tmp_path))
    depth.check_data(config)
    complete = dataclasses.replace(own.datasets[0].source, signals=("rgb",))
    rgb_alone = dataclasses.replace(config, datasets=(Dataset(source=complete),))
    with pytest.raises(ValueError, match="no data set has raw examples with the signals of these evaluations: one"):
        depth.check_data(rgb_alone)
    for measure, name in ((ForegroundOverlap(), "instance"), (BoxAccuracy(), "boxes")):
        one = ConditionalTask(name="one", inputs=("rgb",), target="rgb_tokens", scheme=MaskGIT(), metric=measure)
        one = dataclasses.replace(one, inputs=(), target="rgb")
        words = f"evaluation one: {type(measure).__name__} cannot score rgb on the test split of data set folders"
        with pytest.raises(ValueError, match=f"{words}: it needs '{name}' in raw examples, which have rgb"):
            ConditionalGeneration(tasks=(one,), num_samples=12).check_data(rgb_alone)


def test_examples_without_a_signal_are_left_out(own, tmp_path):
    config = dataclasses.replace(own, data_dir=str(tmp_path))
    generation = ConditionalGeneration(tasks=(direction(DepthAccuracy()),), num_samples=12)
    ((_, splits, train),) = generation.examples(config)
    assert len(splits["test"]) == 12 and all("depth" in e for e in [*splits["test"], *train])
    files = [Path(e["file"]).stem for e in splits["test"]]
    assert files == [f"{i:03d}" for i in range(15) if i < 8 or i % 4][:12]


def test_evaluations_must_fit_the_model(tiny):
    for one, words in (
        (direction(DepthAccuracy(), target="dept"), "unknown modality 'dept'.*Did you mean 'depth'"),
        (direction(DepthAccuracy(), target="caption"), "MaskGIT generates grids"),
    ):
        with pytest.raises(ValueError, match=f"evaluation one: .*{words}"):
            dataclasses.replace(tiny, evaluators=(ConditionalGeneration(tasks=(one,)),)).check()


def test_scores_are_of_the_model_that_is_asked_about(whole_run, data_dir, tmp_path):
    """B after A into one folder gives B's; A again, and whatever else scores depend on, is not taken from B's."""
    run = load_run(whole_run)
    depth = ConditionalGeneration(tasks=run.config.evaluators[0].tasks[:1], num_samples=3)
    config = dataclasses.replace(run.config, evaluators=(depth,))
    write_run(dataclasses.replace(run, config=config), tmp_path / "a", dtype="F32")
    graph, params = nnx.split(run.model, nnx.Param)
    other = nnx.merge(graph, jax.tree.map(lambda x: x + 0.3, params))
    write_run(dataclasses.replace(run, config=config, model=other), tmp_path / "b", dtype="F32")
    made = {}
    for name in "aba":
        made.setdefault(name, []).append(evaluated(tmp_path / name, tmp_path / "out", data_dir))
    assert made["a"][0] == made["a"][1] != made["b"][0]
    stamp = tmp_path / "out" / ".evaluated.json"
    before = (stamp.stat().st_mtime_ns, (tmp_path / "out" / "metrics.json").stat().st_mtime_ns)
    assert evaluated(tmp_path / "a", tmp_path / "out", data_dir) == made["a"][0]  # at once
    assert before == (stamp.stat().st_mtime_ns, (tmp_path / "out" / "metrics.json").stat().st_mtime_ns)
    (tmp_path / "out" / "metrics.json").write_text("{}")  # not as it was written: again
    assert evaluated(tmp_path / "a", tmp_path / "out", data_dir) == made["a"][0]


def evaluated(run: Path, out: Path, data_dir: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data_dir.parent)  # an exported model has data_dir="data"
        (data_dir.parent / "data").exists() or (data_dir.parent / "data").symlink_to(data_dir)
        return evaluate(run, "directions", out)


def test_a_gallery_shows_what_is_input_only(whole_run):
    run = load_run(whole_run)
    names = ("rgb_pixels", "depth_tokens")
    modalities = Modalities([m for m in run.model.modalities if m.name in names])
    model = Model(run.config.model, modalities, rngs=nnx.Rngs(0))
    sampler = Sampler(model, {name: run.tokenizers[name] for name in names})
    examples = [{"rgb": np.full((64, 64, 3), 200, np.uint8), "depth": np.full((64, 64), 3.0, np.float32)}] * 2
    sheet = gallery(examples, {"one": [e["depth"] for e in examples]}, [direction(DepthAccuracy())], sampler)
    assert sheet.dtype == np.uint8 and (sheet == 200).all(axis=2).mean() > 0.1


def test_the_digest_of_a_model_has_all_that_it_computes_with(whole_run):
    run = load_run(whole_run)
    digest = model_digest(run.model, run.tokenizers)
    assert digest == model_digest(run.model, dict(reversed(run.tokenizers.items())))
    graph, params = nnx.split(run.model, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    for i in range(len(leaves)):  # one bit of one number
        changed = np.array(leaves[i])
        changed.view(np.uint32).flat[0] ^= 1
        model = nnx.merge(graph, jax.tree.unflatten(tree, [*leaves[:i], jax.numpy.asarray(changed), *leaves[i + 1 :]]))
        assert model_digest(model, run.tokenizers) != digest
    tokenizers = {**run.tokenizers, "rgb_tokens": run.tokenizers["depth_tokens"]}
    assert model_digest(run.model, tokenizers) != digest


# ---- How commands and runs end --------------------------------------------------------------------------------------


def test_errors_of_the_system_name_the_file():
    assert error_sentence(FileNotFoundError(2, "No such file or directory", "a/b")) == "a/b: No such file or directory"
    full = error_sentence(OSError(28, "No space left on device", "a/b"))
    assert full == "a/b: No space left on device; make room and give the same command again"
    assert error_sentence(ValueError("x")) == "x"
    others = RuntimeError("write() failed: No space left on device; writing /a/b.tmp; at byte 3")  # of array_record
    assert error_sentence(system_error(others)) == "/a/b.tmp: " + full.removeprefix("a/b: ")
    assert system_error(RuntimeError("x")) is None


def test_commands_end_as_they_should():
    head = "from m4.command_line import ends_with_a_sentence\nwith ends_with_a_sentence():\n    "
    for body, code, words in (
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise ValueError('no')", 1, "error: no"),
        ("open('/no/such')", 1, "error: /no/such: No such file or directory"),
        ("print('x')", 0, ""),
        ("for _ in range(99999): print('x' * 99)", 1, ""),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", head + body], cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if "99999" in body:
            process.stdout.read(10)
        process.stdout.close()  # as `| head` does
        process.stdout = None
        error = process.communicate(timeout=60)[1]
        closed = code == 0 and process.returncode == 1  # the one line found nobody
        assert (process.returncode == code or closed) and error.strip() == words, (body, process.returncode, error)


def test_all_is_closed_and_the_first_error_is_what_is_raised(capsys):
    closed = []

    def broken():
        closed.append("broken")
        raise OSError(28, "No space left on device", "second")

    closers = (broken, lambda: closed.append("last"))
    with pytest.raises(KeyboardInterrupt), finishing(*closers, kept=lambda: "kept: 3"):
        raise KeyboardInterrupt
    assert closed == ["broken", "last"]
    assert capsys.readouterr().err.splitlines()[1:] == ["kept: 3"]
    with pytest.raises(OSError, match="second"), finishing(*closers, kept=lambda: "kept: 3"):
        pass
    with ends_with_a_sentence(), finishing(kept=lambda: ""):
        pass


def scalars(skipped: int = 0, in_a_row: int = 0, norm: float = 1.0) -> dict:
    return {"skipped_steps": np.int32(skipped), "skipped_in_a_row": np.int32(in_a_row), "param_norm": np.float32(norm)}


def test_a_run_that_does_not_learn_says_what_there_is_from_before(tmp_path):
    def health(*steps: int) -> Health:
        folder = tmp_path / "-".join(map(str, steps))
        for step in steps:
            (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir(parents=True)
        assert steps_in(folder / "checkpoints") == list(steps)
        made = Health(folder, Checkpoints(folder / "checkpoints"), max_skipped=3)
        made.reads(8, 32, 4)
        return made

    health(4).check(8, scalars(2, 2))  # not yet too many
    for steps, message in (
        ((3, 4), "the last checkpoint, of step 4, is from before"),
        ((4, 6), r"the parameters of .*checkpoints/6 are those at which this began; delete them to go on from step 4"),
        (
            (5, 7),
            r"the parameters of .*checkpoints/5, .*checkpoints/7 are those at which this began, and none is older",
        ),
        ((), "there is no checkpoint"),
    ):
        one = health(*steps)
        with pytest.raises(ValueError, match=f"not finite in 3 steps in a row; .*; {message}"):
            one.check(8, scalars(3, 3))  # steps 6, 7, 8 were skipped: the parameters after step 5 are no good
        assert json.loads((one.folder / "not_finite.json").read_text())[0]["first_example"] == 32
    one = health(1, 8)
    with pytest.raises(ValueError, match="parameters are not finite after step 8; .*checkpoints/8 are those"):
        one.check(8, scalars(norm=math.nan))
    assert one.may_save(8, scalars(), is_last=False) and one.may_save(8, scalars(2, 1), is_last=True)
    for kept, is_last in ((scalars(1, 1), False), (scalars(norm=math.inf), True), (scalars(8, 2), True)):
        assert not one.may_save(8, kept, is_last=is_last)
    with pytest.raises(ValueError, match="in any of 2 steps: all were skipped, nothing was learned"):
        one.check_end(2, scalars(2, 2))
    with pytest.raises(ValueError, match="parameters are not finite after step 5 .*and were not saved"):
        one.check_end(5, scalars(norm=math.inf))
    one.check_end(5, scalars(2, 1))


@pytest.mark.parametrize(("peak", "expected"), [(1e6, True), (1e-6, False), (None, False)])
def test_no_utilization_beyond_the_machine(tmp_path, capsys, peak, expected):
    """The MFU is left out where the peak is not known, and where a step beats what is taken for the peak."""
    options = {"num_steps": 9, "tokens_per_step": 1, "flops_per_step": 1.0, "peak_flops": peak}
    metrics = Metrics(tmp_path, first_step=0, **options)
    metrics.write(1, {"loss": 2.5})
    metrics.close()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert ("mfu" in line) == ("mfu" in capsys.readouterr().out) == expected
    assert 0 <= line.get("mfu", 0) <= 1


def test_the_peak_of_a_cpu_is_not_guessed():
    assert flops.peak_flops(jax.devices("cpu")[0], "float32")[0] is None


def test_events_are_what_tensorboard_reads(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    options = {"num_steps": 9, "tokens_per_step": 1, "flops_per_step": 1.0, "peak_flops": 1.0}
    metrics = Metrics(tmp_path, first_step=4, **options)
    metrics.write(5, {"loss": 2.5, "loss/absent": math.nan})
    metrics.picture(5, "samples", np.zeros((4, 5, 3), np.uint8))
    metrics.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        content = data[12 : 12 + size]
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        assert int.from_bytes(data[12 + size : 16 + size], "little") == masked_crc32c(content)
        events.append(Event.FromString(content))
        data = data[16 + size :]
    assert events[0].file_version == "brain.Event:2" and events[1].step == 5 and events[1].session_log.status == 1
    values = {v.tag: v for e in events[2:] for v in e.summary.value}
    assert values["loss"].simple_value == 2.5 and "loss/absent" not in values
    assert (values["samples"].image.height, values["samples"].image.width) == (4, 5)


# ---- Processes ------------------------------------------------------------------------------------------------------

SHORT = """
import dataclasses
from m4.config import load_config
from m4.checkpoints.numbered import CheckpointConfig
from m4.training.metrics import MetricsConfig
tiny = load_config("tests/tiny_config.py")
config = dataclasses.replace(tiny, evaluators=(), metrics=MetricsConfig(log_every=5),
    checkpoints=CheckpointConfig(save_every=4, keep_last=100))
"""


def start(folder: Path, workdir: Path, data_dir: Path, *more: str, **options) -> subprocess.Popen:
    (folder / "short.py").write_text(SHORT)
    args = [
        sys.executable,
        "train.py",
        str(folder / "short.py"),
        "--workdir",
        str(workdir),
        "--data-dir",
        str(data_dir),
    ]
    options = {"cwd": ROOT, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*args, *more], text=True, **options)


def test_one_job_a_workdir_and_ctrl_c_saves(whole_run, data_dir, tmp_path):
    """whole_run: so that the data are there."""
    workdir = tmp_path / "w"
    first = start(tmp_path, workdir, data_dir, "--num-steps", "100000")
    file, deadline = workdir / "metrics.jsonl", time.monotonic() + 200
    while not (file.exists() and file.stat().st_size) and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = start(tmp_path, workdir, data_dir, "--num-steps", "100000")
    output, error = second.communicate(timeout=200)
    assert second.returncode == 1 and f"workdir {workdir} is in use by process {first.pid}" in error, error
    assert "Traceback" not in error
    first.send_signal(signal.SIGINT)
    output, error = first.communicate(timeout=100)
    assert first.returncode == 0, error
    (said,) = [line for line in output.splitlines() if line.startswith("stopped by Ctrl-C")]
    step = int(said.split()[-1])
    assert said == f"stopped by Ctrl-C; the same command goes on from step {step}"
    assert steps_in(workdir / "checkpoints")[-1] == step


def small_disk(folder: Path, size: str) -> None:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.decode().strip()}")


def check_ends_for_want_of_room(process: subprocess.Popen, words: str, workdir: Path) -> None:
    output, error = process.communicate(timeout=200)
    assert process.returncode == 1, output[-500:] + error[-3000:]
    lines = error.strip().splitlines()
    assert lines[-1].startswith(f"error: {workdir}/") and words in lines[-1], error
    assert "Traceback" not in error and len(lines) < 6, error
    kept = ", ".join(map(str, steps_in(workdir / "checkpoints"))) or "none"
    assert f"complete checkpoints in {workdir}: {kept}" in lines


def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(whole_run, data_dir, tmp_path):
    small_disk(tmp_path / "disk", "5m")
    workdir = tmp_path / "disk" / "w"
    try:
        began = time.monotonic()
        check_ends_for_want_of_room(start(tmp_path, workdir, data_dir), "No space left on device", workdir)
        assert time.monotonic() - began < 150
        steps = steps_in(workdir / "checkpoints")
        assert steps and steps[-1] < 100
        subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path / "disk")], check=True)
        output, error = (again := start(tmp_path, workdir, data_dir)).communicate(timeout=300)
        assert again.returncode == 0 and f"resumed from step {steps[-1]}" in output, error
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        whole = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines] == list(range(5, 101, 5))
        assert [x["loss"] for x in lines] == [x["loss"] for x in whole if x["step"] % 5 == 0]
        for a, b in zip(*(jax.tree.leaves(nnx.state(load_run(w).model)) for w in (workdir, whole_run)), strict=True):
            np.testing.assert_array_equal(a, b)
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_save_without_room_names_its_folder_wherever_it_fails(tmp_path):
    """Arrays, Orbax's own files, positions, digests: whichever comes to the end of the disk."""
    arrays = {"params": {"a": jax.random.normal(jax.random.key(0), (20_000,))}}
    failed = []
    for pages in (*range(1, 41, 2), 200):
        small_disk(disk := tmp_path / str(pages), f"{4 * pages}k")
        try:
            saved = Checkpoints(disk)
            saved.save(1, arrays, {"next_example": 4}, {"batch_size": 4})
            saved.close()
            assert steps_in(disk) == [1]
        except OSError as error:
            failed.append(pages)
            assert str(error.filename).startswith(str(disk)) and error.strerror == "No space left on device", pages
            assert not steps_in(disk)
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert len(failed) > 8 and 200 not in failed


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 300, 4000, 60_000])
def test_a_limit_on_the_size_of_files_ends_the_run(whole_run, data_dir, tmp_path, limit):
    """Anybody may set one: config.json, events, metrics.jsonl or the arrays of a checkpoint become too large."""
    options = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    environment_ = {**environment(), "JAX_COMPILATION_CACHE_DIR": ""}
    process = start(tmp_path, tmp_path / "w", data_dir, env=environment_, **options)
    output, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "File too large" in error.strip().splitlines()[-1], error
    assert "Traceback" not in error and not os.listdir(tmp_path / "w").count("metrics.json")


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def test_too_many_labels_name_vocab_size():
    def source(labels):
        boxes = np.array([[0.1, 0.1, 0.5, 0.5]] * 4, np.float32)
        return [
            {"boxes": {"bbox": boxes, "label": [labels[(i + j) % len(labels)] for j in range(4)]}}
            for i in range(len(labels))
        ]

    for count in (76, 77, 80, 200):
        examples = source([f"label number {i}" for i in range(count)])
        signals = [e["boxes"] for e in examples]
        tokenizer = BoxRecipe().fit(examples, seed=0)
        if count <= 76:
            assert all(len(ids) == 21 for ids in tokenizer.encode(signals))
            continue
        words = (
            f"vocab_size=640 has room for 76 labels and {count} are there; with vocab_size={564 + count} each of them"
        )
        with pytest.raises(ValueError, match=words):
            tokenizer.encode(signals)
        fits = BoxRecipe(vocab_size=564 + count).fit(examples, seed=0)
        assert all(len(ids) == 21 for ids in fits.encode(signals))
