"""What is stored is read as it was written, or the error names the file: steps, models, tokenizers, configs."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import environment
from flax import nnx

from m4.adaptation.adapter_files import load_adapter, save_adapter
from m4.checkpoints.hub import packaged
from m4.checkpoints.model_file import load_model, save_model
from m4.checkpoints.numbered import CheckpointConfig, Checkpoints
from m4.checkpoints.runs import (
    TrainedModel,
    export,
    keep_tokenizers,
    load_run,
    replace_tokenizer,
    tokenizer_file,
    write_run,
)
from m4.files import digest, read_json, write_json
from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.registry import from_json, to_json
from m4.tensor_file import TensorFile
from m4.tokens.modality import Grid, Modalities
from m4.tokens.tokenizer import load_tokenizer, save_tokenizer, tokenizer_hash
from m4.training.trainer import TrainState

SMALL = ModelConfig(width=16, num_heads=2, encoder_depth=1, decoder_depth=1, hidden=16)
# Names that patterns, shells and formats would take for more than letters.
NAMES = ("plain", "a[1]", "b[!x]", "what?", "s*r", "{a,b}", "c]d[", "a b", "~x", "%41", "$HOME", "ä")


def leaves(run) -> list[np.ndarray]:
    model = run.model if isinstance(run, TrainedModel) else run
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]


def equal(a, b) -> bool:
    """Whether all that was loaded of two runs is the same."""
    same = all(np.array_equal(x, y, equal_nan=True) for x, y in zip(leaves(a), leaves(b), strict=True))
    hashes = [{n: tokenizer_hash(t) for n, t in run.tokenizers.items()} for run in (a, b)]
    return same and hashes[0] == hashes[1] and a.step == b.step and to_json(a.config) == to_json(b.config)


def write_a_run(folder: Path, config, tokenizers, steps=(4, 8), batch_size=6) -> None:
    """A run's folder as train.py leaves it, with parameters that differ by step."""
    modalities = Modalities([r.modality for r in config.tokenizers])
    write_json(folder / "config.json", to_json(config))
    for m in modalities:
        save_tokenizer(tokenizers[m.name], tokenizer_file(folder, m))
    saved = Checkpoints(folder / "checkpoints")
    hashes = {name: tokenizer_hash(t) for name, t in tokenizers.items()}
    for step in steps:
        saved.save(
            step, state(config, modalities, step).parts(), position_at(step * batch_size, hashes), {"batch_size": 6}
        )
    saved.close()


def state(config, modalities, seed: int) -> TrainState:
    params = nnx.state(Model(config.model, modalities, rngs=nnx.Rngs(seed)), nnx.Param)
    return TrainState(params, {"momentum": jnp.ones(3)}, None, jnp.int32(0), jnp.int32(0))


def position_at(example: int, hashes) -> dict:
    return {"next_example": example, "identity": "x", "tokenizers": hashes}


@pytest.fixture(scope="module")
def scenes():
    run = load_run("scenes")
    return dataclasses.replace(run, config=dataclasses.replace(run.config, model=SMALL, average_decay=0.0))


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    write_a_run(folder, scenes.config, scenes.tokenizers)
    return folder


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory):
    """Two models of one config: those of step 4 and 8."""
    folder = tmp_path_factory.mktemp("exported")
    for step in ("4", "8"):
        export(whole / "checkpoints" / step, folder / step)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def abstract_parts(scenes) -> dict:
    modalities = Modalities([r.modality for r in scenes.config.tokenizers])
    return jax.tree.map(abstract, jax.eval_shape(lambda: state(scenes.config, modalities, 0))).parts()


def abstract(x) -> jax.ShapeDtypeStruct:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)


# ---- Steps ----------------------------------------------------------------------------------------------------------


def test_every_file_of_a_step_has_its_digest(whole):
    for step in ("4", "8"):
        folder = whole / "checkpoints" / step
        listed = read_json(folder / "digests.json")["files"]
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"digests.json"}
        assert {*listed} == there and len(there) > 20
        for name in there:
            assert listed[name] == {"size": (folder / name).stat().st_size, "sha256": digest(folder / name)}


def damages(folder: Path):
    """Every kind of damage to every file of a folder, one after the other, each undone again: (what, file)."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        for what, changed in (
            ("empty", b""),
            ("cut", data[:-1]),
            ("flipped", bytes(flipped)),
            ("longer", data + b"\0"),
        ):
            file.write_bytes(changed)
            yield what, file
        file.unlink()
        yield "deleted", file
        file.write_bytes(data)


def test_a_damaged_newest_step_is_named_with_the_older_one(run, scenes):
    """By training and by whoever loads the model, whatever is damaged."""
    newest, tried = run / "checkpoints" / "8", 0
    for what, file in damages(newest):
        if file.name == "digests.json" and what == "deleted":
            continue  # as of version 0.1
        tried += 1
        with pytest.raises(ValueError) as error:
            Checkpoints(run / "checkpoints")
        text = str(error.value)
        assert str(run) in text and "step 8" in text and str(file) in text, (what, text)
        assert "Step 4 is whole" in text and "--skip-damaged" in text and str(newest.with_name("4")) in text
        part = file.relative_to(newest).parts[0]
        if part in ("params", "data", "digests.json"):  # what generation reads
            with pytest.raises(ValueError, match="Step 4 is whole") as error:
                load_run(run)
            assert str(file) in str(error.value)
    assert tried > 100 and load_run(run / "checkpoints" / "4").step == 4


def test_the_older_step_is_taken_when_asked_for_and_the_damaged_one_replaced(run, scenes, whole):
    (run / "checkpoints" / "8" / "params" / "manifest.ocdbt").write_bytes(b"")
    saved = Checkpoints(run / "checkpoints", CheckpointConfig(skip_damaged=True))
    assert saved.latest == 4 and (run / "checkpoints" / "8.damaged").is_dir()
    parts, position = saved.restore(abstract_parts(scenes))
    for a, b in zip(jax.tree.leaves(parts["params"]), leaves(load_run(whole / "checkpoints" / "4")), strict=True):
        np.testing.assert_array_equal(a, b)
    assert position["next_example"] == 24
    modalities = Modalities([r.modality for r in scenes.config.tokenizers])
    saved.save(8, state(scenes.config, modalities, 8).parts(), position_at(48, {}), {"batch_size": 6})
    saved.close()
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["4", "8"]
    assert equal(load_run(run), load_run(whole))


def test_the_first_save_of_a_job_is_read_back(run, scenes):
    modalities = Modalities([r.modality for r in scenes.config.tokenizers])
    saved = Checkpoints(run / "checkpoints")
    for step in (9, 10):  # all is well
        saved.save(step, state(scenes.config, modalities, 1).parts(), position_at(step, {}), {})
        saved.finish()
    saved.close()
    saved = Checkpoints(run / "checkpoints")
    saved.save(11, state(scenes.config, modalities, 1).parts(), position_at(11, {}), {})
    saved.manager.wait_until_finished()
    shutil.rmtree(run / "checkpoints" / "11" / "counters" / "d")
    with pytest.raises(ValueError, match=r"step 11 is damaged or incomplete.*Step 10 is whole"):
        saved.check()
    saved.close()


def test_no_whole_step_is_left(run):
    for step in ("4", "8"):
        (run / "checkpoints" / step / "params" / "manifest.ocdbt").write_bytes(b"")
    for skip in (False, True):
        with pytest.raises(ValueError, match="No other step of this run is whole"):
            Checkpoints(run / "checkpoints", CheckpointConfig(skip_damaged=skip))


def without_digests(run: Path) -> None:
    for path in run.glob("checkpoints/*/digests.json"):
        path.unlink()


def test_steps_of_version_01_are_read_and_their_faults_named(run, scenes, whole):
    """They have no digests: what cannot be read is named all the same, and never a traceback of others."""
    without_digests(run)
    assert equal(load_run(run), load_run(whole))
    like = abstract_parts(scenes)
    parts, _ = Checkpoints(run / "checkpoints").restore(like)
    assert [*parts] == ["params", "optimizer", "counters"]
    seen = 0
    for i, (what, _) in enumerate(damages(run / "checkpoints" / "8")):
        if what not in ("empty", "deleted"):
            continue
        for load in (lambda: load_run(run), lambda: Checkpoints(run / "checkpoints").restore(like))[i % 4 > 0 :]:
            try:
                load()
            except ValueError as error:
                seen += 1
                assert "step 8 is damaged or incomplete" in str(error) and "Step 4 is older" in str(error), error
                assert "\n" not in str(error) and "tensorstore_spec" not in str(error)
    assert seen > 20
    shutil.rmtree(run / "checkpoints" / "8" / "counters")
    saved = Checkpoints(run / "checkpoints", CheckpointConfig(skip_damaged=True))
    assert saved.restore(abstract_parts(scenes))[1]["next_example"] == 24 and saved.latest == 4


def test_the_saved_position_is_that_of_its_steps(tmp_path, scenes):
    """Steps x batch size, over changes of the batch size, and of version 0.1 by the config that was saved with it."""
    tree = {"a": jnp.ones(2)}
    start = TrainState(tree, tree, None, jnp.int32(0), jnp.int32(0))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        start,
    ).parts()
    example, step = 0, 0
    for batch_size, steps in ((8, 3), (2, 1), (4, 2), (4, 1)):
        saved = Checkpoints(tmp_path / "c")
        if saved.latest:
            assert saved.restore(like)[1]["next_example"] == example
        example, step = example + batch_size * steps, step + steps
        saved.save(step, start.parts(), position_at(example, {}), {"batch_size": batch_size})
        saved.close()
    assert Checkpoints(tmp_path / "c").restore(like)[1]["batches"] == [[3, 8], [1, 2], [3, 4]]
    for step, example, batch_size, fits in ((4, 32, 8, True), (4, 31, 8, False), (5, 32, 8, False), (4, 32, 16, False)):
        shutil.rmtree(tmp_path / "c")
        saved = Checkpoints(tmp_path / "c")
        saved.save(step, start.parts(), {"next_example": example, "identity": "x"}, {})  # no batch sizes are kept
        saved.close()
        config = tmp_path / "c" / str(step) / "config" / "metadata"
        config.write_text(json.dumps({"batch_size": batch_size}))
        (tmp_path / "c" / str(step) / "digests.json").unlink()
        if fits:
            assert Checkpoints(tmp_path / "c").restore(like)[1]["next_example"] == example
        else:
            with pytest.raises(
                ValueError, match=f"position in the stream of examples, {example}, is not that of step {step}"
            ):
                Checkpoints(tmp_path / "c").restore(like)


@pytest.mark.parametrize("name", NAMES)
def test_paths_that_are_patterns(name, scenes, tmp_path):
    folder = tmp_path / name / f"run {name}"
    write_a_run(folder, scenes.config, scenes.tokenizers, steps=(2,))
    parts, _ = Checkpoints(folder / "checkpoints").restore(abstract_parts(scenes))
    loaded = load_run(folder)
    for a, b in zip(jax.tree.leaves(parts["params"]), leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    export(folder, tmp_path / name / "out")
    assert load_run(tmp_path / name / "out").step == 2


# ---- Tokenizers of a run --------------------------------------------------------------------------------------------


def test_a_runs_tokenizers_are_its_own(run, exported, tmp_path, scenes):
    """By modality, and by what they compute, also where another has the same modality."""
    rgb, depth = (run / "tokenizers" / f"{name}.safetensors" for name in ("rgb", "depth"))
    own = rgb.read_bytes()
    rgb.write_bytes(depth.read_bytes())
    with pytest.raises(ValueError, match=f"{rgb} holds the tokenizer of another modality.*depth_tokens"):
        load_run(run)
    config, arrays = load_tokenizer(depth).state()
    rgb.write_bytes(own)
    tokenizer = load_tokenizer(rgb)
    config, arrays = tokenizer.state()
    arrays = {k: v + 1 if v.dtype == np.float32 else v for k, v in arrays.items()}
    save_tokenizer(type(tokenizer).from_state(config, arrays, tokenizer.card), rgb)
    with pytest.raises(ValueError, match=f"{rgb} holds another tokenizer of rgb_tokens .* than the model was trained"):
        load_run(run)
    saved = Checkpoints(run / "checkpoints")
    with pytest.raises(ValueError, match="was trained with other tokenizers of rgb_tokens"):
        saved.restore(abstract_parts(scenes), {"rgb_tokens": tokenizer_hash(load_tokenizer(rgb))})
    saved.close()
    save_tokenizer(type(tokenizer).from_state(config, tokenizer.state()[1], {"timing": 2}), rgb)  # another card is none
    load_run(run)
    folder = shutil.copytree(exported / "4", tmp_path / "model")
    replace_tokenizer(load_tokenizer(rgb), folder / "tokenizers" / "rgb.safetensors")  # its digests know the new card
    assert load_run(folder).tokenizers["rgb_tokens"].card == {"timing": 2}
    shutil.copy(rgb.with_name("depth.safetensors"), folder / "tokenizers" / "rgb.safetensors")
    with pytest.raises(ValueError, match="rgb.safetensors"):
        load_run(folder)


def test_tokenizers_of_a_run_that_were_swapped_are_replaced_with_a_word(run, scenes, capsys):
    modalities = Modalities([r.modality for r in scenes.config.tokenizers])
    files = {m.name: tokenizer_file(run, m).rename(run / f"{m.name}.safetensors") for m in modalities}
    keep_tokenizers(run, modalities, files)
    keep_tokenizers(run, modalities, files)
    assert not capsys.readouterr().out
    rgb = run / "tokenizers" / "rgb.safetensors"
    for data in (files["depth_tokens"].read_bytes(), files["rgb_tokens"].read_bytes()[:-9]):
        rgb.write_bytes(data)
        keep_tokenizers(run, modalities, files)
        said = capsys.readouterr().out
        assert str(rgb) in said and f"is replaced by {files['rgb_tokens']}" in said, said
        assert rgb.read_bytes() == files["rgb_tokens"].read_bytes()


# ---- Models and tokenizers ------------------------------------------------------------------------------------------


def mutations(data: bytes, rng, count: int):
    """Random flips, cuts and overwritten stretches of bytes."""
    for _ in range(count):
        changed, at = bytearray(data), int(rng.integers(len(data)))
        kind = rng.random()
        if kind < 0.7:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind < 0.85:
            del changed[at:]
        else:
            changed[at : at + 16] = bytes(16)
        if changed != data:
            yield bytes(changed)


def test_every_change_of_a_tokenizer_or_model_file_is_noticed(tmp_path, scenes):
    """Flips in all places of the header, the digest's own keys too, and a sample of those in the data."""
    model = Model(SMALL, scenes.model.modalities, rngs=nnx.Rngs(0))
    save_model(model, tmp_path / "model.safetensors")
    save_adapter(model, tmp_path / "small.safetensors", ("token_embedding",))
    save_tokenizer(scenes.tokenizers["caption"], tmp_path / "caption.safetensors")
    loads = {"model": load_model, "small": lambda p: load_adapter(model, p), "caption": load_tokenizer}
    for name, load in loads.items():
        path, rng = tmp_path / f"{name}.safetensors", np.random.default_rng(0)
        load(path)
        data = path.read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        places = [*range(0, min(length, 600)), *rng.integers(0, length, 60), *rng.integers(0, len(data), 40)]
        changes = [data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :] for at in places]
        for changed in [*changes, *mutations(data, rng, 40), data + b"\0"]:
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=re.escape(str(path))):
                load(path)
        path.write_bytes(data)
        load(path)


def test_files_of_version_01_have_no_digest_and_are_read(tmp_path):
    source = packaged()["scenes"]
    assert "m4_sha256" not in TensorFile.read(source / "model.safetensors").metadata
    assert load_run("scenes").step == 1859
    tokenizer = load_tokenizer(source / "tokenizers" / "caption.safetensors")
    save_tokenizer(tokenizer, tmp_path / "new")
    assert tokenizer_hash(load_tokenizer(tmp_path / "new")) == tokenizer_hash(tokenizer)
    assert b"m4_sha256" in (tmp_path / "new").read_bytes()


@pytest.mark.parametrize("length", [640, 1152, 0x4B50])
def test_a_header_whose_length_begins_as_a_pickle_is_none(length, tmp_path):
    text = json.dumps(HEADER).encode().ljust(length)
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + text + bytes(8))
    assert [*TensorFile.read(tmp_path / "a").entries] == ["a"]
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"csomething" + bytes(length))
    with pytest.raises(ValueError, match="is a pickle"):
        TensorFile.read(tmp_path / "a")


HEADER = {"__metadata__": {"dim": "8"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def test_broken_headers_are_named(tmp_path):
    """Wrong types in every place, and claims that no file of this size can keep."""
    values = [None, True, -1, 1.5, "x", [], {}, [None], ["x"], [[1]], {"x": 1}, 1 << 70, [1 << 70], [-2, 8], [0, 8, 8]]
    headers = [[], None, 3, "x", [HEADER]]
    for value in values:
        headers += [{**HEADER, "__metadata__": value}, {**HEADER, "__metadata__": {"a": value}}, {**HEADER, "a": value}]
        headers += [{**HEADER, "a": {**HEADER["a"], key: value}} for key in HEADER["a"]]
    headers += [{**HEADER, "a": {k: v for k, v in HEADER["a"].items() if k != key}} for key in HEADER["a"]]
    texts = [json.dumps(h).encode() for h in headers]
    texts += [
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"{",
        b"",
        b"\xff\xfe{}",
        b"{}\0",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b"{} {}",
    ]
    texts += [json.dumps(HEADER).encode()[:-1] + b', "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}']
    path, refused = tmp_path / "broken.safetensors", 0
    for text in texts:
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        for load in (TensorFile.read, load_model, load_tokenizer):
            try:
                load(path)
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 3 * (len(texts) - 10)
    for data in (b"", b"\0" * 7, b"\xff" * 8, (1 << 62).to_bytes(8, "little"), b"PK\3\4" + bytes(99)):
        path.write_bytes(data)
        for load in (load_model, load_tokenizer):
            with pytest.raises(ValueError, match="broken"):
                load(path)


def test_claims_that_no_file_can_hold_are_refused_before_anything_is_made(tmp_path, scenes):
    path = tmp_path / "model.safetensors"
    save_model(Model(SMALL, scenes.model.modalities, rngs=nnx.Rngs(0)), path)
    arrays, metadata = safetensors.numpy.load_file(path), TensorFile.read(path).metadata
    about = json.loads(metadata["m4_model"])
    huge = [10**7, 10**15, 10**300]
    changes = [
        {"model": {**about["model"], key: value}} for value in huge for key in ("encoder_depth", "decoder_depth")
    ]
    changes += [{"model": {**about["model"], "hidden": value}} for value in huge]
    changes += [
        {"model": {**about["model"], "extensions": [{"component": name, field: value}]}}
        for value in (*huge, -1, "x", None)
        for name, field in (("Registers", "num"), ("ExampleEncoder", "depth"), ("SimilarityPrior", "size"))
    ]
    old = {key: value for key, value in about["model"].items() if key != "extensions"}
    changes += [
        {"model": {**old, field: value}} for value in (*huge, -1, "x") for field in ("num_registers", "shot_depth")
    ]
    changes += [{"model": {**about["model"], "width": value * 8}} for value in huge]
    changes += [
        {"model": {**about["model"], key: value}} for key in ("num_heads", "width") for value in (0, -4, "x", None, 1.5)
    ]
    changes += [{"model": value} for value in (None, [], "x", about["modalities"][0], {"component": "os:system"})]
    changes += [
        {"model": {**about["model"], "component": name}}
        for name in ("m4.nothing:X", "m4.model.encoder_decoder:Nothing", 3, None, "")
    ]
    for key, value in [
        ("vocab_size", 10**12),
        ("shape", [10**9, 10**9]),
        ("shape", "x"),
        ("shape", []),
        ("vocab_size", -1),
    ]:
        modalities = [dict(m) for m in about["modalities"]]
        next(m for m in modalities if m["component"].endswith("Grid"))[key] = value
        changes.append({"modalities": modalities})
    for name in ("../../x", "a/b", "", ".hidden", "a\0b", 3, None, "x" * 300, "con"):
        for key in ("name", "signal"):
            changes.append({"modalities": [{**about["modalities"][0], key: name}, *about["modalities"][1:]]})
    changes += [
        {"modalities": value} for value in (None, {}, [1], ["x"], [about["model"]], about["modalities"][:1] * 2)
    ]
    for change in changes:
        safetensors.numpy.save_file(arrays, path, {"m4_model": json.dumps({**about, **change})})
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_model(path)


def test_numbers_that_are_not_finite_are_named(tmp_path, run, scenes):
    model = Model(SMALL, scenes.model.modalities, rngs=nnx.Rngs(0))
    kernel = model.encoder.mlp.up.kernel
    for value, dtype in ((np.nan, "F32"), (np.inf, "BF16"), (-np.inf, "F16")):
        if value:
            kernel[...] = kernel[...].at[0, 1, 2].set(value)
            save_model(model, tmp_path / "bad.safetensors", dtype=dtype)
            with pytest.raises(
                ValueError, match=r"bad.safetensors: 1 of the .* numbers of encoder.0.mlp.up.kernel are not"
            ):
                load_model(tmp_path / "bad.safetensors")
    modalities = Modalities([r.modality for r in scenes.config.tokenizers])
    saved = Checkpoints(run / "checkpoints")
    bad = state(scenes.config, modalities, 9)
    bad = bad._replace(params=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), bad.params))
    saved.save(9, bad.parts(), position_at(54, {}), {"batch_size": 6})
    saved.close()
    with pytest.raises(ValueError, match="checkpoints/9: not all numbers of .* are finite"):
        load_run(run)


def test_a_config_that_is_cut_or_wrong_is_named(run):
    path = run / "config.json"
    value = read_json(path)
    texts = [path.read_bytes()[:cut] for cut in (0, 1, 100, -1)] + [b"[" * 9000, b"\xff\xfe", b"null", b"[]", b"{}"]
    changes = [
        {"component": "m4.nothing:X"},
        {"component": "nothing"},
        {"component": None},
        {"model": None},
        {"nothing": 1},
    ]
    changes += [
        {"model": 3},
        {"tokenizers": 3},
        {"tokenizers": [1]},
        {"batch_size": "x"},
        {"num_steps": None},
        {"name": 3},
    ]
    texts += [json.dumps({**value, **change}).encode() for change in changes]
    for text in texts:
        path.write_bytes(text)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_run(run)


def test_saved_values_have_their_fields_types():
    grid = to_json(Grid(name="a", signal="b", vocab_size=3, shape=(2, 2)))
    assert from_json(grid) == Grid(name="a", signal="b", vocab_size=3, shape=(2, 2))
    for key, value in (
        ("vocab_size", "3"),
        ("vocab_size", True),
        ("shape", 2),
        ("shape", ["x"]),
        ("is_input", 1),
        ("name", None),
    ):
        with pytest.raises(ValueError, match=f"Grid.{key} is "):
            from_json({**grid, key: value})
    with pytest.raises(ValueError, match="lacks its field 'shape'"):
        from_json({k: v for k, v in grid.items() if k != "shape"})


# ---- Exported models ------------------------------------------------------------------------------------------------

DIES = """
import os, shutil, sys
from pathlib import Path
from m4.files import replacing_together
new, out, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
count = 0
def hook(event, args):
    global count
    if event == "os.rename":
        count += 1
        if count > last:
            os._exit(9)
sys.addaudithook(hook)
with replacing_together(out) as folder:
    shutil.copytree(new, folder, dirs_exist_ok=True, ignore=lambda *_: ["digests.json"])
"""


def test_killed_between_any_two_files_an_export_is_the_old_the_new_or_an_error(exported, tmp_path):
    """From one model to another, before each rename; and what follows an error is whole again."""
    old, new = load_run(exported / "4"), load_run(exported / "8")
    seen, out = [], tmp_path / "out"
    for last in range(20):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(exported / "4", out)
        command = [sys.executable, "-c", DIES, str(exported / "8"), str(out), str(last)]
        died = subprocess.run(command, env=environment(), check=False).returncode == 9
        try:
            loaded = load_run(out)
            seen.append("old" if equal(loaded, old) else "new" if equal(loaded, new) else "mixture")
        except ValueError as error:
            assert str(out) in str(error)
            seen.append("error")
        if not died:
            break
    assert seen[0] == "old" and seen[-1] == "new" and set(seen) == {"old", "error", "new"}, seen
    shutil.copytree(exported / "4", out, dirs_exist_ok=True)
    write_run(new, out)
    assert equal(load_run(out), new) and not [p for p in out.iterdir() if p.name.endswith(".tmp")]


def test_another_model_in_the_same_folder_leaves_no_scores_of_the_first(run, tmp_path):
    (run / "metrics.json").write_text('{"a": 1}')
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "metrics.json").read_text() == '{"a": 1}'
    (tmp_path / "out" / "README.md").write_text("mine")
    export(run / "checkpoints" / "4", tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists() and (tmp_path / "out" / "README.md").exists()
