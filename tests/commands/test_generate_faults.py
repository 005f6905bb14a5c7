"""`python -m m4 generate` among faults: bad samples among good ones, old results, full disks, kills, broken weights."""

import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib

import jax
import numpy as np
import pytest
from conftest import ROOT, environment
from PIL import Image

from m4 import __main__ as cli
from m4.in_context import prompting as in_context
from m4.inference.parallel import MaskGIT
from m4.inference.prompts import BadSamples
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage
from m4.masking.episodes import Shot
from m4.pictures import contact_sheet

MODELS: dict = {}


@pytest.fixture
def load(monkeypatch):
    """The packaged model, read once, on one device."""
    read = Sampler.load

    def once(path, *, batch_size=64):
        if path not in MODELS:
            MODELS[path] = read(path)
        return Sampler(MODELS[path].model, MODELS[path].tokenizers, batch_size, jax.devices()[:1])

    monkeypatch.setattr(Sampler, "load", once)
    return once


@pytest.fixture
def generate(load, capsys):
    """Runs the command in this process; what it prints to stderr."""

    def run(*args) -> str:
        cli.main(["generate", "scenes", *map(str, args)])
        return capsys.readouterr().err

    return run


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def samples(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def depth_map(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(3, 9, (64, 64)).astype(np.float32)


def png(width: int, height: int) -> bytes:
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def spoil(kind: str, file) -> None:
    """A depth map that cannot be read or encoded."""
    bad = depth_map(0)
    if kind in ("nan", "infinite", "negative"):
        bad[5, 7] = {"nan": np.nan, "infinite": np.inf, "negative": -1}[kind]
        np.save(file, bad)
    arrays = {
        "channels": np.zeros((64, 64, 3), np.float32),
        "empty": np.zeros((0, 64), np.float32),
        "text": np.array([["a"] * 64] * 64),
        "object": np.array([{"a": 1}] * 4),
        "complex": depth_map(0).astype(np.complex64),
    }
    if kind in arrays:
        np.save(file, arrays[kind], allow_pickle=kind == "object")
    if kind == "cut":
        np.save(file, bad)
        file.write_bytes(file.read_bytes()[:999])
    if kind == "nothing":
        file.write_bytes(b"")
    if kind == "pipe":
        os.mkfifo(file)
    if kind == "huge":  # of which the disk holds nothing
        with open(file, "wb") as empty:
            empty.truncate(2**40)
    if kind in ("zero", "gone"):
        file.symlink_to("/dev/zero" if kind == "zero" else "nothing.npy")


BAD = ["nan", "infinite", "negative", "channels", "empty", "text", "object", "complex", "cut", "nothing", "pipe",
       "zero", "gone", "huge"]  # fmt: skip


def test_what_has_too_many_tokens_is_named_by_its_file(generate, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(2):
        (tmp_path / f"in/{i}.txt").write_text("word " * 99)
    with pytest.raises(ValueError, match=r"the first: caption=.*0\.txt: caption of .* is longer than the allowed"):
        generate("--inputs", f"caption={tmp_path / 'in'}", "--targets", "depth", "--out", tmp_path / "out")
    rows = (tmp_path / "out/failed.tsv").read_text().splitlines()
    assert [row.split(": ")[0] for row in rows] == [f"{i}\tcaption={tmp_path}/in/{i}.txt" for i in range(2)]


def test_every_bad_sample_is_listed_and_the_others_are_as_without_it(generate, tmp_path):
    """Bit by bit, wherever it stands in a batch."""
    good, mixed = tmp_path / "good", tmp_path / "mixed"
    good.mkdir()
    mixed.mkdir()
    for i in range(5):
        for folder in (good, mixed):
            np.save(folder / f"{i}0.npy", depth_map(i))
    for i, kind in enumerate(BAD):
        spoil(kind, mixed / f"{i % 5}{i // 5 + 1}_{kind}.npy")
    common = ["--targets", "rgb", "--steps", "2", "--batch-size", "2"]
    generate("--inputs", f"depth={good}", *common, "--out", tmp_path / "a")
    said = generate("--inputs", f"depth={mixed}", *common, "--out", tmp_path / "b")
    assert f"5 sample(s) in {tmp_path / 'b'}" in said and f"{len(BAD)} sample(s) could not be read" in said
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    failed = b.pop("failed.tsv").decode().splitlines()
    assert a == b and samples(tmp_path / "b") == ["00", "10", "20", "30", "40"]
    assert sorted(line.split("\t")[0].split("_")[1] for line in failed) == sorted(BAD)
    for line in failed:
        name, reason = line.split("\t")
        assert f"{name}.npy" in reason


def test_bad_pictures_and_names_of_every_kind(generate, tmp_path):
    """A bomb, a cut picture, names that are not UTF-8, hold tabs, or are those of reports: all in one table of rows."""
    folder, scene = tmp_path / "rgb", (ROOT / "tests/data/scene.png").read_bytes()
    folder.mkdir()
    good = [b"caf\xe9.png", b"caf\xe8.png", b"a\tb\nc.png", b"sheet.png.png", b"failed.tsv.png", b"ok.png"]
    bad = {b"bomb\xff.png": png(20_000, 20_000), b"bomb2.png": png(9_000, 9_000), b"cut\t1.png": scene[:99]}
    for name, data in {**dict.fromkeys(good, scene), **bad}.items():
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(data)
    generate("--inputs", f"rgb={folder}", "--targets", "boxes", "--out", tmp_path / "out")
    assert samples(tmp_path / "out") == ["_failed.tsv", "_sheet.png", "a_b_c", "caf_", "caf_-2", "ok"]
    assert (tmp_path / "out/sheet.png").is_file() and sorted(p.name for p in tmp_path.iterdir()) == ["out", "rgb"]
    rows = (tmp_path / "out/failed.tsv").read_text().split("\n")
    assert len(rows) == 4 and rows.pop() == "" and all(row.count("\t") == 1 for row in rows)
    assert [row.split("\t")[0] for row in rows] == ["bomb2", "bomb_", "cut_1"]
    assert r"bomb\xff.png" in rows[1] and r"cut\t1.png" in rows[2] and "pixels" in rows[0]


def test_no_sample_leads_out_of_the_folder(generate, tmp_path):
    """Names of dots have no extension, and are refused; the names of samples are tested with --inputs."""
    out = tmp_path / "work/out"
    out.parent.mkdir()
    for name in ("...png", "....png"):
        (tmp_path / "work" / name).write_bytes((ROOT / "tests/data/scene.png").read_bytes())
        with pytest.raises(ValueError, match="has the extension ''"):
            generate(
                "--inputs", f"rgb={tmp_path / 'work' / name}", "--targets", "boxes", "--out", tmp_path / "work/out"
            )
    assert sorted(p.name for p in (tmp_path / "work").rglob("*")) == ["....png", "...png", "out"]


def test_a_rerun_replaces_samples_whole_and_removes_old_reports(generate, tmp_path):
    folder, out = tmp_path / "depth", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b", "c"):
        np.save(folder / f"{name}.npy", depth_map(ord(name)))
    spoil("nan", folder / "bad.npy")
    common = ["--batch-size", "2", "--out", out]
    generate("--inputs", f"depth={folder}", "--targets", "rgb", "--steps", "2", *common)
    assert (out / "failed.tsv").exists() and (out / "a/rgb.png").exists()
    (folder / "bad.npy").unlink()
    (folder / "c.npy").unlink()
    said = generate("--inputs", f"depth={folder}", "--targets", "boxes", *common)
    assert not (out / "failed.tsv").exists()
    assert [p for p in contents(out) if p.startswith(("a", "b"))] == ["a/boxes.json", "b/boxes.json"]
    assert (out / "c/rgb.png").exists() and f"1 folder(s) in {out} are not of this run: c" in said
    generate("--inputs", f"depth={folder / 'a.npy'}", "--targets", "boxes", "--out", out)
    assert not (out / "sheet.png").exists()  # it was of another run


def test_folders_with_files_of_others_are_not_replaced(generate, tmp_path):
    out = tmp_path / "out"
    (out / "scene").mkdir(parents=True)
    (out / "scene/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="scene/thesis.txt would be lost"):
        generate("--inputs", "rgb=tests/data/scene.png", "--targets", "boxes", "--out", out)
    assert contents(out) == {"scene/thesis.txt": b"years of work"}


def test_a_full_disk_is_named_and_leaves_no_half(generate, monkeypatch, tmp_path):
    folder, out = tmp_path / "depth", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", depth_map(ord(name)))
    save, calls = Image.Image.save, []

    def full(self, file, *args, **options):
        calls.append(file)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write(2) does: without a name
        return save(self, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=rf"{out}/b cannot be written: No space left"):
        generate("--inputs", f"depth={folder}", "--targets", "rgb", "--steps", "2", "--batch-size", "2", "--out", out)
    assert [*contents(out)] == ["a/rgb.png"] and [p.name for p in out.iterdir()] == ["a"]


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_seeds_out_of_range_are_refused(seed, generate, load, tmp_path):
    with pytest.raises(ValueError, match=f"from 0 to {2**63 - 1}"):
        generate("--inputs", "caption=a cube", "--targets", "boxes", "--seed", seed, "--out", tmp_path)
    with pytest.raises(ValueError, match=f"from 0 to {2**63 - 1}"):
        load("scenes")({"caption": "a cube"}, ["boxes"], seed=seed)


def test_large_seeds_are_seeds_of_their_own(generate, tmp_path):
    """None is cut to 32 bits."""
    seen = set()
    for seed in (0, 2**32, 2**32 + 1, 2**63 - 1):
        out = tmp_path / str(seed)
        generate("--inputs", "caption=a red cube", "--targets", "rgb", "--steps", "2", "--seed", seed, "--out", out)
        seen.add((out / "0000/rgb.png").read_bytes())
    assert len(seen) == 4


@pytest.mark.parametrize("text", ["raise RuntimeError('on fire')", "1 / 0", "import nothing_of_this_name", "plan = [",
                                  "plan = 3", "raise KeyError('x')", "assert False", "plan = undefined", "exit()",
                                  "import sys; sys.exit('x')", "raise GeneratorExit", "# \0"])  # fmt: skip
def test_a_plan_that_raises_is_named(text, generate, tmp_path):
    (tmp_path / "plan.py").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.py"):
        generate("--inputs", "caption=a cube", "--plan", tmp_path / "plan.py", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "words"), [
    ("target=3, scheme=MaskGIT(steps=2)", "needs a target's name"),
    ("target='rgb', scheme=None", "needs a target's name"),
    ("target='rgb', scheme=MaskGIT(temperature='1')", "temperature='1' of MaskGIT must be at least 0"),
    ("target='rgb', scheme=MaskGIT(top_p=float('nan'))", r"top_p=nan of MaskGIT must be within \(0, 1\]"),
    ("target='rgb', scheme=MaskGIT(steps=0)", "steps=0 of MaskGIT must be at least 1"),
    ("target='rgb', scheme=MaskGIT(), guidance=3", "guidance of rgb is 3"),
    ("target='rgb', scheme=MaskGIT(), guidance=Guidance(scale=(('a', 1.0), ('a', 2.0)))", "each name may have one"),
])  # fmt: skip
def test_a_plan_whose_stages_make_no_sense_is_refused(stage, words, generate, tmp_path):
    imports = "from m4.inference.guidance import Guidance\nfrom m4.inference.parallel import MaskGIT\n"
    text = f"{imports}from m4.inference.scheme import Stage\nplan = [Stage({stage})]"
    (tmp_path / "plan.py").write_text(text)
    with pytest.raises(ValueError, match=words):
        generate("--inputs", "caption=a cube", "--plan", tmp_path / "plan.py", "--out", tmp_path / "out")


@pytest.mark.parametrize(("keep", "words"), [
    (["rgb=2"], "rgb=2: a share must be within"), (["rgb=nan"], "a share must be within"),
    (["rgb="], "needs a picture"),
    (["rgb=gone.png"], "gone.png: cannot be read"), (["rgb=0.5", "rgb=0.2"], "names an input twice"),
    (["rgb=README.md"], "README.md: a mask has the extension"),
])  # fmt: skip
def test_a_bad_mask_for_all_samples_fails_once(keep, words, generate, tmp_path):
    for name in ("a", "b"):
        shutil.copy(ROOT / "tests/data/scene.png", tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=words):
        generate("--inputs", f"rgb={tmp_path}", "--targets", "rgb", "--keep", *keep, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_ends_early_still_lists_what_failed(generate, monkeypatch, tmp_path):
    folder, out = tmp_path / "depth", tmp_path / "out"
    folder.mkdir()
    spoil("nan", folder / "a.npy")
    np.save(folder / "b.npy", depth_map(1))

    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match="No space left"):
        generate("--inputs", f"depth={folder}", "--targets", "rgb", "--steps", "2", "--batch-size", "2", "--out", out)
    assert (out / "failed.tsv").read_text().startswith("a\t") and samples(out) == []


def test_shots_from_a_pipe_do_not_hang(generate, tmp_path):
    os.mkfifo(tmp_path / "shots.json")
    with pytest.raises(ValueError, match="shots.json: a FIFO; allowed: files"):
        generate("--inputs", "caption=a", "--targets", "boxes", "--shots", tmp_path / "shots.json", "--out", tmp_path)


def test_notices_are_plain_lines_and_few():
    code = """if True:
        import warnings
        from m4.command_line import ends_with_a_sentence
        with ends_with_a_sentence():
            for i in range(8):
                warnings.warn(f"{i}.png: resized")
    """
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines() == [
        *(f"notice: {i}.png: resized" for i in range(5)), "3 more notice(s) like these",
    ]  # fmt: skip


def test_a_sheet_has_any_names():
    sheet = contact_sheet(
        [
            ("日本\n\ud83d", {"rgb >": np.zeros((8, 8, 3), np.uint8)}),
            ("b", {"\U0001f9c0": np.ones((4, 4, 3), np.uint8)}),
        ]
    )
    assert sheet.ndim == 3


# ---- The library ----------------------------------------------------------------------------------------------------


def test_a_sampler_names_its_bad_samples(load):
    sampler, bad = load("scenes"), depth_map(1)
    bad[0, 0] = np.nan
    with pytest.raises(BadSamples, match="sample 1, depth: .*and 1 more of 4 samples") as error:
        sampler({"depth": [depth_map(0), bad, depth_map(2), np.zeros((3, 3), np.float32)]}, ["caption"])
    assert [*error.value.errors] == [1, 3] and error.value.errors[1][0] == "depth"
    with pytest.raises(BadSamples, match="^depth: "):
        sampler({"depth": bad}, ["caption"])
    with pytest.raises(ValueError, match="^sample 1: gone.png: cannot be read"):
        sampler({"rgb": [np.zeros((64, 64, 3), np.uint8), "gone.png"]}, ["caption"])
    with pytest.raises(ValueError, match="^gone.png: cannot be read"):
        sampler({"rgb": "gone.png"}, ["caption"])
    with pytest.raises(BadSamples, match="sample 1, caption: "):
        sampler({"caption": ["a [MASK]", "large red cube " * 60 + "[MASK]"]}, ["caption"])
    with pytest.raises(BadSamples, match="^rgb: "):
        sampler({"rgb": [np.zeros((2, 2, 3), np.uint8)]}, ["rgb"], keep={"rgb": 0.5})


@pytest.mark.parametrize("text", ["a \ud83d cube", "\udce9", "\udfff"])
def test_half_surrogate_pairs_are_refused_everywhere(text, load):
    sampler, good = load("scenes"), Shot(inputs={"caption": "a cube"}, outputs={"boxes": "[]"})
    match = "half a surrogate pair"
    with pytest.raises(ValueError, match=match):
        sampler({"caption": text}, ["boxes"])
    with pytest.raises(ValueError, match=match):
        in_context.answer(sampler, [Shot(inputs={"caption": text})], "boxes", shots=[good])
    with pytest.raises(ValueError, match=match):
        in_context.answer(sampler, [Shot(inputs={"caption": "a"})], "boxes", shots=[Shot(inputs={"caption": text})])
    rgb = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=match):
        in_context.score(sampler, [Shot(inputs={"rgb": rgb})], "caption", [["a cube", text]])
    with pytest.raises(ValueError, match=match):
        in_context.score(sampler, [Shot(inputs={"caption": text})], "caption", [["a cube"]])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_predictions_that_are_not_finite_are_an_error(value, load):
    """Whatever the target's kind: not an empty answer."""
    sampler = load("scenes")
    broken = Sampler(sampler.model, sampler.tokenizers, 4, jax.devices()[:1])
    spoiled = lambda x: (x * np.float32(value)).astype(x.dtype)  # noqa: E731
    broken.params = jax.tree.map(lambda x: spoiled(x) if x.ndim > 1 else x, sampler.params)
    for target in ("boxes", Stage(target="rgb", scheme=MaskGIT(steps=2))):
        with pytest.raises(ValueError, match="(boxes|rgb): the model's predictions are not finite"):
            broken({"caption": "a"}, [target])
    with pytest.raises(ValueError, match="boxes: the model's predictions are not finite"):
        in_context.score(broken, [Shot(inputs={"caption": "a"})], "boxes", [[{"bbox": [], "label": []}]])


@pytest.mark.parametrize("name", ["../../requirements", "/etc/x", "a/b", "..", "con", "", "a\nb"])
def test_results_are_written_under_safe_names_alone(name, load, monkeypatch, tmp_path):
    sampler = load("scenes")
    results = sampler({"caption": "a red cube"}, ["boxes"])
    modality = sampler.tokenizer("boxes").modality
    monkeypatch.setitem(modality.__dict__, "signal", name)
    with pytest.raises(ValueError, match="not safe in a path"):
        results.write(tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_results_are_written_beside_other_files_or_alone(load, tmp_path):
    results = load("scenes")({"caption": ["a red cube", "a cube"]}, ["boxes"])
    (tmp_path / "notes").write_text("mine")
    results.write(tmp_path, 1)
    assert sorted(contents(tmp_path)) == ["boxes.json", "notes"]
    results.write(tmp_path / "alone", 0, alone=True)
    (tmp_path / "alone/old").write_text("")
    results.write(tmp_path / "alone", 0, alone=True)
    assert sorted(contents(tmp_path / "alone")) == ["boxes.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/x cannot be written: Not a directory"):
        results.write(tmp_path / "file/x")


# ---- Kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_time_no_sample_is_half_and_a_rerun_ends_equal(tmp_path):
    folder = tmp_path / "depth"
    folder.mkdir()
    for i in range(24):
        np.save(folder / f"{i}.npy", depth_map(i))

    def command(out) -> list[str]:
        args = ["--inputs", f"depth={folder}", "--targets", "rgb", "boxes", "--steps", "2", "--batch-size", "2"]
        return [sys.executable, "-m", "m4", "generate", "scenes", *args, "--out", str(out)]

    options = {"cwd": ROOT, "env": environment(), "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "whole"), check=True, **options)
    whole, out, rng, num_kills = contents(tmp_path / "whole"), tmp_path / "out", np.random.default_rng(0), 0
    for _ in range(6):
        shutil.rmtree(out, ignore_errors=True) if rng.random() < 0.3 else None
        with subprocess.Popen(command(out), **options) as process:
            start = len(samples(out)) if out.exists() else 0
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                if out.exists() and (start or len(samples(out)) > 2):
                    break
                time.sleep(0.01)
            time.sleep(rng.random() * 2)
            process.send_signal(signal.SIGKILL)
        num_kills += process.returncode == -signal.SIGKILL
        visible = {n: d for n, d in contents(out).items() if not n.startswith(".")}
        assert visible.items() <= whole.items()
        for sample in {n.split("/")[0] for n in visible if "/" in n}:
            assert {n for n in visible if n.startswith(f"{sample}/")} == {
                n for n in whole if n.startswith(f"{sample}/")
            }
    subprocess.run(command(out), check=True, **options)
    assert contents(out) == whole and not [p for p in out.iterdir() if p.name.startswith(".")]
    print(f"{num_kills} kills of 6")
