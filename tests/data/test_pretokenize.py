"""Token shards: aligned, whole or absent, the same whoever wrote them, of the run's own tokenizers or refused."""

import dataclasses
import json
import multiprocessing
import shutil
import tarfile
import time
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import call_m4
from PIL import Image

from m4.data import pretokenize
from m4.data import shard_writer as shards
from m4.data.dataset import Dataset
from m4.data.pretokenize import prepare
from m4.data.shard_writer import ShardStatistics
from m4.data.sources.crops import Crops
from m4.data.sources.folders import Folders
from m4.data.sources.tars import Tars
from m4.data.sources.texts import Texts
from m4.data.stream import Stream
from m4.data.token_shards import TokenShards
from m4.distributed.worker_group import WorkerGroup
from m4.masking.dirichlet import Masking, Strategy
from m4.registry import from_json, to_json
from m4.tokens.modality import Grid, Modalities
from m4.tokens.records import compact, encode
from m4.tokens.tokenizer import load_tokenizer, save_tokenizer
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.classes import ClassRecipe
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.palette import PaletteRecipe
from m4_tokenizers.modalities.stored import IdsRecipe, TokenizerFile
from m4_tokenizers.modalities.text import TextRecipe

NUM = 40
RECIPES = (
    PixelPatchesRecipe(image_size=16),
    TextRecipe(max_length=48),
    BoxRecipe(),
    PaletteRecipe(num_colors=2),
)
WORDS = ("red", "green", "blue", "large", "small", "cube", "sphere")


def write_example(root: Path, i: int) -> None:
    """rgb, caption and boxes of example i; every third lacks boxes. Its picture says which it is: pixel 0 is i."""
    rng = np.random.default_rng(i)
    for name in ("rgb", "caption", "boxes"):
        (root / name / "part").mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    pixels[0, 0] = i
    Image.fromarray(pixels).save(root / f"rgb/part/{i:03d}.png")
    (root / f"caption/part/{i:03d}.txt").write_text(f"{' '.join(rng.choice(WORDS, 3))} {i}")
    if i % 3:
        box = [*np.sort(rng.random(2)), *np.sort(rng.random(2))]
        boxes = [{"bbox": [box[0], box[2], box[1], box[3]], "label": str(rng.choice(WORDS))}]
        (root / f"boxes/part/{i:03d}.json").write_text(json.dumps(boxes))


@pytest.fixture
def root(tmp_path):
    for i in range(NUM):
        write_example(tmp_path / "raw", i)
    return tmp_path / "raw"


@pytest.fixture
def dataset(root):
    return Dataset(source=Folders(root=str(root), allow_missing=True, validation_share=0.0, test_share=0.0))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pretokenize, "EXAMPLES_PER_SHARD", 16)


def records(folder, split="train"):
    shards = TokenShards(folder, split)
    return [shards[i] for i in range(len(shards))]


def number_of(record) -> int:
    """Which example a record is of, by its picture."""
    return int(record["rgb_pixels"][0, 0])


def as_bytes(records):
    return [safetensors.numpy.save(r) for r in records]


def check_alignment(folder, tokenizers, *, missing=()):
    """Every record's caption and boxes are those of its picture."""
    found = records(folder)
    assert [number_of(r) for r in found] == [i for i in range(NUM) if i not in missing]
    for r in found:
        i = number_of(r)
        assert tokenizers["caption"].decode([r["caption"]])[0].endswith(f" {i}")
        assert ("boxes" in r) == (i % 3 > 0)


def test_records_are_aligned_and_the_manifest_tells_what_they_hold(dataset, tmp_path):
    prepared = prepare([dataset], RECIPES, tmp_path / "data", seed=0)
    (folder,) = prepared.tokens
    check_alignment(folder, prepared.tokenizers)
    manifest = json.loads((folder / "train.json").read_text())
    assert manifest["num_examples"] == NUM and manifest["skipped"] == {"num_examples": 0, "first": []}
    assert [s["num_examples"] for s in manifest["shards"].values()] == [16, 16, 8]
    captions = [r["caption"] for r in records(folder)]
    assert manifest["modalities"]["caption"] == {
        "num_examples": NUM,
        "num_tokens": sum(map(len, captions)),
        "given_as_ids": 0,
        "codes_used": len(np.unique(np.concatenate(captions))),
        "vocab_size": 768,
    }
    assert manifest["modalities"]["boxes"]["num_examples"] == sum(i % 3 > 0 for i in range(NUM))
    names = ["rgb_pixels", "caption", "boxes", "color_palette"]
    with_boxes = sum(i % 3 > 0 for i in range(NUM))
    assert sorted(manifest["sets"], key=lambda s: len(s["modalities"])) == [
        {"modalities": [n for n in names if n != "boxes"], "num_examples": NUM - with_boxes},
        {"modalities": names, "num_examples": with_boxes},
    ]
    assert captions[0].dtype == np.uint16 and manifest["tokenizers"].keys() == prepared.tokenizers.keys()


def test_a_folder_and_a_tar_of_it_give_the_same_stream(root, dataset, tmp_path, modalities):
    """Bit-identical records in the same order, hence the same batches; the tars are only read, never unpacked."""
    for name in ("rgb", "caption", "boxes"):
        (tmp_path / "tars" / name).mkdir(parents=True)
        for shard in range(2):
            with tarfile.open(tmp_path / "tars" / name / f"shard-{shard:05d}.tar", "w") as tar:
                files = sorted((root / name).rglob("*.*"))
                for file in [f for f in files if int(f.stem) % 2 == shard]:
                    tar.add(file, file.relative_to(root / name))
    source = Tars(root=str(tmp_path / "tars"), allow_missing=True, validation_share=0.0, test_share=0.0)
    streams, stored = [], []
    for data in (dataset, Dataset(source=source)):
        prepared = prepare([data], RECIPES, tmp_path / f"data_{data.label}", seed=0)
        stored.append(as_bytes(records(prepared.tokens[0])))
        masking = Masking(
            num_inputs=8,
            num_targets=8,
            strategies=(Strategy(inputs={"rgb_pixels": 1.0, "caption": 1.0}, targets={"boxes": 1.0, "caption": 1.0}),),
        )
        stream = Stream(
            prepared.shards("train"), [data], masking, Modalities([r.modality for r in RECIPES]), batch_size=8, seed=1
        )
        streams.append([np.asarray(x) for _ in range(9) for b in [next(stream)] for x in (*b.inputs, *b.targets)])
        stream.close()
    assert stored[0] == stored[1]
    for a, b in zip(*streams, strict=True):
        np.testing.assert_array_equal(a, b)


def _prepare(dataset, data_dir, team, seen):
    pretokenize.EXAMPLES_PER_SHARD = 16
    try:
        prepare([dataset], RECIPES, data_dir, seed=0, team=team)
    except ValueError as error:
        seen.put((team.index, str(error)))
        return
    seen.put((team.index, ""))


@pytest.mark.slow
def test_whoever_writes_the_shards_they_are_the_same(dataset, tmp_path):
    """One process, two workers of one process, and two hosts at the same time."""
    alone = prepare([dataset], RECIPES, tmp_path / "alone", seed=0).tokens[0]
    workers = prepare([dataset], RECIPES, tmp_path / "workers", seed=0, team=WorkerGroup(workers=2)).tokens[0]
    context = multiprocessing.get_context("spawn")
    seen = context.Queue()
    hosts = [
        context.Process(target=_prepare, args=(dataset, tmp_path / "hosts", WorkerGroup(index=i, count=2), seen))
        for i in (1, 0)
    ]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(100)
        assert host.exitcode == 0
    (together,) = (tmp_path / "hosts" / "tokens").iterdir()
    assert as_bytes(records(alone)) == as_bytes(records(workers)) == as_bytes(records(together))
    manifests = [json.loads((folder / "train.json").read_text()) for folder in (alone, workers, together)]
    assert manifests[0] == manifests[1] == manifests[2]


def test_a_failure_of_one_host_ends_the_others_too(root, dataset, tmp_path):
    """Instead of a wait for what nobody writes; the same command goes on once the example is mended."""
    damage(root, 17, "boxes outside")
    context = multiprocessing.get_context("spawn")

    def both():
        seen = context.Queue()
        arguments = [(dataset, tmp_path / "data", WorkerGroup(index=i, count=2), seen) for i in (1, 0)]
        hosts = [context.Process(target=_prepare, args=a) for a in arguments]
        for host in hosts:
            host.start()
            while host is hosts[0] and not (tmp_path / "data" / ".process-1-of-2").exists():
                time.sleep(0.1)
        found = dict(seen.get(timeout=100) for _ in hosts)
        for host in hosts:
            host.join(100)
        return found

    found = both()
    assert (
        "017.json: box 0 lies outside" in found[0] and found[1] == f"process 0 of 2 failed with ValueError: {found[0]}"
    )
    write_example(root, 17)
    assert both() == {0: "", 1: ""}


def test_a_killed_job_goes_on_where_it_was(dataset, tmp_path, monkeypatch):
    """Finished shards are kept as they are, half-written ones are never seen, and the result is the same."""
    prepared = prepare([dataset], RECIPES, tmp_path / "data", seed=0)
    (folder,) = prepared.tokens
    expected, files = as_bytes(records(folder)), sorted(folder.glob("*.array_record"))
    times = [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    (folder / "train.json").unlink()
    (folder / f".{files[1].name}.77.tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match="no finished split"):
        TokenShards(folder, "train")
    encoded = []
    monkeypatch.setattr(shards, "encode", lambda e, t: encoded.append(len(e)) or encode(e, t))
    prepare([dataset], RECIPES, tmp_path / "data", seed=0)
    assert not list(folder.glob(".*.tmp"))
    assert sum(encoded) == 16 and as_bytes(records(folder)) == expected
    assert [f.stat().st_mtime_ns for f in (files[0], files[2])] == [times[0], times[2]]


def damage(root, i: int, how: str) -> Path:
    """Makes one file of example i bad; returns it."""
    png, text, boxes = (
        root / f"rgb/part/{i:03d}.png",
        root / f"caption/part/{i:03d}.txt",
        root / f"boxes/part/{i:03d}.json",
    )
    if how == "truncated":
        png.write_bytes(png.read_bytes()[:-200])
        return png
    if how == "zero bytes":
        png.write_bytes(b"")
        return png
    if how == "bomb":
        Image.new("1", (10_001, 10_000)).save(png)
        return png
    if how == "not UTF-8":
        text.write_bytes(b"caf\xe9")
        return text
    if how == "too long":
        text.write_text("word " * 100)
        return text
    if how == "boxes outside":
        boxes.write_text(json.dumps([{"bbox": [0.1, 0.2, 1.5, 0.4], "label": "cube"}]))
        return boxes
    if how == "boxes inverted":
        boxes.write_text(json.dumps([{"bbox": [0.9, 0.2, 0.1, 0.4], "label": "cube"}]))
        return boxes
    if how == "double":
        Image.new("RGB", (16, 16)).save(png.with_suffix(".jpg"))
        return png
    raise AssertionError(how)


HOW = ["truncated", "zero bytes", "bomb", "not UTF-8", "too long", "boxes outside", "boxes inverted", "double"]


@pytest.mark.parametrize("how", HOW)
def test_a_bad_example_is_named_or_skipped_and_nothing_shifts(root, dataset, tmp_path, how):
    """An error with the file's name; with skip_bad one example less, counted and named, the others as they were."""
    data_dir = tmp_path / "data"
    tokenizers = prepare([dataset], RECIPES, data_dir, seed=0).tokenizer_files  # fitted before anything is bad
    bad = damage(root, 17, how)
    arguments = {"data_dir": data_dir, "seed": 0}
    stem = bad.stem
    with pytest.raises(ValueError, match=f"example 17 of folders train: .*{stem}.*skip_bad") as error:
        pretokenize.pretokenize(dataset, tokenizers, tmp_path / "strict", "train", **arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "strict" / "train.json").exists()
    lenient = dataclasses.replace(dataset, skip_bad=0.03)
    pretokenize.pretokenize(lenient, tokenizers, tmp_path / "lenient", "train", **arguments)
    check_alignment(tmp_path / "lenient", {n: load_tokenizer(f) for n, f in tokenizers.items()}, missing={17})
    skipped = json.loads((tmp_path / "lenient" / "train.json").read_text())["skipped"]
    assert skipped["num_examples"] == 1 and stem in skipped["first"][0]


def test_tokenizers_are_fitted_around_bad_examples_if_some_may_be_skipped(root, dataset, tmp_path):
    """The first example, too; else its file is named."""
    bad = damage(root, 0, "truncated")
    with pytest.raises(ValueError, match=bad.name):
        prepare([dataset], RECIPES, tmp_path / "strict", seed=0)
    lenient = dataclasses.replace(dataset, skip_bad=0.03)
    prepared = prepare([lenient], RECIPES, tmp_path / "lenient", seed=0)
    check_alignment(prepared.tokens[0], prepared.tokenizers, missing={0})


def test_too_many_bad_examples_are_an_error_even_if_some_may_be_skipped(root, dataset, tmp_path):
    tokenizers = prepare([dataset], RECIPES, tmp_path / "data", seed=0).tokenizer_files
    for i in (5, 20, 35):  # of three shards
        damage(root, i, "zero bytes")
    lenient = dataclasses.replace(dataset, skip_bad=0.05)
    message = "3 bad examples of 40, more than skip_bad=0.05 allows"
    with pytest.raises(ValueError, match=message):
        pretokenize.pretokenize(lenient, tokenizers, tmp_path / "t", "train", data_dir=tmp_path / "data")
    assert not (tmp_path / "t" / "train.json").exists()


def test_edited_data_get_new_shards(root, dataset, tmp_path):
    """The same path with another content is never served from old shards."""
    first = prepare([dataset], RECIPES, tmp_path / "data", seed=0).tokens[0]
    assert prepare([dataset], RECIPES, tmp_path / "data", seed=0).tokens[0] == first
    (root / "caption/part/003.txt").write_text("another text 3")
    second = prepare([dataset], RECIPES, tmp_path / "data", seed=0)
    assert second.tokens[0] != first
    assert second.tokenizers["caption"].decode([records(second.tokens[0])[3]["caption"]]) == ["another text 3"]


def test_token_shards_serve_without_their_raw_data(root, dataset, tmp_path):
    """A folder of shards, moved elsewhere, brings its tokenizers along."""
    prepared = prepare([dataset], RECIPES, tmp_path / "data", seed=0)
    expected = as_bytes(records(prepared.tokens[0]))
    shutil.move(prepared.tokens[0], tmp_path / "moved")
    shutil.rmtree(root), shutil.rmtree(tmp_path / "data")
    again = prepare([Dataset(tokens=str(tmp_path / "moved"))], RECIPES, tmp_path / "data2", seed=0)
    assert as_bytes(records(again.tokens[0])) == expected
    assert again.tokenizers["caption"].decode([records(again.tokens[0])[2]["caption"]])[0].endswith(" 2")
    with pytest.raises(ValueError, match=r"caption.*the config says"):
        other = (RECIPES[0], TextRecipe(max_length=47), *RECIPES[2:])
        prepare([Dataset(tokens=str(tmp_path / "moved"))], other, tmp_path / "data2", seed=0)


def test_shards_of_another_tokenizer_are_refused(root, dataset, tmp_path):
    """Which modality, and both hashes."""
    first = prepare([dataset], RECIPES, tmp_path / "a", seed=0).tokens[0]
    (root / "caption/part/001.txt").write_text("purple words nobody else has 1")
    second = prepare([dataset], RECIPES, tmp_path / "b", seed=0).tokens[0]
    with pytest.raises(
        ValueError, match=r"token shards in .* made with another tokenizer of caption \(\w+\).*run's \(\w+\)"
    ):
        prepare([Dataset(tokens=str(first)), Dataset(tokens=str(second))], RECIPES, tmp_path / "c", seed=0)


def test_a_mixture_is_tokenized_by_one_set_of_tokenizers(root, dataset, tmp_path):
    """Text beside pictures: the text tokenizer learns the words of both, and text lacks everything else."""
    (tmp_path / "words.txt").write_text("".join(f"zebras graze {i}\n" for i in range(30)))
    words = Dataset(source=Texts(files=(str(tmp_path / "words.txt"),), validation_share=0.0, test_share=0.0))
    prepared = prepare([dataset, words], RECIPES, tmp_path / "data", seed=0)
    caption = prepared.tokenizers["caption"]
    assert all(len(caption.encode([word])[0]) == 2 for word in ("zebras", " graze", " cube"))
    assert all(set(r) == {"caption"} for r in records(prepared.tokens[1]))
    assert sorted(caption.decode([r["caption"] for r in records(prepared.tokens[1])])) == sorted(
        f"zebras graze {i}" for i in range(30)
    )
    with pytest.raises(ValueError, match="no data set has the signal 'boxes' of modality 'boxes'.*stored.IdsRecipe"):
        prepare([words], RECIPES[1:3], tmp_path / "data", seed=0)


def test_every_example_is_of_use_to_training(root, dataset, tmp_path):
    """Sets of modalities that no strategy serves are named at the start; an example of none is a bad one."""
    words = Strategy(inputs={"rgb_pixels": 1.0}, targets={"boxes": 1.0})
    masking = Masking(num_inputs=8, num_targets=8, strategies=(words,))
    prepared = prepare([dataset], RECIPES, tmp_path / "data", seed=0)
    count = sum(i % 3 == 0 for i in range(NUM))
    message = f"data set folders fits its {count} examples that have only rgb_pixels, caption, color_palette"
    modalities = Modalities([r.modality for r in RECIPES])
    with pytest.raises(ValueError, match=message):
        Stream(prepared.shards("train"), [dataset], masking, modalities, batch_size=8, seed=0)
    with pytest.raises(ValueError, match="example 0 of folders train: .*000: has none of boxes, but: caption"):
        prepare([dataset], (BoxRecipe(),), tmp_path / "data", seed=0)
    prepared = prepare([dataclasses.replace(dataset, skip_bad=0.4)], (BoxRecipe(),), tmp_path / "data", seed=0)
    assert len(records(prepared.tokens[0])) == NUM - count


def test_a_signal_is_found_wherever_it_is(tmp_path):
    """In the last of many files, as a rare one; the mixture that a tokenizer is fitted on has all data sets whole."""
    for name, count in (("few", 5), ("many", 2000)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(count)))
    whole = {"validation_share": 0.0, "test_share": 0.0}
    datasets = [Dataset(source=Texts(files=(str(tmp_path / f"{n}.txt"),), **whole), name=n) for n in ("few", "many")]
    for dataset in datasets:
        dataset.source.prepare(tmp_path)
    found = pretokenize._fitting_examples(TextRecipe(), datasets, tmp_path, 0)
    assert len(found) == 2005 and {"few 3", "many 900"} <= {found[i]["caption"] for i in range(2005)}

    examples = [{"caption": "a"}] * 900 + [{"boxes": {"bbox": np.zeros((0, 4)), "label": []}}] * 100
    assert pretokenize.ExamplesWithSignal(examples, BoxRecipe(), skip_bad=False).reads_some()


def test_any_error_of_a_reader_or_tokenizer_names_its_example(tmp_path):
    """Not only those that were foreseen."""

    class Broken(Seq):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise ZeroDivisionError("by nothing")
            return {"caption": 7 if index == 2 else "words", "file": f"file {index}"}

    class Source:
        def prepare(self, data_dir):
            pass

        def split(self, name, data_dir):
            return Broken()

    tokenizer = tmp_path / "caption.safetensors"
    save_tokenizer(TextRecipe().fit([{"caption": "words"}], seed=0), tokenizer)
    dataset = Dataset(source=Source(), skip_bad=0.7, name="broken")
    pretokenize.pretokenize(dataset, {"caption": tokenizer}, tmp_path / "t", "train", data_dir=tmp_path)
    first, second = json.loads((tmp_path / "t" / "train.json").read_text())["skipped"]["first"]
    assert first == "example 1 of broken train: ZeroDivisionError: by nothing"
    assert second.startswith("example 2 of broken train: file 2: caption: ")
    with pytest.raises(ValueError, match="example 1: ZeroDivisionError: by nothing"):
        pretokenize.ExamplesWithSignal(Broken(), TextRecipe(), skip_bad=False)[1]


def test_crops_are_stored_and_aligned(root, tmp_path):
    """Three crops of each picture, each with its place; boxes and captions go along."""
    source = Folders(root=str(root), allow_missing=True, validation_share=0.0, test_share=0.0)
    dataset = Dataset(source=source, crops=Crops(num=3, scale=(0.5, 1.0), size=16))
    prepared = prepare([dataset], RECIPES, tmp_path / "data", seed=0)
    found = records(prepared.tokens[0])
    assert len(found) == 3 * NUM and len({tuple(r["crop"]) for r in found}) > 2 * NUM
    for k, r in enumerate(found):
        i, (ymin, xmin, ymax, xmax, flipped) = k // 3, r["crop"]
        assert prepared.tokenizers["caption"].decode([r["caption"]])[0].endswith(f" {i}")
        assert 0 <= ymin < ymax <= 1 and 0 <= xmin < xmax <= 1 and flipped in (0, 1)
        expected = source.split("train", tmp_path)[i]["rgb"]
        top, left, side = (round(16 * x) for x in (ymin, xmin, ymax - ymin))
        crop = Image.fromarray(expected[top : top + side, left : left + side])
        crop = np.asarray(crop.resize((16, 16), Image.Resampling.BICUBIC))[:, :: -1 if flipped else 1]
        np.testing.assert_array_equal(prepared.tokenizers["rgb_pixels"].decode([r["rgb_pixels"]])[0], crop)


TOKENS = Grid(name="tok_x@224", signal="x", vocab_size=9, shape=(2, 2))


def test_tars_of_the_originals_layout_train_without_their_tokenizers(tmp_path):
    """Ids with four crops of each sample beside captions; the tokenizer of the ids need not be there."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, (10, 4, 4)).astype(np.int16)
    for name in ("tok_x@224", "caption"):
        (tmp_path / "tars" / name).mkdir(parents=True)
        with tarfile.open(tmp_path / "tars" / name / "shard-00000.tar", "w") as tar:
            for i in range(10):
                file = tmp_path / "file"
                if name == "caption":
                    file.write_text(f"number {i}")
                else:
                    np.save(file.with_suffix(".npy"), ids[i])
                    file = file.with_suffix(".npy")
                tar.add(file, f"{i:05d}{'.txt' if name == 'caption' else '.npy'}")
    source = Tars(root=str(tmp_path / "tars"), num_crops=4, validation_share=0.0, test_share=0.0)
    recipes = (IdsRecipe(modality=TOKENS), TextRecipe())
    prepared = prepare([Dataset(source=source)], recipes, tmp_path / "data", seed=0)
    found = records(prepared.tokens[0])
    assert len(found) == 40
    for k, record in enumerate(found):
        assert record["tok_x@224"].tolist() == ids[k // 4, k % 4].tolist()
        assert prepared.tokenizers["caption"].decode([record["caption"]]) == [f"number {k // 4}"]
    loaded = load_tokenizer(prepared.tokenizer_files["tok_x@224"])
    assert loaded.modality == TOKENS and loaded.draw(loaded.decode([ids[0, 0]])[0], image=None).shape == (128, 128, 3)


def test_a_tokenizer_may_come_from_a_file(dataset, tmp_path):
    """Its modality too; the shards are those of the run that fitted it."""
    first = prepare([dataset], RECIPES, tmp_path / "a", seed=0)
    recipes = tuple(TokenizerFile(path=str(first.tokenizer_files[r.modality.name])) for r in RECIPES)
    assert [r.modality for r in recipes] == [r.modality for r in RECIPES]
    second = prepare([dataset], recipes, tmp_path / "b", seed=0)
    assert as_bytes(records(first.tokens[0])) == as_bytes(records(second.tokens[0]))
    with pytest.raises(ValueError, match="no file '.*nothing.safetensors'"):
        TokenizerFile(path=str(tmp_path / "nothing.safetensors"))


def test_a_config_knows_the_tokenizer_that_it_chose(tmp_path):
    """Its JSON stands without the file; another tokenizer in the file's place is an error, not taken for it."""
    file, recipe = tmp_path / "own.safetensors", ClassRecipe(classes=("cat", "dog"))
    save_tokenizer(recipe.fit([], seed=0), file)
    chosen = TokenizerFile(path=str(file))
    assert chosen.fit([], seed=0).recipe == recipe
    save_tokenizer(dataclasses.replace(recipe, classes=("dog", "cat")).fit([], seed=0), file)
    assert chosen.modality == recipe.modality == TokenizerFile(path=str(file)).modality
    with pytest.raises(ValueError, match="own.safetensors holds another tokenizer"):
        chosen.fit([], seed=0)
    file.unlink()
    assert from_json(json.loads(json.dumps(to_json(chosen)))) == chosen


def test_ids_under_a_modalitys_own_name_are_taken_as_they_are(tmp_path, root):
    """Checked like any: range, number, axes."""
    tokenizers = {"tok_x@224": IdsRecipe(modality=TOKENS).fit([], seed=0)}
    ids = np.array([8, 0, 3, 3], np.int64)
    (record,) = encode([{"tok_x@224": ids, "file": "a.npy"}], tokenizers)
    assert record["tok_x@224"].dtype == np.uint8 and record["tok_x@224"].tolist() == ids.tolist()
    for wrong, message in (
        (np.array([9, 0, 0, 0]), r"a.npy: tok_x@224: ids 0..9 outside \[0, 9\)"),
        (np.zeros(5, int), "a.npy: tok_x@224: 5 ids, the grid has 4"),
        (np.zeros((2, 2), int), "1-D array of integers"),
        (np.zeros(4), "1-D array of integers"),
        ("8 0 3 3", "not str"),
    ):
        with pytest.raises(ValueError, match=message):
            encode([{"tok_x@224": wrong, "file": "a.npy"}], tokenizers)


def test_ids_of_a_sequence_from_elsewhere_end_and_hold_no_sentinel(capsys, tmp_path):
    """Those that are taken are counted."""
    tokenizer = TextRecipe(max_length=8).fit([{"caption": "words"}], seed=0)
    m = tokenizer.modality
    good = np.array([m.vocab_size - 1, m.end_id])
    (record,) = encode([{"caption": good}], {"caption": tokenizer})
    assert record["caption"].tolist() == good.tolist()
    for wrong, message in (
        (good[:1], r"caption: ids end in \d+, not in \[EOS\] \(\d+\)"),
        (np.array([m.first_sentinel + 2, m.end_id]), "caption: ids .* are masking's sentinels"),
    ):
        with pytest.raises(ValueError, match=message):
            encode([{"caption": wrong}], {"caption": tokenizer})
    facts = ShardStatistics({"caption": tokenizer})
    facts.add_given({"caption": good})
    facts.add_given({"caption": "words"})
    assert facts.given == {"caption": 1}


def test_ids_outside_the_vocabulary_are_refused(modalities):
    with pytest.raises(ValueError, match=r"depth_tokens: ids 0..7 outside \[0, 7\)"):
        compact(np.arange(8), modalities.named("depth_tokens"))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--host", "2/2"], "process 2 of 2"),
        (["--host", "one"], "--host takes I/N, such as 0/4, got 'one'"),
        (["--processes", "0"], "0 workers"),
        (["--datasets.0.weight", "0"], "weight=0.0 must be positive"),
        (["--splits", "trian", "--data-dir", "{tmp}"], "split"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path):
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    done = call_m4("pretokenize", "tests/tiny_config.py", *arguments)
    assert done.returncode != 0 and message in done.stderr + done.stdout, done.stderr


def test_signals_are_chosen(dataset, tmp_path):
    """Only these are tokenized, and stored under a key of their own; one that no example has is named."""
    whole = prepare([dataset], RECIPES, tmp_path, seed=0)
    part = prepare([dataclasses.replace(dataset, signals=("rgb", "caption"))], RECIPES, tmp_path, seed=0)
    assert part.tokens != whole.tokens
    for some, every in zip(records(part.tokens[0]), records(whole.tokens[0]), strict=True):
        assert "boxes" not in some and "caption" in some
        assert all((x == every[name]).all() for name, x in some.items())
    with pytest.raises(ValueError, match="none of signals=.'captoin',.*caption"):
        prepare([dataclasses.replace(dataset, signals=("captoin",))], RECIPES[1:2], tmp_path / "b", seed=0)
