"""Bundles of released 4M models: from 4M's own file formats to a folder that opens like any model."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys

import make_checkpoint
import numpy as np
import pytest
from conftest import PARITY, ROOT, environment
from PIL import Image

from m4.checkpoints.runs import load_run
from m4.inference.chain import continued
from m4.inference.sampler import Sampler
from m4.interchange import fourm, fourm_plans
from m4.tokens.modality import Modalities
from m4_tokenizers.interchange import fourm_bundle
from m4_tokenizers.interchange.fourm_bundle import files_of, import_bundle

MODELS, TEXT = PARITY / "pipeline/models", PARITY / "text/text_tokenizer_4m_wordpiece_30k.json"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """name -> file of the tiny models in 4M's format; and the architectures that their configs name."""
    if not MODELS.is_dir() or not TEXT.is_file():
        pytest.skip("no fixture pipeline/models: set M4_PARITY to the folder of parity fixtures")
    root, files, presets = tmp_path_factory.mktemp("released"), {}, {}
    for name in ("fm_7", "fm_sr", "tok_rgb", "tok_semseg", "tok_edge", "tok_dinov2"):
        spec = json.loads((MODELS / name / "state_dict.json").read_text())
        files[name] = root / name / "model.safetensors"
        files[name].parent.mkdir()
        make_checkpoint.write_checkpoint(spec, files[name])
        presets |= spec["presets"] if "presets" in spec else {}
    return files, presets


@pytest.fixture(scope="module")
def bundle(released, tmp_path_factory):
    files, presets = released
    out = tmp_path_factory.mktemp("models") / "4m7"
    summary = import_bundle([str(files["fm_7"]), str(files["tok_semseg"].parent), str(TEXT)], out, presets)
    return out, summary


def test_a_bundle_opens_like_any_model(bundle):
    """Its summary names the modalities that stay ids; from a photograph to what it can decode, in 4M's order."""
    out, summary = bundle
    assert summary.splitlines()[0].endswith("8 modalities, 4 with a tokenizer")
    assert "tok_rgb@224 has no tokenizer: it is read and generated as ids" in summary
    run = load_run(out)
    assert run.step == 0 and fourm.is_released(run.model.modalities)
    sampler = Sampler(run.model, run.tokenizers)
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    stages = fourm_plans.plan(sampler.modalities, ["rgb"])
    names = ["tok_clip@224", "tok_depth@224", "tok_normal@224", "tok_semseg@224", "caption", "det"]
    assert [stage.target for stage in stages] == names
    results = sampler({"rgb": image[:224, :224]}, [stages[0], stages[3]])
    assert results["tok_semseg@224"].shape == (224, 224) and results["tok_clip@224"].shape == (196,)


def test_generate_takes_a_bundle(bundle, tmp_path, capsys):
    """All targets of its plan, or some; options change 4M's schemes."""
    generate = importlib.import_module("m4.commands.generate")
    image, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)).save(image)
    options = ["--targets", "tok_semseg@224", "caption", "--temperature", "0.5", "--out", str(out)]
    generate.main([str(bundle[0]), "--inputs", f"rgb={image}", *options])
    written = {file.name for file in out.rglob("*") if file.is_file()}
    assert {"semseg.png", "semseg_color.png", "caption.txt"} <= written


@pytest.fixture(scope="module")
def with_super_resolution(released, tmp_path_factory):
    files, presets = released
    out = tmp_path_factory.mktemp("models") / "4m7_sr"
    import_bundle([str(files[name]) for name in ("fm_sr", "fm_7", "tok_semseg")] + [str(TEXT)], out, presets)
    return out


@pytest.mark.slow  # compiles 784 positions of two models
def test_super_resolution_goes_on_from_the_first_model(with_super_resolution, tmp_path):
    """From a text, by one command: files of both models; the second reads what the first generated."""
    generate, out = importlib.import_module("m4.commands.generate"), tmp_path / "out"
    run, options = str(with_super_resolution), ["--inputs", "caption=a lake", "--super-resolution", "--out", str(out)]
    generate.main([run, *options, "--targets", "tok_semseg@224", "--steps", "1"])
    written = {file.name for file in out.rglob("*") if file.is_file()}
    assert {"semseg.png", "semseg@448.png"} <= written
    with Image.open(next(out.rglob("semseg@448.png"))) as picture:
        assert picture.size == (448, 448)
    with pytest.raises(ValueError, match="goes on from tok_rgb@224 and others; here are det, caption"):
        generate.main([run, *options, "--targets", "det"])
    first, second = Sampler.load(run), Sampler.load(with_super_resolution / "super_resolution")
    stages = fourm_plans.super_resolution(second.modalities, ["tok_semseg@224"])
    assert [stage.target for stage in stages] == ["tok_semseg@448"]
    stages = [dataclasses.replace(stages[0], scheme=dataclasses.replace(stages[0].scheme, steps=1))]
    results = first({"caption": ["a lake", "a boat"]}, ["tok_semseg@224"])
    tokens = [continued(results, second, stages, seed=1, indices=range(2)).tokens["tok_semseg@448"] for _ in range(2)]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    results.tokens["tok_semseg@224"] = results.tokens["tok_semseg@224"][::-1]
    other = continued(results, second, stages, seed=1, indices=range(2)).tokens["tok_semseg@448"]
    assert (np.array(other) != np.array(tokens[0])).any()


def test_a_bundle_without_a_second_model(bundle, tmp_path):
    generate = importlib.import_module("m4.commands.generate")
    options = ["--inputs", "caption=a lake", "--targets", "tok_semseg@224", "--super-resolution"]
    with pytest.raises(ValueError, match="has no super-resolution model; give it to `python -m m4 import`"):
        generate.main([str(bundle[0]), *options, "--out", str(tmp_path / "out")])


def test_info_lists_modalities_and_the_plan(bundle, capsys):
    importlib.import_module("m4.commands.info").main([str(bundle[0])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4m7, step 0:") and "parameters" in lines[0]
    (semseg,) = [line.split() for line in lines if line.startswith("tok_semseg@224") and "Grid" in line]
    assert semseg[:6] == ["tok_semseg@224", "semseg", "Grid", "14", "x", "14"] and "SemanticTokenizer" in semseg
    (stage,) = [line.split() for line in lines if line.startswith("tok_semseg@224") and "ROAR" in line]
    assert stage[1:] == ["ROAR", "1", "0.01", "0.8", "2.0"]
    importlib.import_module("m4.commands.info").main(["scenes", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "scenes" and {m["signal"] for m in found["modalities"]} >= {"rgb", "depth", "caption"}


def test_images_are_read_as_the_original_reads_them(bundle):
    """Its crop, filter and rounding: the recorded pixels of a photograph, byte for byte."""
    run, case = load_run(bundle[0]), PARITY / "pipeline/rgb_to_all"
    with pytest.warns(UserWarning, match="resized and cropped"):
        pixels = Sampler(run.model, run.tokenizers).read("rgb", case / "input.png")
    with np.load(case / "tokens.npz") as tokens:
        np.testing.assert_array_equal(pixels, tokens["resized_u8"])


def test_plans_are_chosen_by_what_is_given():
    seven, base = (
        Modalities([fourm.modality(n) for n in fourm.MOD7]),
        Modalities([fourm.modality(n) for n in fourm.MOD21]),
    )
    from_rgb, to_rgb = (fourm_plans.plan(base, [name]) for name in ("rgb@224", "caption"))
    assert [s.scheme.steps for s in from_rgb if hasattr(s.scheme, "steps")] == [1] * 8
    assert [s.scheme.steps for s in to_rgb if hasattr(s.scheme, "steps")] == [50, 8, 8, 8, 8, 8, 8, 8, 25]
    assert to_rgb[0].guidance.scale == 3.0 and from_rgb[0].guidance.scale == 2.0
    assert "tok_rgb@224" not in {s.target for s in from_rgb} and "caption" not in {s.target for s in to_rgb}
    assert [s.target for s in fourm_plans.plan(seven, ["caption", "det"])][-1] == "tok_rgb@224"
    with pytest.raises(ValueError, match="unknown modality 'rgbb'"):
        fourm_plans.plan(base, ["rgbb"])


def test_edges_of_both_kinds_have_one_tokenizer(released):
    assert fourm_bundle.signals_of(released[0]["tok_edge"]) == ["edges", "sam_edges"]
    assert fourm_bundle.signals_of(released[0]["tok_dinov2"]) == ["dinov2"]


def test_sources_that_are_no_bundle(released, tmp_path, monkeypatch):
    files, presets = released
    out = tmp_path / "bundle"

    def check(message: str, *sources) -> None:
        with pytest.raises(ValueError, match=message):
            import_bundle([*map(str, sources)], out, presets)
        assert not out.exists()

    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_cache"))
    again = tmp_path / "tok_semseg_again" / "model.safetensors"
    again.parent.mkdir()
    shutil.copy(files["tok_semseg"], again)
    check("one model; 0 were given", files["tok_rgb"])
    check("one super-resolution model; 2 were given", files["fm_7"], files["fm_sr"], files["fm_sr"].parent)
    check("two tokenizers of tok_semseg@224", files["fm_7"], files["tok_semseg"], again)
    check("is a pickle.*weights_only", tmp_path / "model.pth")
    check("no file, folder or hub id", files["fm_7"], "nowhere")
    wrong = tmp_path / "text.json"
    wrong.write_text("{}")
    check("text.json", files["fm_7"], wrong)


def test_hub_ids_are_looked_up_on_disk_first(released, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--EPFL-VILAB--4M-7_B_CC12M" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(released[0]["fm_7"], snapshot / "model.safetensors")
    assert files_of("EPFL-VILAB/4M-7_B_CC12M") == [snapshot / "model.safetensors"]
    command = [sys.executable, "-m", "m4", "import", "EPFL-VILAB/4M-9_B", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and done.stderr.startswith("error: EPFL-VILAB/4M-9_B "), done.stderr
    assert "cannot be downloaded from the hub" in done.stderr
