"""Crops of the bundled photographs are reproducible, aligned with their depth, and honest about their splits.

Axes: H rows, W columns.
"""

import itertools
import pickle
from importlib.util import find_spec

import numpy as np
import pytest

from m4.data.sources import photos
from m4.data.sources.photos import PICTURES, SPLITS, Photos, motorcycle_depth, picture
from m4.registry import to_json

missing = [package for package in ("skimage", "sklearn") if find_spec(package) is None]
needs_photos = pytest.mark.skipif(bool(missing), reason=photos.INSTALL)


def assert_same(left: dict, right: dict):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@needs_photos
def test_examples_are_as_promised():
    source = Photos(size=48, num_train=200, num_validation=3)
    source.prepare("unused")
    split = source.split("train", "unused")
    assert (len(split), len(source.split("validation", "unused"))) == (200, 3)
    examples = list(split)  # ends with an IndexError, as a sequence does
    assert len(examples) == 200 and {e["file"] for e in examples} == set(PICTURES)
    for example in examples:
        assert example["rgb"].shape == (48, 48, 3) and example["rgb"].dtype == np.uint8
        assert ("depth" in example) == (example["file"] == "motorcycle_left.png")
        if "depth" in example:
            known = example["depth"][example["depth"] > 0]
            assert example["depth"].shape == (48, 48) and example["depth"].dtype == np.float32
            assert 2 < known.min() <= known.max() < 5.1  # metres; the garage is not deeper
    mirrored = np.mean([split.place(i)[3] for i in range(len(split))])
    assert 0.35 < mirrored < 0.65
    assert_same(split[-1], examples[199])
    assert_same(split[np.int64(7)], examples[7])
    with pytest.raises(IndexError, match="photo 200 of 200"):
        split[200]


@needs_photos
def test_an_example_depends_on_seed_split_and_index_alone():
    split = Photos(num_train=50).split("train", "here")
    backwards = [split[i] for i in reversed(range(50))][::-1]
    longer = pickle.loads(pickle.dumps(Photos(num_train=90))).split("train", "there")
    for i in range(50):
        assert_same(backwards[i], longer[i])
    places = [
        tuple(map(str, Photos(seed=seed, flips=False).split(name, "here").place(i)))
        for seed, name, i in itertools.product((0, 1), SPLITS, range(30))
    ]
    assert len(set(places)) == len(places)
    assert to_json(Photos(seed=1)) != to_json(Photos())


@needs_photos
def test_no_split_sees_pixels_of_another(monkeypatch):
    """Noise over all of a picture but a split's region changes none of its examples; the regions tile the picture."""
    source = Photos(num_train=60, num_validation=60, num_test=60)
    rng = np.random.default_rng(0)
    seen = {file: np.zeros(picture(file).shape[:2], int) for file in PICTURES}
    for name in SPLITS:
        split = source.split(name, "unused")
        before = list(split)
        noisy = {}
        for file in PICTURES:
            top, left, bottom, right = photos.region(file, name)
            seen[file][top:bottom, left:right] += 1
            noisy[file] = rng.integers(0, 256, picture(file).shape).astype(np.uint8)
            noisy[file][top:bottom, left:right] = picture(file)[top:bottom, left:right]
        with monkeypatch.context() as patch:
            patch.setattr(photos, "picture", noisy.__getitem__)
            for example, unchanged in zip(split, before, strict=True):
                assert_same(example, unchanged)
    assert all((count == 1).all() for count in seen.values())


@needs_photos
def test_crops_are_pieces_of_the_picture_with_its_depth():
    """A crop of its own size is not resized: rgb and depth are the picture's, mirrored together."""
    split = Photos(size=100, smallest=0.2, largest=0.2).split("train", "unused")  # 0.2 of 500 rows
    motorcycles = [i for i in range(200) if split.place(i)[0] == "motorcycle_left.png"]
    assert {split.place(i)[3] for i in motorcycles} == {False, True}
    for i in motorcycles:
        file, rows, columns, mirrored = split.place(i)
        step = -1 if mirrored else 1
        np.testing.assert_array_equal(split[i]["rgb"], picture(file)[rows, columns][:, ::step])
        np.testing.assert_array_equal(split[i]["depth"], motorcycle_depth()[rows, columns][:, ::step])


@needs_photos
def test_crops_are_antialiased():
    """Resized to few pixels, a crop keeps its mean colour, which sampling every tenth pixel would not."""
    split = Photos(size=8, smallest=0.4).split("test", "unused")
    for i in range(50):
        file, rows, columns, _ = split.place(i)
        mean = picture(file)[rows, columns].mean((0, 1))
        np.testing.assert_allclose(split[i]["rgb"].mean((0, 1)), mean, atol=3)


def test_errors_tell_what_is_allowed(monkeypatch):
    with pytest.raises(ValueError, match="unknown split 'trian'.*Did you mean 'train'"):
        Photos().split("trian", "unused")
    with pytest.raises(ValueError, match="num_test is 0, but must be at least 1"):
        Photos(num_test=0)
    with pytest.raises(ValueError, match="smallest 0.3 and largest 0.6 are given, but 0 < smallest <= largest <= 0.5"):
        Photos(smallest=0.3, largest=0.6)
    monkeypatch.setattr(photos, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r'skimage is not installed; pip install "m4-jax\[photos\]"'):
        Photos().prepare("unused")
