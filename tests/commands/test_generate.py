"""`python -m m4 generate`: the lines of README and docs on a tiny run; bad input is named."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, call_m4, environment, executed_commands
from PIL import Image


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def m4(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "m4", *args], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )


# Each line once, but for those whose comment says why they are not executed.
SHOWN = [shlex.split(line)[3:] for line in executed_commands() if line.startswith("python -m m4 generate ")]


def test_both_directions_are_shown():
    assert any("rgb=" in " ".join(c) and "depth" in c for c in SHOWN)
    assert any("caption=" in " ".join(c) and "rgb" in c for c in SHOWN)


@pytest.mark.parametrize("shown", SHOWN, ids=lambda args: "_".join(args[args.index("--targets") + 1 :]))
def test_generate_as_the_documents_say(shown, whole_run, tmp_path):
    """Exactly the arguments that are shown, on a tiny run and into a temporary folder; every promised file is there."""
    args = [*shown]
    args[1], args[args.index("--out") + 1] = str(whole_run), str(tmp_path / "out")
    done = m4(*args)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "out").iterdir()
    targets = args[args.index("--targets") + 1 : args.index("--out")]
    if "depth" in targets:
        depth = pixels(folder / "depth.png")
        assert depth.dtype in (np.uint16, np.int32) and depth.shape == (64, 64)
        assert pixels(folder / "depth_color.png").shape == (64, 64, 3)
    if "boxes" in targets:
        for box in json.loads((folder / "boxes.json").read_text()):
            assert set(box) >= {"bbox", "label"} and len(box["bbox"]) == 4
        assert (folder / "boxes.png").exists()
    if "caption" in targets:
        assert (folder / "caption.txt").read_text().strip() in done.stdout
    if "rgb" in targets:
        assert pixels(folder / "rgb.png").shape == (64, 64, 3)


def test_a_folder_gives_a_sample_for_each_file_and_seeds_reproduce(whole_run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 100, 3), np.uint8)).save(photos / "wide.png")
    Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)).save(photos / "grey.png")
    depths = {}
    for out in ("a", "b"):
        done = m4(
            "generate", str(whole_run), "--inputs", f"rgb={photos}", "--targets", "depth", "--out", str(tmp_path / out)
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "cropped" in done.stderr  # said, because the picture was not 64 x 64
        depths[out] = [pixels(tmp_path / out / n / "depth.png") for n in ("grey", "wide")]
    np.testing.assert_array_equal(depths["a"], depths["b"])


def test_a_table_of_prompts_and_broken_files(whole_run, tmp_path):
    """Each line has its own inputs; what cannot be read is listed, and does not change what the others give."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    long = "large red cube " * 60
    lines = [{"rgb": "one.png"}, {"rgb": "broken.png"}, {"caption": "a large red cube"}, {"rgb": "two.png"}]
    lines += [{"caption": long}]
    lines = [{k: str(tmp_path / v) if k == "rgb" else v for k, v in line.items()} for line in lines]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["generate", str(whole_run), "--targets", "depth", "--steps", "2", "--seed", "3"]
    done = m4(*common, "--inputs", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "a"), "--batch-size", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 sample(s)" in done.stderr and "2 sample(s) could not be read" in done.stderr
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["0000", "0002", "0003", "failed.tsv", "sheet.png"]
    assert (tmp_path / "a/failed.tsv").read_text().startswith("0001\t") and pixels(tmp_path / "a/sheet.png").ndim == 3
    done = m4(*common, "--inputs", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "b"), "--batch-size", "9")
    assert done.returncode == 0, done.stderr[-3000:]
    for sample in ("0000", "0002", "0003"):
        np.testing.assert_array_equal(*(pixels(tmp_path / out / sample / "depth.png") for out in ("a", "b")))


def test_plans_editing_guidance_and_streams(whole_run, tmp_path):
    """A plan file; what is kept of a picture; words printed as they come."""
    scene, out = str(ROOT / "tests/data/scene.png"), str(tmp_path / "out")
    (tmp_path / "plan.py").write_text(
        "from m4.inference.autoregressive import Autoregressive\nfrom m4.inference.guidance import Guidance\n"
        "from m4.inference.parallel import ROAR\nfrom m4.inference.scheme import Stage\n"
        "plan = [Stage(target='depth', scheme=ROAR(steps=3), guidance=Guidance(scale=2.0), ensemble=2),\n"
        "        Stage(target='caption', scheme=Autoregressive())]\n"
    )
    done = m4(
        "generate", str(whole_run), "--inputs", f"rgb={scene}", "--plan", str(tmp_path / "plan.py"), "--out", out,
        "--stream",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == (tmp_path / "out/scene/caption.txt").read_text().strip()
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).resize((90, 90)).save(tmp_path / "mask.png")  # fitted as the picture is
    done = m4(
        "generate", str(whole_run), "--inputs", f"rgb={scene}", "--targets", "rgb", "--keep",
        f"rgb={tmp_path / 'mask.png'}", "--steps", "2", "--out", str(tmp_path / "edit"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert pixels(tmp_path / "edit/scene/rgb.png").shape == (64, 64, 3)


@pytest.mark.parametrize(
    "inputs,targets,message",
    [
        (["rbg=x.png"], ["depth"], "unknown modality 'rbg'"),
        (["rgb"], ["depth"], "NAME=VALUE"),
        (["rgb=missing.png"], ["depth"], "missing.png"),
        (["caption=a cube"], ["rgb_pixels"], "input only"),
        (["caption=a cube"], ["depht"], "Did you mean 'depth'"),
        (["caption=a cube"], ["caption"], "already given"),
        (["caption=" + "large red cube " * 60], ["rgb"], "longer than the allowed"),
        (["rgb=EMPTY"], ["depth"], "empty folder"),
        (["caption=a [MASK] cube"], ["depth"], "is no target"),
        (["caption=a cube"], ["boxes", "--ensemble", "2"], "--ensemble fits no target of boxes"),
        (["caption=a cube"], ["depth", "--top-p", "1.5"], "top_p=1.5 of MaskGIT must be within (0, 1]"),
        (["caption=a cube"], ["depth", "--steps", "0"], "steps=0 of MaskGIT must be at least 1"),
        (["caption=a cube"], ["boxes", "--steps", "2"], "--steps fits no target of boxes"),
        (["caption=a cube"], ["depth", "--guidance", "rgb=2"], "names 'rgb'"),
        (["boxes=[{]"], ["depth"], "boxes must be JSON"),
        (["prompts.jsonl"], ["depth"], "cannot be read"),
    ],
)
def test_bad_input_is_named(inputs, targets, message, whole_run, tmp_path):
    (tmp_path / "empty").mkdir()
    inputs = [i.replace("EMPTY", str(tmp_path / "empty")) for i in inputs]
    out = str(tmp_path / "out")
    done = call_m4("generate", str(whole_run), "--inputs", *inputs, "--targets", *targets, "--out", out)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*/*"))


def test_not_a_run_and_unknown_verb(tmp_path):
    done = m4("evaluate", str(tmp_path / "nothing"))
    assert done.returncode != 0 and "is not a run" in done.stderr
    done = m4("generat")
    assert done.returncode != 0 and re.search("unknown verb 'generat'.*Did you mean 'generate'", done.stderr)


def test_generate_from_labelled_examples(whole_run, tmp_path):
    """Examples are read from beside their file; what is asked for may be a question's answer."""
    picture = (ROOT / "tests/data/scene.png").read_bytes()
    (tmp_path / "a.png").write_bytes(picture)
    shots = tmp_path / "shots.json"
    shots.write_text(json.dumps([{"inputs": {"rgb": "a.png", "caption": "what ?"}, "outputs": {"caption": "dax"}}]))
    common = ["generate", str(whole_run), "--inputs", "rgb=tests/data/scene.png", "caption=what ?", "--targets"]
    options = ["--shots", str(shots), "--shot-tokens", "4"]
    done = m4(*common, "caption", *options, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "scene" / "caption.txt").exists()
    done = m4(*common, "caption", "boxes", *options, "--out", str(tmp_path / "out2"))
    assert done.returncode == 1 and "--shots takes one target" in done.stderr
