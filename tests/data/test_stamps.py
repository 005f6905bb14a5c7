"""Compositions of stamps are aligned by the pixel, true to perspective, split by stamp and captioned as the corpus is.

Axes: H rows, W columns.
"""

import os
import pickle
import unicodedata
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4.data.sources import built, stamps
from m4.data.sources.stamps import (
    BACKDROP,
    CATEGORIES,
    FARTHEST,
    INSTALL,
    NEAREST,
    SPLITS,
    Stamps,
    compose,
    corpus,
    cutout,
)
from m4.registry import from_json, to_json

CORPUS = Stamps().path
needs_corpus = pytest.mark.skipif(not Path(CORPUS).is_dir(), reason=INSTALL)
SMALL = {"num_train": 40, "num_validation": 3, "num_test": 3}


def assert_same(left: dict, right: dict):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[name])
        elif isinstance(value, np.ndarray):
            assert value.dtype == right[name].dtype
            np.testing.assert_array_equal(value, right[name], err_msg=name)
        else:
            assert value == right[name], name


@pytest.fixture(scope="module")
def examples() -> list[dict]:
    return [compose(Stamps(language="any"), "train", i) for i in range(200)]


@pytest.fixture
def tiny(tmp_path) -> str:
    """A corpus of plain squares, red in food and blue in space, which lack no split. Transparent pixels are green."""
    for category, colour in (("food", (255, 0, 0)), ("space", (0, 0, 255))):
        folder = tmp_path / "corpus" / category
        folder.mkdir(parents=True)
        for i in range(40):
            pixels = np.zeros((60, 90, 4), np.uint8)
            pixels[..., 1] = 255
            pixels[10:50, 20:60] = (*colour, 255)
            Image.fromarray(pixels).save(folder / f"{category}{i}.png")
            (folder / f"{category}{i}.txt").write_text(f"Thing  {i}.\nxx.utf8=chose {i}\nja.utf8=もの{i}。\n")
    return str(tmp_path / "corpus")


@needs_corpus
def test_annotations_are_aligned(examples):
    """Boxes touch visible pixels on all sides; class and depth follow the instance; objects go from near to far."""
    for example in examples:
        instance, depth, semseg = example["instance"], example["depth"], example["semseg"]
        boxes = example["boxes"]
        assert (example["rgb"].dtype, depth.dtype, semseg.dtype) == (np.uint8, np.float32, np.int32)
        assert example["rgb"].shape == (64, 64, 3) and depth.shape == semseg.shape == instance.shape == (64, 64)
        assert 1 <= instance.max() == len(boxes["label"]) == len(boxes["bbox"]) <= 5
        distances = [depth[instance == i + 1] for i in range(instance.max())]
        for i, of_object in enumerate(distances):
            rows, columns = np.nonzero(instance == i + 1)
            assert len(rows) >= 16 and np.ptp(of_object) == 0
            tight = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            np.testing.assert_array_equal(boxes["bbox"][i] * 64, tight)
            assert (semseg[rows, columns] == 1 + CATEGORIES.index(boxes["label"][i])).all()
        firsts = [of_object[0] for of_object in distances]
        assert firsts == sorted(firsts) and NEAREST <= firsts[0] <= firsts[-1] <= FARTHEST
        assert (depth[instance == 0] == np.float32(BACKDROP)).all() and ((semseg == 0) == (instance == 0)).all()
    assert Counter(len(example["boxes"]["label"]) for example in examples).keys() == {1, 2, 3, 4, 5}


def test_sizes_follow_distance_and_nearer_hides_farther(tiny):
    """Opaque squares 1 m wide: each is size / distance pixels wide, less what nearer ones hide, and has its colour."""
    source = Stamps(path=tiny, size=96)
    num_whole = num_hidden = 0
    for i in range(100):
        example = compose(source, "train", i)
        free = np.ones((96, 96), bool)
        for k, (bbox, label) in enumerate(zip(*example["boxes"].values(), strict=True)):
            visible = example["instance"] == k + 1
            top, left, bottom, right = np.round(bbox * 96).astype(int)
            side = round(96 / round(float(example["depth"][visible][0]), 3))
            whole = visible.sum() == side**2
            num_whole, num_hidden = num_whole + whole, num_hidden + (not whole)
            assert bottom - top == right - left == side if whole else max(bottom - top, right - left) <= side
            if visible.sum() < side**2:  # what lacks within its box belongs to nearer squares
                assert (visible | ~free)[top:bottom, left:right].all()
            colour = (255, 0, 0) if label == "food" else (0, 0, 255)
            assert (example["rgb"][visible] == colour).all()
            free &= ~visible
    assert num_whole > 100 and num_hidden > 50


def test_transparent_pixels_lend_no_colour(tiny, tmp_path):
    """The green that transparent pixels hold is nowhere in a downscaled red disc: no halos."""
    y, x = np.mgrid[:100, :100] - 49.5
    pixels = np.zeros((100, 100, 4), np.uint8)
    pixels[...] = (0, 255, 0, 0)
    pixels[x**2 + y**2 < 45**2] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "disc.png")
    disc = np.asarray(cutout(tmp_path / "disc.png", 21))
    assert disc.shape == (21, 21, 4) and (disc[..., 3] % 255 > 0).any()
    assert (disc[..., 1:3] == 0).all() and (disc[..., 0] == disc[..., 3]).all()


@needs_corpus
def test_no_stamp_is_in_two_splits():
    """Neither by path nor by pixels, nor what two folders hold under one name."""
    files = {name: {stamp.file for stamp in Stamps().stamps(name)} for name in SPLITS}
    assert sum(map(len, files.values())) == len(set.union(*files.values())) == len(corpus(CORPUS)) > 700
    for key in (lambda file: file.stem, lambda file: cutout(file, 49).tobytes()):
        keys = {name: {key(file) for file in files[name]} for name in SPLITS}
        assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
        assert not keys["test"] & keys["validation"]
    assert 0.7 < len(files["train"]) / len(corpus(CORPUS)) < 0.9 and min(map(len, files.values())) > 40
    assert {stamp.category for stamp in corpus(CORPUS)} == set(CATEGORIES)


@needs_corpus
def test_examples_show_stamps_of_their_split_alone():
    for name in SPLITS:
        words = {stamp.captions["en"] for stamp in Stamps(max_objects=1).stamps(name)}
        for i in range(20):
            caption = compose(Stamps(max_objects=1), name, i)["caption"]
            assert caption in words or caption[:-1] in words


@needs_corpus
def test_an_example_is_a_function_of_its_arguments():
    source = Stamps(seed=3)
    first = compose(source, "train", 5)
    assert_same(first, compose(Stamps(seed=3, num_train=7), "train", 5))
    others = [compose(Stamps(seed=4), "train", 5), compose(source, "test", 5), compose(source, "train", 6)]
    assert all((first["rgb"] != other["rgb"]).any() for other in others)
    assert from_json(to_json(source)) == source


@needs_corpus
def test_captions_come_in_many_languages(examples):
    """Any language: each caption is made of its objects' own captions, near to far. One: no other is used."""
    scripts = Counter(unicodedata.name(next(c for c in e["caption"] if c.isalpha()), "?").split()[0] for e in examples)
    assert {"LATIN", "CYRILLIC", "GREEK", "DEVANAGARI", "GEORGIAN", "ETHIOPIC", "THAI"} <= scripts.keys()
    assert len({e["language"] for e in examples}) > 40
    lion = next(stamp for stamp in corpus(CORPUS) if stamp.captions["en"] == "A very poisonous lionfish!")
    wanted = {
        "ru": "Очень ядовитая рыба-лев!",
        "el": "Λεοντόψαρο. Πολύ δηλητηριώδες ψάρι!",
        "ja": "もうどくの ミノカサゴ！",
        "zh_TW": "毒性很強的獅子魚",
        "he": "רעיל מאוד דגים האריה!",
        "hi": "एक बहुत जहरीली शेर मछली!",
        "ca@valencia": "Un peix escorpí molt verinós.",
    }
    assert {code: lion.captions[code] for code in wanted} == wanted
    assert all(unicodedata.category(c) != "Cc" for s in corpus(CORPUS) for text in s.captions.values() for c in text)
    known = {text.rstrip(".") for stamp in corpus(CORPUS) for text in [stamp.captions.get("ka", "")]}
    for i in range(10):
        example = compose(Stamps(language="ka", max_objects=1), "validation", i)
        assert example["language"] == "ka" and example["caption"].rstrip(".") in known


def test_caption_scheme(tiny):
    """Sentences from near to far; a full stop where a caption has none; missing languages are not made up."""
    for language, pattern in (("en", "Thing {}."), ("xx", "chose {}."), ("ja", "もの{}。")):
        example = compose(Stamps(path=tiny, language=language), "train", 0)
        allowed = {pattern.format(i) for i in range(40)}
        sentences = [f"{words}{pattern[-1]}" for words in example["caption"].split(pattern[-1])[:-1]]
        assert len(sentences) == len(example["boxes"]["label"])
        assert {sentence.strip() for sentence in sentences} <= allowed
    (Path(tiny) / "food" / "food0.txt").write_text("Thing 0.\n")
    corpus.cache_clear()
    stamps._choices.cache_clear()
    without = {s.file.stem for name in SPLITS for s in Stamps(path=tiny, language="xx").stamps(name)}
    assert len(without) == 79 and "food0" not in without


@needs_corpus
@pytest.mark.skipif(find_spec("skimage") is None or find_spec("sklearn") is None, reason="needs photographs")
def test_photographs_lie_behind():
    """The backdrop alone differs from the plain one, and is the photograph of the same index and split."""
    plain, photos = (Stamps(backgrounds=name) for name in stamps.BACKGROUNDS)
    for i in range(5):
        left, right = compose(plain, "test", i), compose(photos, "test", i)
        np.testing.assert_array_equal(left["instance"], right["instance"])
        same = (right["rgb"] == photos.photos.split("test", "")[i]["rgb"]).all(-1)
        assert same[right["instance"] == 0].mean() > 0.8  # the rest has a soft rim before it


@needs_corpus
def test_builds_read_back(tmp_path, monkeypatch):
    """By several processes and by one; in order; also after a trip through pickle; in a folder per recipe."""
    source = Stamps(language="any", **SMALL)
    monkeypatch.setattr(built, "CHUNK", 8)  # train is enough for processes
    source.prepare(tmp_path / "several")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    source.prepare(tmp_path / "one")
    source.prepare(tmp_path / "one")
    for name in SPLITS:
        several, one = source.split(name, tmp_path / "several"), source.split(name, tmp_path / "one")
        assert len(several) == len(one) == getattr(source, f"num_{name}")
        for i in range(len(one)):
            expected = compose(source, name, i)
            assert_same(expected, several[i])
            assert_same(expected, one[i])
        assert_same(one[-1], pickle.loads(pickle.dumps(one))[len(one) - 1])
    recipes = [Stamps(), Stamps(language="fr"), Stamps(seed=1), Stamps(size=32), Stamps(max_objects=2)]
    recipes += [Stamps(backgrounds="photos"), *(Stamps(**{f"num_{name}": 7}) for name in SPLITS)]
    assert len({recipe.folder(tmp_path) for recipe in recipes}) == len(recipes)


def test_an_interrupted_build_is_absent(tiny, tmp_path, monkeypatch):
    """A build that fails leaves no folder, and the next one starts afresh."""
    source = Stamps(path=tiny, size=16, num_train=3, num_validation=1, num_test=1)

    def fail(source, split, index, compose=stamps.compose):
        if split == "test":
            raise KeyboardInterrupt
        return compose(source, split, index)

    with monkeypatch.context() as patch:
        patch.setattr(stamps, "compose", fail)
        with pytest.raises(KeyboardInterrupt):
            source.prepare(tmp_path)
    assert not source.folder(tmp_path).exists()
    with pytest.raises(ValueError, match=r"no stamps in .*; call Stamps\.prepare"):
        len(source.split("train", tmp_path))
    source.prepare(tmp_path)
    assert len(source.split("train", tmp_path)) == 3


def test_signature_follows_the_corpus_not_its_place(tiny, tmp_path):
    before = Stamps(path=tiny).signature(tmp_path)
    Path(tiny).rename(tmp_path / "moved")
    moved = Stamps(path=str(tmp_path / "moved"))
    assert moved.signature(tmp_path) == before and len(before) == 12
    (tmp_path / "moved" / "food" / "food1.txt").write_text("Another.\n")
    assert moved.signature(tmp_path) != before


def test_errors_tell_what_is_allowed(tiny, tmp_path):
    with pytest.raises(ValueError, match=f"no stamps in /nowhere; {INSTALL}, or give the `path`"):
        Stamps(path="/nowhere").prepare(tmp_path)
    with pytest.raises(ValueError, match="unknown language 'jp'; allowed: any, en, ja, xx. Did you mean 'ja'"):
        Stamps(path=tiny, language="jp").prepare(tmp_path)
    with pytest.raises(ValueError, match="unknown split 'val'.*Did you mean 'validation'"):
        Stamps(path=tiny).split("val", tmp_path)
    with pytest.raises(ValueError, match="unknown backgrounds 'photo'.*Did you mean 'photos'"):
        Stamps(backgrounds="photo")
    with pytest.raises(ValueError, match="num_test is 0, but must be at least 1"):
        Stamps(num_test=0)
    with pytest.raises(ValueError, match="max_objects is 256, but must be at most 255"):
        Stamps(max_objects=256)
    for stamp in corpus(tiny):
        if stamp.split == "test":
            stamp.file.with_suffix(".txt").write_text("Thing.\nja.utf8=もの\n")
    corpus.cache_clear()
    with pytest.raises(ValueError, match="no stamp of split 'test' in .* has a caption in 'xx'"):
        Stamps(path=tiny, language="xx").prepare(tmp_path)


def test_damaged_files_are_named(tiny, tmp_path):
    (Path(tiny) / "food" / "food3.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"food3\.txt is not UTF-8: byte 3"):
        Stamps(path=tiny).prepare(tmp_path)
    (Path(tiny) / "food" / "food3.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"food3\.png cannot be read"):
        cutout(Path(tiny) / "food" / "food3.png", 20)
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save(Path(tiny) / "thin.png")
    with pytest.raises(ValueError, match=r"thin\.png is wholly transparent"):
        cutout(Path(tiny) / "thin.png", 20)
