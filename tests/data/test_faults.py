"""Preparation among faults: bad examples in fitting, odd names, other runs, kills, processes that are missing."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, environment
from test_folders import NOT_UTF8, npy, picture, write

from m4.data import pretokenize
from m4.data.dataset import Dataset
from m4.data.pretokenize import prepare
from m4.data.shard_writer import ShardWriter
from m4.data.sources.folders import Folders
from m4.data.sources.scenes import Scenes
from m4.data.sources.texts import Texts
from m4.data.token_shards import TokenShards
from m4.distributed import worker_group as team
from m4.distributed import workers
from m4.distributed.worker_group import FileBarrier, WorkerGroup, roll_call
from m4.files import read_json
from m4.tokens.tokenizer import load_tokenizer
from m4_tokenizers.modalities.answers import AnswerRecipe
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.depth import DepthRecipe
from m4_tokenizers.modalities.image import ImageRecipe, PixelPatchesRecipe
from m4_tokenizers.modalities.maps import MapRecipe
from m4_tokenizers.modalities.normals import NormalsRecipe
from m4_tokenizers.modalities.palette import PaletteRecipe
from m4_tokenizers.modalities.semseg import SemanticRecipe
from m4_tokenizers.modalities.text import TextRecipe
from m4_tokenizers.networks.patch_mixing import PatchDecoder, PatchEncoder
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.vq import VQRecipe

NUM = 20
WHOLE = {"validation_share": 0.0, "test_share": 0.0}
TINY = {
    "image_size": 16,
    "encoder": PatchEncoder(width=18, num_blocks=0),
    "decoder": PatchDecoder(width=18, num_blocks=1),
    "quantizer": LearnedVectorQuantizer(num_codes=8),
    "num_steps": 2,
    "batch_size": 8,
}


def boxes(label: str = "cube", bbox=(0.1, 0.1, 0.5, 0.5)) -> bytes:
    return json.dumps([{"bbox": list(bbox), "label": label}]).encode()


def sixteen(value, dtype=np.uint8, shape=(16, 16)) -> np.ndarray:
    return np.full(shape, value, dtype)


def normals() -> np.ndarray:
    return np.tile(np.array([0, 0, 1], np.float32), (16, 16, 1))


# ---- Bad examples while tokenizers are fitted (and then, while shards are written) ----------------------------------

# recipe, signal's file of a good example, bad contents with what the error says
KINDS = {
    "rgb": (
        ImageRecipe(**TINY),
        ("rgb", "png", picture(sixteen(7, shape=(16, 16, 3)))),
        {
            "another shape": ("png", picture(sixteen(7, shape=(20, 16, 3))), r"uint8 \[20, 16, 3\]"),
            "damaged": ("png", b"\x89PNG", "damaged, or no picture that can be read"),
            "empty": ("png", b"", "it is empty"),
        },
    ),
    "depth": (
        DepthRecipe(**TINY),
        ("depth", "npy", npy(sixteen(1.5, np.float32))),
        {
            "millimetres": ("npy", npy(sixteen(1500, np.float32)), "millimetres"),
            "NaN": ("npy", npy(sixteen(np.nan, np.float32)), "256 NaN"),
            "another shape": ("npy", npy(sixteen(1, np.float32, (8, 16))), r"float32 \[8, 16\]"),
        },
    ),
    "normals": (
        NormalsRecipe(**TINY),
        ("normals", "npy", npy(normals())),
        {"another shape": ("npy", npy(normals()[:8]), r"\[8, 16, 3\]")},
    ),
    "semseg": (
        SemanticRecipe(**TINY, num_classes=4),
        ("semseg", "png", picture(sixteen(3))),
        {
            "class 255": ("png", picture(sixteen(255)), "class ids 255 to 255"),
            "another shape": ("png", picture(sixteen(1, shape=(16, 8))), r"\[16, 8\]"),
        },
    ),
    "map": (
        MapRecipe(**TINY, signal="heat", name="heat_tokens", lowest=0.0, highest=10.0),
        ("heat", "npy", npy(sixteen(5, np.float32))),
        {
            "NaN": ("npy", npy(sixteen(np.nan, np.float32)), "not finite"),
            "another shape": ("npy", npy(sixteen(1, np.float32, (4, 4))), r"\[4, 4\]"),
        },
    ),
    "caption": (
        TextRecipe(),
        ("caption", "json", b'"a red cube"'),
        {
            "a lone surrogate": ("json", b'"a \\ud83d cube"', "half a surrogate pair"),
            "empty": ("json", b'" "', "the caption is empty"),
            "a number": ("json", b"7", "a caption is a string"),
        },
    ),
    "notes": (
        TextRecipe(signal="notes", name="notes"),
        ("notes", "json", b'"a red cube"'),
        {"no text": ("json", b"[[1]]", "a string|a text"), "a number": ("json", b"1.5", "a string|a text")},
    ),
    "boxes": (
        BoxRecipe(),
        ("boxes", "json", boxes()),
        {
            "an empty label": ("json", boxes(""), "has an empty label"),
            "outside": ("json", boxes(bbox=(0, 0, 1, 2)), "outside"),
            "a lone surrogate": ("json", boxes("\ud83d"), "half a surrogate pair"),
        },
    ),
    "answers": (
        AnswerRecipe(kinds=("box",)),
        ("boxes", "json", boxes()),
        {"an empty label": ("json", boxes(""), "at least one character|has an empty label")},
    ),
    "palette": (
        PaletteRecipe(num_colors=2),
        ("rgb", "png", picture(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8))),
        {"damaged": ("png", b"PNG", "damaged, or no picture that can be read")},
    ),
}


def read_as_fitting(recipe, dataset, data_dir) -> str:
    """Fits a tokenizer, or (where that would train) reads all that it would be trained on; what was skipped."""
    used = []
    examples = pretokenize._fitting_examples(recipe, [dataset], data_dir, 0, used)
    if isinstance(recipe, VQRecipe):
        arrays = recipe.to_arrays([recipe.signal_of(examples[i]) for i in range(len(examples))])
        assert len(arrays) == NUM and np.isfinite(arrays).all()
    else:
        assert recipe.fit(examples, seed=0).modality == recipe.modality
    return "; ".join(used[0].skipped.values())


@pytest.mark.parametrize("kind", KINDS)
def test_bad_examples_are_skipped_up_to_the_share_or_named_while_a_tokenizer_is_fitted(tmp_path, kind):
    """One of 20 with a share of 5%; three exceed it. What the tokenizer refuses is bad for its recipe, too."""
    recipe, (signal, extension, good), bad = KINDS[kind]
    files = {f"{signal}/{i:02d}.{extension}": good for i in range(NUM)}
    for how, (ending, content, message) in bad.items():
        root = write(tmp_path / f"{kind} {how}", files)
        for i in (7, 9, 11):
            (root / f"{signal}/{i:02d}.{extension}").unlink()
            (root / f"{signal}/{i:02d}.{ending}").write_bytes(content if i == 7 else good)
        lenient = Dataset(source=Folders(root=str(root), **WHOLE), skip_bad=0.05)
        skipped = read_as_fitting(recipe, lenient, tmp_path / "data")
        pattern = f"example 7 of folders train: .*{signal}/07.{ending}.*({message})"
        assert re.fullmatch(pattern + ".*", skipped), (how, skipped)
        with pytest.raises(ValueError, match=pattern) as error:
            read_as_fitting(recipe, Dataset(source=lenient.source), tmp_path / "data")
        assert "skip_bad=0.01 in its Dataset" in str(error.value) and "\n" not in str(error.value)
        for i in (9, 11):
            (root / f"{signal}/{i:02d}.{ending}").write_bytes(content)
        with pytest.raises(ValueError, match=r"\(2 bad examples of 20, more than skip_bad=0.05 allows\)"):
            read_as_fitting(recipe, lenient, tmp_path / "data")


def test_the_same_examples_are_bad_while_shards_are_written(tmp_path, capfd):
    files = {f"rgb/{i:02d}.png": picture(sixteen(i, shape=(16, 16, 3))) for i in range(NUM)}
    files |= {f"caption/{i:02d}.json": json.dumps(f"number {i}").encode() for i in range(NUM)}
    files |= {"caption/07.json": b'"\\ud83d"', "rgb/12.png": picture(sixteen(1, shape=(16, 20, 3)))}
    root = write(tmp_path / "raw", files)
    (root / "caption/03.json").unlink()
    (root / "caption/03.json").symlink_to("nowhere")
    os.mkfifo(root / "rgb/15.npy")
    (root / "rgb/15.png").unlink()
    dataset = Dataset(source=Folders(root=str(root), **WHOLE), skip_bad=0.2)
    recipes = (ImageRecipe(**TINY), PixelPatchesRecipe(image_size=16), TextRecipe(max_length=48))
    prepared = prepare([dataset], recipes, tmp_path / "data", seed=0)
    said = capfd.readouterr().out
    for name in ("rgb_tokens", "caption"):
        assert re.search(
            rf"tokenizer {name} of folders train: [34] bad examples were skipped, the first: .*03.json", said
        )
    (shards,) = prepared.shards("train")
    found = [int(shards[i]["rgb_pixels"][0, 0]) for i in range(len(shards))]
    assert found == [i for i in range(NUM) if i not in (3, 7, 12, 15)]
    skipped = shards.manifest["skipped"]
    assert skipped["num_examples"] == 4
    for text, part in zip(skipped["first"], ("03.json", "07", "12", "15.npy: a FIFO"), strict=True):
        assert part in text


# ---- Names that cannot be printed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_of_any_bytes_and_any_output_finish_a_job(tmp_path, encoding):
    """Whatever standard output can encode; the skipped file's name is in the manifest, escaped."""
    files = {f"rgb/{i}.png": picture(sixteen(i, shape=(16, 16, 3))) for i in range(6)}
    files |= {f"rgb/{NOT_UTF8}.png": b"bad", "rgb/小さな\n犬.png": picture(sixteen(9, shape=(16, 16, 3)))}
    write(tmp_path / "raw", files)
    script = f"""
from m4.command_line import log_to_output
from m4.data.dataset import Dataset
from m4.data.sources.folders import Folders
from m4.data.pretokenize import prepare
from m4_tokenizers.modalities.image import PixelPatchesRecipe
log_to_output()
source = Folders(root={str(tmp_path / "raw")!r}, validation_share=0, test_share=0)
dataset = Dataset(source=source, skip_bad=0.2, name="犬")
prepare([dataset], [PixelPatchesRecipe(image_size=16)], {str(tmp_path / "data")!r}, seed=0)
"""
    set_to = environment() | {"PYTHONIOENCODING": encoding + ":strict", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=set_to, cwd=ROOT, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "data" / "tokens").iterdir()
    assert read_json(folder / "train.json")["skipped"]["first"][0].count(r"caf\xe9.png") == 1
    assert rb"caf\xe9.png" in done.stdout.replace(b"\\\\", b"\\")


# ---- Two runs with one data_dir, and kills ---------------------------------------------------------------------------

PREPARE = """
import sys
from m4.data import pretokenize
from m4.data.dataset import Dataset
from m4.data.sources.scenes import Scenes
from m4.data.sources.texts import Texts
from m4.data.pretokenize import prepare
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.text import TextRecipe
from m4_tokenizers.vq import VQRecipe
if __name__ == "__main__":
    pretokenize.EXAMPLES_PER_SHARD = 16
    scenes = Scenes(num_train=60, num_validation=1, num_test=1, num_heldout=1, size=32)
    texts = Texts(files=(sys.argv[1],), validation_share=0, test_share=0)
    recipes = [PixelPatchesRecipe(image_size=32), TextRecipe(max_length=120)]
    prepare([Dataset(source=scenes, signals=("rgb", "caption")), Dataset(source=texts)], recipes, sys.argv[2], seed=0)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A command that prepares a small mixture in a folder, and what it makes of it."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "prepare.py").write_text(PREPARE)
    (folder / "words.txt").write_text("".join(f"line number {i}\n" for i in range(200)))

    def start(data_dir):
        command = [sys.executable, str(folder / "prepare.py"), str(folder / "words.txt"), str(data_dir)]
        return subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    alone = start(folder / "alone")
    assert "tokens: texts train" in alone.communicate(timeout=200)[0] and alone.returncode == 0
    return start, content_of(folder / "alone")


def content_of(data_dir) -> dict[str, bytes]:
    """Every file but what depends on the clock (cards of tokenizers, notes of what was verified)."""
    found = {}
    for path in sorted(data_dir.rglob("*")):
        name = path.relative_to(data_dir).as_posix()
        if path.is_dir() or name.endswith(".verified.json") or "digests.json" in name or name.startswith("scenes/"):
            continue  # what is rendered is in the tokens; protocol buffers have no fixed order
        if path.suffix == ".safetensors":
            config, arrays = load_tokenizer(path).state()
            found[name] = json.dumps([config, {k: v.tolist() for k, v in arrays.items()}], sort_keys=True).encode()
        else:
            found[name] = path.read_bytes()
    return found


def test_two_runs_share_one_data_dir(job, tmp_path):
    """Both finish, one waits for the other, and what they leave is what one alone leaves."""
    start, expected = job
    runs = [start(tmp_path / "data") for _ in range(2)]
    said = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert content_of(tmp_path / "data") == expected


@pytest.mark.slow
def test_a_preparation_killed_anywhere_ends_bit_equal_and_leaves_nothing(job, tmp_path):
    """Twelve kills spread over rendering, indexes, tokenizers and shards."""
    start, expected = job
    rng, num_kills = random.Random(0), 0
    for trial in range(4):
        data_dir = tmp_path / f"data{trial}"
        for _ in range(3):
            run = start(data_dir)
            time.sleep(rng.uniform(2, 9))
            if run.poll() is None:
                run.send_signal(signal.SIGKILL)
                num_kills += 1
            run.communicate()
        last = start(data_dir)
        assert last.communicate(timeout=200) and last.returncode == 0
        assert content_of(data_dir) == expected
    print(f"{num_kills} kills")


def test_leftovers_of_a_killed_run_are_removed_and_its_work_is_kept(tmp_path):
    (tmp_path / "words.txt").write_text("".join(f"line {i}\n" for i in range(40)))
    dataset = Dataset(source=Texts(files=(str(tmp_path / "words.txt"),), **WHOLE))
    data_dir = tmp_path / "data"
    for folder in ("", "tokenizers", "tar_indexes", "texts"):
        (data_dir / folder).mkdir(exist_ok=True, parents=True)
        (data_dir / folder / ".x.json.0123456789ab.tmp").write_bytes(b"half")
    (tokens,) = prepare([dataset], [TextRecipe()], data_dir, seed=0).tokens
    assert not list(data_dir.rglob("*.tmp")) and not list(data_dir.rglob("*.lock"))
    (shard,) = tokens.glob("*.array_record")
    facts = tokens / f".{shard.name}.json"
    expected = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(b""), lambda: shard.write_bytes(bytes(len(expected))), facts.unlink):
        (tokens / "train.json").unlink()  # as if killed before it was written
        damage()
        assert prepare([dataset], [TextRecipe()], data_dir, seed=0).tokens == (tokens,)
        assert shard.read_bytes() == expected and len(TokenShards(tokens, "train")) == 40
    whole = facts.read_bytes()
    for place in range(0, len(whole), 97):
        (tokens / "train.json").unlink()
        facts.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        manifest = prepare([dataset], [TextRecipe()], data_dir, seed=0).shards("train")[0].manifest
        assert manifest["num_examples"] == 40 and facts.read_bytes() == whole


def test_a_shard_that_was_damaged_before_the_manifest_is_named(tmp_path, monkeypatch):
    """An empty one never gets into a manifest."""
    (tmp_path / "words.txt").write_text("".join(f"line {i}\n" for i in range(40)))
    dataset = Dataset(source=Texts(files=(str(tmp_path / "words.txt"),), **WHOLE))
    monkeypatch.setattr(pretokenize, "EXAMPLES_PER_SHARD", 16)
    finish = ShardWriter.finish

    def damaged(self, manifest_file):
        (self.folder / self.names[1]).write_bytes(b"")
        finish(self, manifest_file)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", damaged)
        with pytest.raises(ValueError, match="train-00001-of-00003.array_record was damaged meanwhile; start again"):
            prepare([dataset], [TextRecipe()], tmp_path / "data", seed=0)
    (shards,) = prepare([dataset], [TextRecipe()], tmp_path / "data", seed=0).shards("train")
    assert len(shards) == 40 and [s["num_examples"] for s in shards.shards.values()] == [16, 16, 8]


def test_a_shard_whose_examples_are_all_skipped_is_left_out(tmp_path, monkeypatch):
    lines = [f"line {i}" if not 16 <= i < 32 else "caf\udce9" for i in range(40)]
    (tmp_path / "words.txt").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    dataset = Dataset(source=Texts(files=(str(tmp_path / "words.txt"),), **WHOLE), skip_bad=0.5)
    monkeypatch.setattr(pretokenize, "EXAMPLES_PER_SHARD", 16)
    (shards,) = prepare([dataset], [TextRecipe()], tmp_path / "data", seed=0).shards("train")
    assert [s["num_examples"] for s in shards.shards.values()] == [16, 8] and len(shards) == 24
    assert "train-00001-of-00003.array_record" not in shards.shards


def test_the_tokenizer_beside_shards_is_that_of_the_manifest(tmp_path):
    """Of a folder that was made elsewhere: another one in its place is named; damage to a copy here is mended."""
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(40)))
    (tmp_path / "b.txt").write_text("".join(f"row {i}\n" for i in range(40)))
    made = {}
    for name in "ab":
        dataset = Dataset(source=Texts(files=(str(tmp_path / f"{name}.txt"),), **WHOLE))
        made[name] = prepare([dataset], [TextRecipe()], tmp_path / name, seed=0).tokens[0]
    file = shutil.copy(made["b"] / "tokenizers/caption.safetensors", made["a"] / "tokenizers/caption.safetensors")
    with pytest.raises(ValueError, match=f"{file} is damaged or was replaced: the token shards beside it"):
        prepare([Dataset(tokens=str(made["a"]))], [TextRecipe()], tmp_path / "c", seed=0)


def test_a_data_set_of_one_example_is_prepared(tmp_path):
    write(tmp_path / "raw", {"rgb/0.png": picture(sixteen(7, shape=(16, 16, 3))), "caption/0.txt": b"one"})
    dataset = Dataset(source=Folders(root=str(tmp_path / "raw"), **WHOLE))
    recipes = (PixelPatchesRecipe(image_size=16), TextRecipe(), PaletteRecipe(num_colors=2))
    (shards,) = prepare([dataset], recipes, tmp_path / "data", seed=0).shards("train")
    assert len(shards) == 1 and shards[0].keys() == {"rgb_pixels", "caption", "color_palette"}


def test_a_tokenizer_is_fitted_on_few_examples_or_says_what_it_needs(tmp_path):
    """Fewer than five leave none to be held out; boxes may be empty everywhere."""
    rng, recipe = np.random.default_rng(0), ImageRecipe(**TINY)
    examples = [{"rgb": rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)} for _ in range(4)]
    for count in (2, 4):
        card = recipe.fit(examples[:count], seed=0).card
        assert (card["num_held_out"], card["num_examples"]) == (0, count) and np.isfinite(card["psnr"])
    with pytest.raises(ValueError, match="8 codes need at least as many vectors, but 4 were given"):
        recipe.fit(examples[:1], seed=0)
    nothing = {"bbox": np.zeros((0, 4), np.float32), "label": []}
    assert BoxRecipe().fit([{"boxes": nothing}], seed=0).card["longest"] == 1


def test_a_build_removes_what_killed_ones_left_and_notices_damage(tmp_path):
    scenes = Scenes(num_train=8, num_validation=1, num_test=1, num_heldout=1, size=32)
    folder = scenes.folder(tmp_path)
    left = folder.parent / f"incomplete.ABC123_{folder.name}"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    scenes.prepare(tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    expected, rng = [example["rgb"].tobytes() for example in scenes.split("train", tmp_path)], np.random.default_rng(0)
    noticed = 0
    for file in [path for path in folder.iterdir() if path.is_file()] * 4:
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        try:
            assert [example["rgb"].tobytes() for example in scenes.split("train", tmp_path)] == expected
        except ValueError as error:
            assert file.name in str(error)
            noticed += 1
        else:
            assert ".array_record" in file.name, f"{file.name}: all else has its digest"
        file.write_bytes(whole)
    assert noticed


# ---- Processes that fail, die or never start -------------------------------------------------------------------------


def _live(data_dir, ready, end):
    with FileBarrier(data_dir, WorkerGroup(index=1, count=2)):
        ready.set()
        end.wait(100)


def test_a_process_that_dies_is_an_error_and_its_old_note_is_none(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(team, "GRACE", 0.2)
    context = multiprocessing.get_context("spawn")

    def other():
        ready, end = context.Event(), context.Event()
        process = context.Process(target=_live, args=(tmp_path, ready, end))
        process.start()
        assert ready.wait(60)
        return process, end

    process, _ = other()
    with FileBarrier(tmp_path, WorkerGroup(index=0, count=2)) as others:
        threading.Timer(1, process.kill).start()
        with pytest.raises(ValueError, match="process 1 of 2 died without a word; start all processes again"):
            others.wait(lambda: False, "a file")
    process, end = other()  # this one ends as it should
    with FileBarrier(tmp_path, WorkerGroup(index=0, count=2)) as others:
        threading.Timer(1, end.set).start()
        others.wait(lambda: process.exitcode is not None, "a file")
    said = capfd.readouterr().out
    assert "process 0 of 2 waits for a file\n" in said and "not started" not in said


def test_a_worker_that_is_killed_is_a_sentence():
    with pytest.raises(ValueError, match="one of 2 worker processes died without a word"), workers.pool(2) as pool:
        pool.submit(os._exit, 9).result()


def test_a_process_that_never_starts_is_missed_soon(tmp_path, capfd, monkeypatch):
    """Also where an earlier run left a note, whatever its time: of a failure, from the future, or from a kill."""
    monkeypatch.setattr(team, "GRACE", 0.2)
    notes = [tmp_path / f".process-{i}-of-4" for i in (1, 2)]
    notes[0].write_text("ValueError: no such file\\x0017")
    notes[1].write_text("")
    for note in notes:
        os.utime(note, (2**32, 2**32))
    until = time.monotonic() + 1.5
    with FileBarrier(tmp_path, WorkerGroup(index=0, count=4)) as others:
        others.wait(lambda: time.monotonic() > until, "a file")
    missed = "process 1 (its last run failed with ValueError: no such file), 2, 3"
    assert f"process 0 of 4 waits for a file; not started, or not on these files: {missed}" in capfd.readouterr().out


def test_two_jobs_on_one_data_dir_have_their_own_notes(tmp_path, monkeypatch):
    names = set()
    for address in ("a:1", "b:1"):
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
        names.add(FileBarrier(tmp_path, WorkerGroup(index=0, count=2))._note(1).name)
    assert len(names) == 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_the_roll_call_says_who_is_missed(capfd, monkeypatch):
    """Strangers on the port are no processes; those that come late are waited for."""
    monkeypatch.setattr(team, "GRACE", 0.3)
    address, results = f"localhost:{free_port()}", {}

    def call(index, patience):
        try:
            roll_call(address, 3, index, patience=patience)
            results[index] = "there"
        except ValueError as error:
            results[index] = str(error)

    def calls(indices, patience):
        threads = [threading.Thread(target=call, args=(i, patience)) for i in indices]
        for thread in threads:
            thread.start()
        return threads

    for thread in calls((0, 2), 2):
        thread.join()
    assert (
        results
        == {
            0: "process 0 of 3 waited 2 seconds for process 1 (JAX_PROCESS_ID) to start; start all processes again",
            2: f"process 2 of 3 waited 2 seconds for the processes that process 0 at {address} waits for; "
            "start all processes again",
        }
        or "process 0 at" in results[2]
    )
    assert "process 0 of 3 waits for process 1 (JAX_PROCESS_ID) to start" in capfd.readouterr().out
    threads = calls((2, 0), 30)
    time.sleep(0.5)
    with socket.create_connection(("localhost", int(address[10:])), timeout=5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    for thread in (*threads, *calls((1,), 30)):
        thread.join()
    assert results == {0: "there", 1: "there", 2: "there"}


@pytest.mark.parametrize(
    "address, message",
    [
        ("nonsense", "is 'nonsense'; allowed: HOST:PORT of process 0"),
        ("host:", "allowed: HOST:PORT"),
        ("host:port", "allowed: HOST:PORT"),
        (":1234", "allowed: HOST:PORT"),
        ("host:0", "allowed: HOST:PORT"),
        ("host:65536", "allowed: HOST:PORT"),
        ("no-such-host.invalid:1234", "the host 'no-such-host.invalid' of JAX_COORDINATOR_ADDRESS is not known"),
    ],
)
def test_addresses_that_make_no_sense_are_named(address, message):
    with pytest.raises(ValueError, match=message):
        roll_call(address, 2, 1, patience=0)
