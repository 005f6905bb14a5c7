"""Crops keep the signals of an example aligned.

Axes: H rows, W columns.
"""

import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m4.data.sources.crops import Crop, Cropped, Crops
from m4.data.sources.scenes import Scenes
from m4.registry import from_json, to_json


def coordinates(height: int, width: int) -> dict:
    """An example whose pictures all tell the row and column of each pixel."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angle = (y * width + x) / (height * width)
    return {
        "rgb": np.stack([y, x, y ^ x], axis=-1).astype(np.uint8),
        "depth": (y * 1000 + x).astype(np.float32),
        "normals": np.stack([np.sin(angle), np.cos(angle), 0 * angle], axis=-1).astype(np.float32),
        "semseg": (y * 1000 + x).astype(np.int32),
        "instance": y * 1000 + x,
        "heat": np.stack([y, x], axis=-1) / 7,
        "caption": "all of it",
        "objects": [{"shape": "cube"}],
    }


extents = st.tuples(st.integers(4, 60), st.integers(4, 60))
crops_ = st.builds(
    lambda a, b, **other: Crops(scale=(min(a, b), max(a, b)), **other),
    a=st.floats(0.1, 1),
    b=st.floats(0.1, 1),
    num=st.integers(1, 3),
    flip=st.booleans(),
    size=st.sampled_from([None, 1, 7, 40]),
)


@given(extents, crops_, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_all_pictures_stay_aligned(extent, crops, seed):
    whole = coordinates(*extent)
    view = Cropped([whole, whole], crops, seed)
    assert len(view) == 2 * crops.num
    for example in view:
        assert example["caption"] == "all of it" and example["objects"] == whole["objects"]
        y, x = np.divmod(example["semseg"], 1000)
        side = crops.size or len(y)
        for name, value in example.items():
            if isinstance(value, np.ndarray) and name != "crop":
                assert value.shape == (side, side, *whole[name].shape[2:]) and value.dtype == whole[name].dtype
        np.testing.assert_array_equal(example["depth"], whole["depth"][y, x])
        np.testing.assert_array_equal(example["instance"], whole["instance"][y, x])
        np.testing.assert_array_equal(example["heat"], whole["heat"][y, x])
        ymin, xmin, ymax, xmax, flipped = example["crop"]
        sign = np.float32([-1 if flipped else 1, 1, 1])
        np.testing.assert_array_equal(example["normals"], whole["normals"][y, x] * sign)
        if crops.size is None:
            np.testing.assert_array_equal(example["rgb"], whole["rgb"][y, x])
        assert example["crop"].dtype == np.float32 and flipped in ((0, 1) if crops.flip else (0,))
        assert 0 <= ymin < ymax <= 1 and 0 <= xmin < xmax <= 1
        # The crop says where its pixels are, which is a square of the picture.
        height, width = extent
        assert round((ymax - ymin) * height) == round((xmax - xmin) * width) >= side * (crops.size is None)
        assert ymin * height - 0.01 <= y.min() and y.max() + 1 <= ymax * height + 0.01
        assert xmin * width - 0.01 <= x.min() and x.max() + 1 <= xmax * width + 0.01
        assert (np.diff(x, axis=1) <= 0).all() if flipped else (np.diff(x, axis=1) >= 0).all()


def box_of(mask: np.ndarray) -> np.ndarray:
    """(ymin, xmin, ymax, xmax) in [0, 1] of the pixels of a mask [H W]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    edges = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], np.float64)
    return (edges / np.tile(mask.shape, 2)).astype(np.float32)


@given(extents, crops_, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_boxes_bound_the_pixels_of_the_cropped_map(extent, crops, seed):
    """Exactly for an object that fills its box; the pixels of any object lie within its box."""
    rng = np.random.default_rng(seed)
    height, width = extent
    (top, bottom), (left, right) = np.sort(rng.integers(0, height, 2)), np.sort(rng.integers(0, width, 2))
    rectangle = np.zeros(extent, np.int32)
    rectangle[top : bottom + 1, left : right + 1] = 1
    speckled = rng.integers(0, 2, extent).astype(np.int32) * rectangle
    speckled[top, left] = 1
    boxes = {"bbox": np.stack([box_of(rectangle), box_of(speckled)]), "label": ["full", "speckled"]}
    exact = Crops(num=4, scale=crops.scale, flip=crops.flip, min_visible=1e-4)  # less than a pixel
    raw = {"instance": rectangle, "semseg": speckled, "boxes": boxes}
    for example in Cropped([raw], exact, seed):
        bbox, label = example["boxes"]["bbox"], example["boxes"]["label"]
        assert bbox.dtype == np.float32 and bbox.shape == (len(label), 4)
        assert (bbox >= 0).all() and (bbox[:, :2] <= bbox[:, 2:]).all() and (bbox <= 1).all()
        assert ("full" in label) == example["instance"].any()
        for box, name in zip(bbox, label, strict=True):
            mask = example["instance" if name == "full" else "semseg"]
            if name == "full":
                np.testing.assert_allclose(box, box_of(mask), atol=1e-5)
            elif mask.any():
                assert (box[:2] <= box_of(mask)[:2] + 1e-5).all() and (box_of(mask)[2:] <= box[2:] + 1e-5).all()


def test_boxes_that_are_mostly_outside_are_dropped():
    crop = Crop(0.0, 0.5, 0.5, 1.0, False)
    bbox = np.float32([[0.0, 0.4, 0.4, 0.6], [0.1, 0.35, 0.3, 0.55], [0.2, 0.5, 0.2, 0.7], [0.6, 0.6, 0.9, 0.9]])
    boxes = {"bbox": bbox, "label": ["half", "quarter", "line", "below"]}
    kept = crop.boxes(boxes, 0.5)
    assert kept["label"] == ["half", "line"]
    np.testing.assert_allclose(kept["bbox"], [[0, 0, 0.8, 0.2], [0.4, 0, 0.4, 0.4]], atol=1e-6)
    mirrored = crop._replace(flipped=True).boxes(boxes, 0.2)
    assert mirrored["label"] == ["half", "quarter", "line"]
    np.testing.assert_allclose(mirrored["bbox"][0], [0, 0.8, 0.8, 1], atol=1e-6)
    assert crop.boxes({"bbox": np.zeros((0, 4), np.float32), "label": []}, 0.5)["bbox"].shape == (0, 4)


@given(extents)
def test_mirroring_twice_changes_nothing(extent):
    mirror = Crop(0, 0, 1, 1, True)
    for name, pixels in coordinates(*extent).items():
        if isinstance(pixels, np.ndarray):
            twice = mirror.picture(name, mirror.picture(name, pixels, None), None)
            np.testing.assert_array_equal(twice, pixels)
    boxes = {"bbox": np.float32([[0.25, 0.125, 0.5, 0.75]]), "label": ["cube"]}
    np.testing.assert_array_equal(mirror.boxes(mirror.boxes(boxes, 0.5), 0.5)["bbox"], boxes["bbox"])


def test_pictures_of_other_sizes_are_cut_at_the_same_shares():
    """rgb of 48 x 64 and depth of 24 x 32: each depth pixel covers two by two pixels of the reference."""
    raw = {"rgb": coordinates(48, 64)["rgb"], "depth": coordinates(24, 32)["depth"]}
    for example in Cropped([raw], Crops(num=30, scale=(0.2, 1)), 0):
        y, x = np.divmod(example["depth"], 1000)
        ends = np.array([[y[0, 0], x[0, 0]], [y[-1, -1], x[-1, -1]]]) * 2 + 0.5  # centres, in pixels of rgb
        corners = example["rgb"][[0, -1], [0, -1], :2].astype(float)
        assert abs(corners - ends).max() <= 1.5
        assert abs(example["depth"].shape[0] - example["rgb"].shape[0] / 2) <= 1
    tiny = {"rgb": coordinates(40, 40)["rgb"], "depth": np.ones((2, 2), np.float32)}
    assert {e["depth"].size > 0 for e in Cropped([tiny], Crops(num=50, scale=(0.05, 0.1)), 0)} == {True}


def test_draws_depend_on_seed_example_and_number_alone():
    raw = [coordinates(30, 40)] * 5
    view = Cropped(raw, Crops(num=4), 3)
    crops = np.array([example["crop"] for example in view])
    assert len(np.unique(crops, axis=0)) == 20
    backwards = [view[i]["crop"] for i in reversed(range(20))][::-1]
    np.testing.assert_array_equal(backwards, crops)
    fewer = Cropped(raw[:2], Crops(num=2), 3)
    np.testing.assert_array_equal([e["crop"] for e in fewer], crops[[0, 1, 4, 5]])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(view))[np.int64(7)]["rgb"], view[7 - 20]["rgb"])
    assert (Cropped(raw, Crops(num=4), 4)[0]["crop"] != crops[0]).any()
    sides = (crops[:, 2] - crops[:, 0]) * 30
    assert 14.9 < sides.min() < 19 and 26 < sides.max() < 30.1
    assert {True, False} == set(crops[:, 4] == 1)
    with pytest.raises(IndexError, match="crop 20 of 20"):
        view[20]


def test_no_scale_and_no_flip_is_a_centre_crop():
    crops = Crops(scale=(1, 1), flip=False)
    (example,) = Cropped([coordinates(20, 30)], crops, 0)
    np.testing.assert_array_equal(example["rgb"], coordinates(20, 30)["rgb"][:, 5:25])
    np.testing.assert_allclose(example["crop"], [0, 5 / 30, 1, 25 / 30, 0], rtol=1e-6)
    assert from_json(to_json(crops)) == Crops(scale=(1, 1), flip=False)


def test_rgb_is_antialiased():
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    (example,) = Cropped([{"rgb": noise}], Crops(scale=(1, 1), flip=False, size=8), 0)
    np.testing.assert_allclose(example["rgb"].mean((0, 1)), noise.mean((0, 1)), atol=3)
    assert example["rgb"].std() < 0.2 * noise.std()


def test_crops_of_scenes(tmp_path):
    """The boxes of a cropped scene bound what is left of each object in its instance map."""
    source = Scenes(num_train=4, num_validation=1, num_test=1, num_heldout=1)
    source.prepare(tmp_path)
    split = source.split("train", tmp_path)
    for example in Cropped(split, Crops(num=5, min_visible=0.9), 0):
        assert example["rgb"].shape[:2] == example["depth"].shape == example["instance"].shape
        length = np.linalg.norm(example["normals"], axis=-1)
        assert (abs(length - 1) < 1e-3).all() or (length[abs(length - 1) > 1e-3] < 1e-3).all()
        present = [box_of(example["instance"] == i) for i in np.unique(example["instance"]) if i > 0]
        for box in example["boxes"]["bbox"]:
            assert min(abs(box - other).max() for other in present) < 0.15


def test_what_cannot_be_cropped_is_named():
    raw = {"rgb": np.zeros((8, 8, 3), np.uint8), "pose": np.zeros(7, np.float32)}
    with pytest.raises(ValueError, match=re.escape("pose (float32 [7]) of example 0 cannot be cropped")):
        Cropped([raw], Crops(scale=(0.5, 0.5)), 0)[0]
    whole = Cropped([raw], Crops(scale=(1, 1), flip=False, size=4), 0)[0]
    assert whole["rgb"].shape == (4, 4, 3) and whole["pose"] is raw["pose"]
    for value in (np.zeros((4, 16), np.uint8), np.zeros(16, np.int64)):  # tokens of several crops, or of one
        with pytest.raises(ValueError, match="depth .* cannot be cropped"):
            Cropped([{"rgb": raw["rgb"], "depth": value}], Crops(scale=(0.5, 0.5)), 0)[0]
    with pytest.raises(ValueError, match=r"\(a/b.npy\) has no picture to crop, but: clip, file"):
        Cropped([{"clip": np.zeros(512, np.float32), "file": "a/b.npy"}], Crops(), 0)[0]
    words = {"caption": "text alone has nothing to crop", "file": "a/b.txt"}
    assert Cropped([words], Crops(num=2), 0)[1] == words
    with pytest.raises(ValueError, match="example 0 is a crop already"):
        once = Cropped([{"rgb": raw["rgb"]}], Crops(), 0)
        Cropped(once, Crops(), 0)[0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num": 0}, "num is 0, but must be at least 1"),
        ({"scale": (0.8, 0.5)}, r"scale is \(0.8, 0.5\), but must be \(smallest, largest\)"),
        ({"scale": (0.5, 1.5)}, "0 < smallest <= largest <= 1"),
        ({"scale": (0.5,)}, "must be"),
        ({"size": 0}, "size is 0, but must be at least 1, or None"),
        ({"min_visible": 0}, "min_visible is 0, but must be above 0 and at most 1"),
    ],
)
def test_errors_tell_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        Crops(**fields)


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        Cropped([], Crops(), -1)
