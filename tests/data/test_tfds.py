"""Data sets of tfds give raw examples: a real one that is prepared here, and mocks of five that are known by name."""

import dataclasses
import io
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from m4.data.sources.tfds import Tfds, builder
from m4.registry import from_json, to_json

EXAMPLES = {
    "coco_captions": Tfds(
        name="coco_captions",
        signals={"rgb": "image", "caption": "captions/text", "boxes": "objects", "file": "image/filename"},
        splits={"validation": "val"},
        num_passes=5,
    ),
    "coco/2017": Tfds(name="coco/2017", signals={"rgb": "image", "boxes": "objects"}),
    "nyu_depth_v2": Tfds(
        name="nyu_depth_v2", signals={"rgb": "image", "depth": "depth"}, splits={"test": "validation"}
    ),
    "ref_coco": Tfds(
        name="ref_coco/refcoco_unc",
        signals={"rgb": "image", "caption": "objects/refexp/raw", "boxes": ("objects/bbox", "objects/refexp/raw")},
        splits={"test": "testA"},
    ),
    "open_images_v4": Tfds(
        name="open_images_v4", signals={"rgb": "image", "boxes": "bobjects", "caption": "objects/label"}
    ),
}
SHAPES = [(20, 24), (21, 25), (22, 24), (23, 24)]  # of the pictures of the data set that is made here


def encoded(picture: Image.Image, form: str = "png", **options) -> io.BytesIO:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    buffer.seek(0)
    return buffer


def stored(i: int) -> dict:
    """Example i: a grey JPEG that says it is turned, an RGBA PNG, a palette PNG, an RGB PNG; i captions, i objects."""
    rng = np.random.default_rng(i)
    height, width = SHAPES[i]
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    colour = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    opaque = Image.fromarray(np.dstack([pixels, np.full((height, width), 255, np.uint8)]))
    image = (
        encoded(colour.convert("L"), "jpeg", exif=turned),
        encoded(opaque),
        encoded(colour.quantize(4)),
        encoded(colour),
    )[i]
    depth = rng.integers(0, 10_000, (height, width)).astype(np.uint16)
    distance = rng.uniform(0.5, 9, (20, 24)).astype(np.float16)
    distance[0, :3] = np.nan, np.inf, -1
    return {
        "image": image,
        "image/name": f"picture {i}",
        "depth": encoded(Image.fromarray(depth)),
        "depth_any": depth,
        "distance": distance,
        "classes": encoded(Image.fromarray((depth % 2).astype(np.uint8))),
        "kind": i % 2,
        "captions": [{"text": f" caption {k} of {i}. ", "id": k} for k in range(i)],
        "objects": [
            {
                "bbox": tfds.features.BBox(0.1 * k, 0.2, 0.1 * k + 0.3, 1.0),
                "category": k,
                "mask": encoded(Image.fromarray((depth > 5).astype(np.uint8))),
                "refexp": [{"raw": f"saying {m} of {k}", "id": m} for m in range(k + 1)],
            }
            for k in range(i)
        ],
        "points": rng.random((2, 3)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tfds folder with the data set `little`; tfds forgets its code, as it does not have that of users' data."""
    features = tfds.features
    with tfds.core.registered.skip_registration():

        class Little(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            url_infos = {}

            def _info(self):
                grey = (None, None, 1)
                objects = {
                    "bbox": features.BBoxFeature(),
                    "category": features.ClassLabel(names=["cat", "dog", "cow"]),
                    "mask": features.Image(shape=grey, encoding_format="png"),
                    "refexp": features.Sequence({"raw": features.Text(), "id": np.int64}),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=features.FeaturesDict(
                        {
                            "image": features.Image(),
                            "image/name": features.Text(),
                            "depth": features.Image(shape=grey, dtype=np.uint16, encoding_format="png"),
                            "depth_any": features.Tensor(shape=(None, None), dtype=np.uint16, encoding="zlib"),
                            "distance": features.Tensor(shape=(20, 24), dtype=np.float16),
                            "classes": features.LabeledImage(labels=["a", "b"], shape=grey),
                            "kind": features.ClassLabel(names=["even", "odd"]),
                            "captions": features.Sequence({"text": np.str_, "id": np.int64}),
                            "objects": features.Sequence(objects),
                            "points": features.Tensor(shape=(2, 3), dtype=np.float32),
                        }
                    ),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(), "val": self._generate_examples()}

            def _generate_examples(self):
                yield from ((i, stored(i)) for i in range(len(SHAPES)))

    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        # Writing sequences in sequences would take the type from TensorFlow; reading them does not.
        tensor_info = tfds.features.TensorInfo
        patch.setattr(tensor_info, "dtype", property(lambda info: info.np_dtype))
        download = tfds.download.DownloadConfig(compute_stats="skip")
        Little(data_dir=folder, file_format="array_record").download_and_prepare(download_config=download)
    return folder


def little(folder, **fields) -> Tfds:
    return Tfds(**{"name": "little", "tfds_dir": str(folder), "splits": {"validation": "val"}, **fields})


def test_a_prepared_data_set_is_read_as_it_was_written(folder):
    signals = {
        "rgb": "image",
        "depth": "depth",
        "depth_any": "depth_any",
        "semseg": "classes",
        "caption": "captions/text",
        "boxes": "objects",
        "kind": "kind",
        "points": "points",
    }
    source = little(folder, signals=signals, depth_unit=0.001)
    source.prepare("unused")
    split = source.split("validation", "unused")
    examples = list(pickle.loads(pickle.dumps(split)))  # ends with an IndexError, as a sequence does
    assert len(split) == len(examples) == 4
    for i, example in enumerate(examples):
        written, shape = stored(i), SHAPES[i]
        assert example["file"] == f"little val {i}"
        assert example["rgb"].dtype == np.uint8 and example["rgb"].shape == (*shape, 3)  # not turned: i = 0
        np.testing.assert_array_equal(example["rgb"], np.array(Image.open(written["image"]).convert("RGB")))
        assert example["depth"].dtype == np.float32
        np.testing.assert_allclose(example["depth"], written["depth_any"] / 1000, rtol=1e-6)
        np.testing.assert_array_equal(example["depth_any"], written["depth_any"])
        assert example["semseg"].dtype == np.int32
        np.testing.assert_array_equal(example["semseg"], written["depth_any"] % 2)
        np.testing.assert_array_equal(example["points"], written["points"])
        assert example["kind"] == ("even", "odd")[i % 2]
        assert ("caption" in example) == (i > 0)
        assert i == 0 or example["caption"] in {c["text"].strip() for c in written["captions"]}
        assert example["boxes"]["bbox"].dtype == np.float32 and example["boxes"]["bbox"].shape == (i, 4)
        np.testing.assert_allclose(example["boxes"]["bbox"][:, 0], 0.1 * np.arange(i), atol=1e-6)
        assert example["boxes"]["label"] == ["cat", "dog", "cow"][:i]
    assert split[-1]["file"] == split[np.int64(3)]["file"] == "little val 3"
    with pytest.raises(IndexError, match="example 4 of 4"):
        split[4]
    assert len(source.split("train[50%:]", "unused")) == 2
    assert "tensorflow" not in sys.modules


def test_depth_is_metres_and_zero_where_it_is_no_distance(folder):
    for i, example in enumerate(little(folder, signals={"depth": "distance"}).split("train", "unused")):
        distance = stored(i)["distance"].astype(np.float32)
        distance[0, :3] = 0
        np.testing.assert_array_equal(example["depth"], distance)


def test_passes_show_all_texts_and_do_not_depend_on_order(folder):
    signals = {"file": "image/name", "caption": "captions/text", "boxes": ("objects/bbox", "objects/refexp/raw")}
    source = little(folder, signals=signals, num_passes=3)
    split = source.split("train", "unused")
    assert len(split) == 12
    examples = [split[i] for i in reversed(range(12))][::-1]
    assert [e["file"] for e in examples] == [f"picture {i}" for i in range(4)] * 3
    for i in range(1, 4):
        captions = [examples[i + 4 * k]["caption"] for k in range(3)]
        assert set(captions) == {f"caption {k} of {i}." for k in range(i)}
    for k in range(3):  # box k of the last picture has k + 1 sayings
        assert {examples[3 + 4 * n]["boxes"]["label"][k] for n in range(3)} == {
            f"saying {m} of {k}" for m in range(k + 1)
        }
    once = list(little(folder, signals=signals).split("train", "unused"))
    assert [e["boxes"]["label"] for e in once] == [e["boxes"]["label"] for e in examples[:4]]
    sayings = little(folder, signals={"caption": "objects/refexp/raw"}, num_passes=6).split("train", "unused")
    assert {sayings[3 + 4 * k]["caption"] for k in range(6)} == {
        f"saying {m} of {k}" for k in range(3) for m in range(k + 1)
    }


def made_up(feature, count: int):
    """Something that a feature can store, with `count` items in each sequence."""
    match feature:
        case tfds.features.FeaturesDict():
            return {key: made_up(inner, count) for key, inner in feature.items()}
        case tfds.features.Sequence():
            return [made_up(feature.feature, count)] * count
        case tfds.features.Image():
            height, width, _ = feature.shape
            return encoded(Image.new("RGB", (width or 24, height or 20), "red"))
        case tfds.features.BBoxFeature():
            return tfds.features.BBox(0.1, 0.2, 0.3, 0.4)
        case tfds.features.Tensor() if feature.shape:
            return np.full(feature.shape, 1.5, feature.np_dtype)
    return "words" if np.dtype(feature.np_dtype).kind in "OSU" else 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_prepared_data_sets_known_by_name(name, tmp_path, monkeypatch):
    """Records that tfds itself wrote by each data set's own features, one example with and one without annotations."""
    names = {"/m/011q46kg": "Container"}
    source = dataclasses.replace(EXAMPLES[name], splits={}, tfds_dir=str(tmp_path), names=names)
    built = builder(source.name, source.tfds_dir)
    built.info.set_file_format("array_record", override=True)
    if name.startswith("coco"):  # its builder reads them from what it downloads
        built.info.features["objects"]["label"].names = [f"class {i}" for i in range(80)]
    examples = [(i, made_up(built.info.features, count=3 * (1 - i))) for i in range(2)]
    monkeypatch.setattr(type(built), "_split_generators", lambda self, dl_manager: {"train": examples})
    monkeypatch.setattr(tfds.features.TensorInfo, "dtype", property(lambda info: info.np_dtype))
    config = tfds.download.DownloadConfig(compute_stats="skip", try_download_gcs=False)
    built.download_and_prepare(download_config=config, file_format="array_record")
    source.prepare("unused")
    split = source.split("train", "unused")
    found = sorted(split, key=lambda e: -len(e["boxes"]["label"]) if "boxes" in e else 0)[:: source.num_passes]
    label = {"coco_captions": "class 1", "coco/2017": "class 1", "ref_coco": "words", "open_images_v4": "Container"}
    for example, count in zip(found, (3, 0), strict=True):
        assert example["rgb"].shape == ((480, 640, 3) if name == "nyu_depth_v2" else (20, 24, 3))
        assert (example["rgb"].reshape(-1, 3).mean(0) // 10 == (25, 0, 0)).all()  # red
        if name == "nyu_depth_v2":
            assert example["depth"].shape == (480, 640) and (example["depth"] == 1.5).all()
        else:
            np.testing.assert_array_equal(
                example["boxes"]["bbox"], np.float32([[0.1, 0.2, 0.3, 0.4]] * count).reshape(-1, 4)
            )
            assert example["boxes"]["label"] == [label[name]] * count
        if "caption" in source.signals:
            assert ("caption" in example) == (count > 0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_data_sets_known_by_name(name):
    """tfds's mock data give each feature of a sequence a length of its own, and boxes whose sides may be exchanged."""
    source = EXAMPLES[name]
    with tfds.testing.mock_data(num_examples=4):
        source.prepare("unused")
        split = source.split("test", "unused")
        assert len(split) == 4 * source.num_passes
        for example in (split[i] for i in range(4)):
            assert example.keys() == {"file", *source.signals}
            rgb = example["rgb"]
            assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3
            if "depth" in example:
                depth = example["depth"]
                assert depth.dtype == np.float32 and depth.shape == rgb.shape[:2] == (480, 640)
                assert 0 <= depth.min() <= depth.max() <= 1
            if "caption" in example:
                assert isinstance(example["caption"], str) and example["caption"]
            if "boxes" in example:
                bbox, label = example["boxes"]["bbox"], example["boxes"]["label"]
                assert bbox.dtype == np.float32 and bbox.shape == (len(label), 4) and len(label) > 0
                assert 0 <= bbox.min() <= bbox.max() <= 1
                assert all(isinstance(word, str) and word for word in label)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", EXAMPLES)
def test_configs_are_json(name):
    source = EXAMPLES[name]
    assert from_json(json.loads(json.dumps(to_json(source)))) == source


def test_what_is_not_prepared_is_told_with_the_command_that_prepares_it(folder, tmp_path):
    for name, source in EXAMPLES.items():
        absent = Tfds(name=source.name, signals=source.signals, tfds_dir=str(tmp_path))
        command = f"tfds build {source.name} --file_format=array_record --data_dir={tmp_path}"
        for call in (lambda s=absent: s.prepare("unused"), lambda s=absent: s.split("train", "unused")):
            with pytest.raises(ValueError, match=command):
                call()
        assert name.split("/")[0] in source.name
    shutil.copytree(folder / "little", tmp_path / "little")
    info = tmp_path / "little" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(
        ValueError, match="prepared, but as tfrecord.*tfds convert_format --dataset_version_dir=.*1.0.0"
    ):
        little(tmp_path, signals={"rgb": "image"}, splits={}).prepare("unused")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "coco_caption"}, "'coco_caption' is neither prepared in .* similar: coco_captions"),
        ({"name": "coco/2018"}, "unknown config of coco '2018'; allowed: 2014, 2017, .*Did you mean"),
        ({"signals": {"rgb": "imaeg"}}, "unknown feature of little for rgb 'imaeg'; .*Did you mean 'image'"),
        ({"signals": {"caption": "captions"}}, "captions of little is a group of .*text.*, but must be one of: text"),
        ({"signals": {"rgb": "captions/text"}}, "rgb: captions/text of little is text, but must be one of: picture"),
        ({"signals": {"instance": "objects/mask"}}, "objects/mask of little is pictures in a sequence"),
        ({"signals": {"boxes": "captions"}}, "captions of little has 0 features of boxes and 0 of classes"),
        ({"signals": {"boxes": ("objects/bbox", "captions/text")}}, "captions/text of little does not have one label"),
        ({"signals": {"rgb": ("image", "depth")}}, "rgb: 2 paths are given"),
        ({"splits": {"validation": "valid"}}, "no split .*Should be one of .*'val'"),
        ({"signals": {}}, "signals is empty"),
        ({"num_passes": 0}, "num_passes is 0, but must be at least 1"),
        ({"depth_unit": 0.0}, "depth_unit is 0.0, but must be above 0"),
    ],
)
def test_errors_tell_what_is_allowed(folder, fields, message):
    with pytest.raises(ValueError, match=message):
        little(folder, **{"signals": {"rgb": "image"}, **fields}).prepare("unused")


def test_what_cannot_be_read_is_named(folder):
    with pytest.raises(ValueError, match=r"little has no split 'trian'.*Should be one of"):
        little(folder, signals={"rgb": "image"}).split("trian", "unused")
    wrong = little(folder, signals={"depth": "image"}).split("train", "unused")
    with pytest.raises(ValueError, match=r"little train 1 cannot be read .*depth is uint8 \[21, 25, 4\], but must be"):
        wrong[1]
    wrong = little(folder, signals={"semseg": "points"}).split("train", "unused")
    with pytest.raises(ValueError, match=r"semseg is float32 \[2, 3\], but must be integers \[H W\]"):
        wrong[1]
