"""One reader for training, generation, shots and the demo; one geometry a sample; what m4 writes, it reads.

Axes: H rows, W columns.
"""

import dataclasses
import io
import json
import os
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from PIL import Image

from m4.data.dataset import Dataset
from m4.data.pretokenize import prepare
from m4.data.samples import file_of, load_mask, read_mask, read_sample
from m4.data.sources.files import read_for
from m4.data.sources.folders import Folders
from m4.data.sources.generated import Generated
from m4.in_context.shots import encode as encode_shot
from m4.in_context.shots import read_shots
from m4.inference.sampler import Sampler
from m4.masking.episodes import Shot
from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.tokens.modality import Features, Grid, Modalities
from m4.tokens.records import encode
from m4_tokenizers.modalities.answers import AnswerRecipe
from m4_tokenizers.modalities.audio import AudioRecipe
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.classes import ClassRecipe
from m4_tokenizers.modalities.depth import DepthRecipe, RelativeDepthRecipe
from m4_tokenizers.modalities.edges import EdgesRecipe
from m4_tokenizers.modalities.features import FeatureMapRecipe, PoseRecipe, VectorRecipe
from m4_tokenizers.modalities.image import ImageRecipe, PixelPatchesRecipe
from m4_tokenizers.modalities.instances import MaskRecipe
from m4_tokenizers.modalities.maps import MapRecipe
from m4_tokenizers.modalities.metadata import MetadataRecipe
from m4_tokenizers.modalities.normals import NormalsRecipe
from m4_tokenizers.modalities.palette import PaletteRecipe
from m4_tokenizers.modalities.semseg import SemanticRecipe
from m4_tokenizers.modalities.stored import Ids, IdsRecipe, tokenizers_of
from m4_tokenizers.modalities.text import TextRecipe
from m4_tokenizers.networks.patch_mixing import PatchDecoder, PatchEncoder
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer

SIZE = 16
PARTS = {
    "encoder": PatchEncoder(width=9, num_blocks=0), "decoder": PatchDecoder(width=9, num_blocks=0),
    "quantizer": LearnedVectorQuantizer(num_codes=8), "num_steps": 0, "num_held_out": 2,
}  # fmt: skip
SMALL = {**PARTS, "image_size": SIZE}
VECTORS = {
    **PARTS, "num_features": 4, "quantizer": LearnedVectorQuantizer(num_codes=8, latent_size=4),
    "encoder": PatchEncoder(patch_size=1, width=9, num_blocks=0),
    "decoder": PatchDecoder(patch_size=1, width=9, num_blocks=0),
}  # fmt: skip
RECIPES = {
    "rgb": ImageRecipe(**SMALL),
    "photo": PixelPatchesRecipe(signal="photo", name="photo_pixels", image_size=SIZE),  # an image of another name
    "depth": DepthRecipe(**SMALL),
    "range": RelativeDepthRecipe(signal="range", name="range_tokens", **SMALL),
    "normals": NormalsRecipe(**SMALL),
    "semseg": SemanticRecipe(num_classes=6, **SMALL),
    "landcover": SemanticRecipe(signal="landcover", name="landcover_tokens", num_classes=6, **SMALL),
    "edges": EdgesRecipe(**SMALL),
    "mask": MaskRecipe(**SMALL),
    "thermal": MapRecipe(signal="thermal", name="thermal_tokens", lowest=0, highest=80, **SMALL),
    "bands": MapRecipe(signal="bands", name="bands_tokens", lowest=0, highest=1, channels=3, **SMALL),
    "clip": FeatureMapRecipe(image_size=4, **VECTORS),
    "clip_global": VectorRecipe(**VECTORS),
    "human_poses": PoseRecipe(**{**VECTORS, "num_features": 18}),
    "audio": AudioRecipe(**SMALL, seconds=0.032, num_phase_steps=2),
    "caption": TextRecipe(),
    "category": ClassRecipe(classes=("cat", "dog", "a sea lion")),
    "boxes": BoxRecipe(),
    "palette": PaletteRecipe(image_size=SIZE),
    "metadata": MetadataRecipe(),
    "answer": AnswerRecipe(mask_size=4),
    "tok_clip": IdsRecipe(modality=Grid(name="tok_clip", signal="tok", vocab_size=50, shape=(2, 2))),
    "tok_t5": IdsRecipe(modality=Features(name="tok_t5", signal="t5", shape=(3,), size=2)),
}


def example(index: int) -> dict:
    """A signal of every kind, as its tokenizer takes it."""
    rng = np.random.default_rng(index)
    floats = lambda *shape: rng.uniform(0, 1, shape).astype(np.float32)  # noqa: E731
    normals = rng.normal(size=(SIZE, SIZE, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[0] = 0
    depth = 1 + 9 * floats(SIZE, SIZE)
    depth[:2] = 0
    return {
        "rgb": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
        "photo": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
        "depth": depth,
        "range": floats(SIZE, SIZE) * 4 - 2,
        "normals": normals,
        "semseg": rng.integers(0, 6, (SIZE, SIZE), np.int32),
        "landcover": rng.integers(0, 6, (SIZE, SIZE), np.int32),
        "edges": (floats(SIZE, SIZE) > 0.8).astype(np.float32),
        "mask": floats(SIZE, SIZE) > 0.5,
        "thermal": 80 * floats(SIZE, SIZE),
        "bands": floats(SIZE, SIZE, 3),
        "clip": floats(4, 4, 4),
        "clip_global": floats(4),
        "human_poses": np.linalg.qr(rng.normal(size=(2, 3, 3)))[0].astype(np.float32),
        "audio": floats(512) * 2 - 1,
        "caption": f"a red cube, number {index}",
        "category": ("cat", "dog", "a sea lion")[index % 3],
        "boxes": {"bbox": np.array([[0.1, 0.2, 0.5, 0.25]], np.float32), "label": ["cube"]},
        "palette": rng.integers(0, 256, (3, 3), np.uint8),
        "metadata": {"n_humans": 2, "colorfulness": 40.5},
        "answer": [
            {"concept": "cube", "kind": "box", "target": np.array([0.25, 0.5, 0.75, 1], np.float32)},
            {"concept": "cube", "kind": "point", "target": np.array([0.25, 0.5], np.float32)},
            {"concept": "cube", "kind": "mask", "target": floats(4, 4) > 0.5},
            {"concept": "cube", "kind": "depth", "target": 2.5},
        ],
        "tok_clip": rng.integers(0, 50, 4),
        "tok_t5": floats(3, 2),
    }


@pytest.fixture(scope="module")
def tokenizers():
    """By the name of the signal's folder."""
    examples = [example(i) for i in range(24)]
    return {name: recipe.fit(examples, seed=0) for name, recipe in RECIPES.items()}


@pytest.fixture(scope="module")
def sampler(tokenizers):
    own = {t.modality.name: t for t in tokenizers.values()}
    config = ModelConfig(width=16, num_heads=2, encoder_depth=1, decoder_depth=1, hidden=16)
    model = Model(config, Modalities([t.modality for t in own.values()]), rngs=nnx.Rngs(0))
    return Sampler(model, own, devices=jax.devices()[:1])


# ---- Files of all kinds of trouble ----------------------------------------------------------------------------------


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


def saved(picture, kind: str = "png", **options) -> bytes:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def with_alpha(picture: Image.Image, alpha: np.ndarray) -> Image.Image:
    picture = picture.copy()
    picture.putalpha(Image.fromarray(alpha))
    return picture


BOMB = saved(Image.new("1", (10_001, 10_000)))
GREY = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
RGB = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
HALF = np.repeat(np.arange(SIZE)[None] < SIZE // 2, SIZE, axis=0)  # the left is True
PICTURE = Image.fromarray(RGB)
PALETTE = Image.fromarray(GREY % 5, "L")
PALETTE.putpalette(bytes(range(15)) + bytes(753))
DEEP = Image.fromarray(GREY.astype(np.uint16) * 257)
FLOATS = Image.fromarray(GREY.astype(np.float32) / 255)
LONGER = {"bbox": [0, 0, 1, 1], "label": "fine"}


def boxes(*items) -> bytes:
    return json.dumps([LONGER, *items]).encode()


FILES = {  # signal: {file: content}
    "rgb": {
        "rgb.png": saved(RGB), "grey.png": saved(GREY), "palette.png": saved(PALETTE),
        "clear.png": saved(PALETTE, transparency=b"\0\xff\x80"), "bit.png": saved(PICTURE.convert("1")),
        "rgba.png": saved(with_alpha(PICTURE, GREY)), "la.png": saved(with_alpha(PICTURE.convert("L"), GREY)),
        "deep.png": saved(DEEP), "a.jpg": saved(RGB, "jpeg"), "turned.jpeg": saved(RGB, "jpeg", exif=turned()),
        "cmyk.jpg": saved(PICTURE.convert("CMYK"), "jpeg"), "a.webp": saved(RGB, "webp"), "a.gif": saved(RGB, "gif"),
        "a.bmp": saved(RGB, "bmp"), "a.ppm": saved(RGB, "ppm"), "a.pgm": saved(GREY, "ppm"),
        "a.tiff": saved(RGB, "tiff"), "float.tif": saved(FLOATS, "tiff"), "a.pfm": saved(FLOATS, "ppm"),
        "float255.tif": saved(FLOATS.point(lambda v: v * 255), "tiff"), "int32.tif": saved(DEEP.convert("I"), "tiff"),
        "minus.tif": saved(Image.fromarray(GREY.astype(np.int32) - 9), "tiff"), "misnamed.png": saved(RGB, "jpeg"),
        "cmyk.tif": saved(PICTURE.convert("CMYK"), "tiff"), "lab.tif": saved(PICTURE.convert("LAB"), "tiff"),
        "cut.png": saved(RGB)[:300], "empty.png": b"", "text.png": b"hello", "a.psd": b"8BPS", "psd.png": b"8BPS\0\1",
        "bomb.png": BOMB, "a.npy": npy(RGB), "float.npy": npy(RGB / 255), "tokens.npy": npy(np.arange(5)),
        "pickle.npy": npy(np.array([None])), "none": b"x",
    },
    "photo": {
        "rgb.png": saved(RGB), "palette.png": saved(PALETTE), "rgba.png": saved(with_alpha(PICTURE, GREY)),
        "a.jpg": saved(RGB, "jpeg"), "turned.jpg": saved(RGB, "jpeg", exif=turned()), "deep.png": saved(DEEP),
        "a.json": b"[]",
    },
    "depth": {
        "a.png": saved(GREY.astype(np.uint16) * 40), "a.tif": saved(GREY.astype(np.uint16) * 40, "tiff"),
        "saturated.png": saved(np.where(HALF, 65535, 2000).astype(np.uint16)), "grey.png": saved(GREY),
        "rgb.png": saved(RGB), "f8.npy": npy(GREY / 20.0), "f2.npy": npy((GREY / 20).astype(">f2")),
        "nan.npy": npy(np.where(HALF, np.nan, 2)), "minus.npy": npy(np.where(HALF, -1.0, 2)),
        "complex.npy": npy(GREY / 20 + 1j), "bool.npy": npy(HALF), "int.npy": npy(GREY),
        "text.npy": npy(HALF.astype(str)),
        "dates.npy": npy(GREY.astype("M8[s]")), "huge.npy": npy(np.where(HALF, 1e300, 2)),
        "wide.jpg": saved(GREY, "jpeg"),
    },
    "normals": {
        "black.png": saved(np.zeros((SIZE, SIZE, 3), np.uint8)), "rgb.png": saved(RGB), "grey.png": saved(GREY),
        "short.npy": npy(np.full((SIZE, SIZE, 3), 0.17)), "08.npy": npy(np.full((SIZE, SIZE, 3), 0.46)),
        "long.npy": npy(np.full((SIZE, SIZE, 3), 2.0)), "nan.npy": npy(np.full((SIZE, SIZE, 3), np.nan)),
        "a.jpg": saved(RGB, "jpeg"), "complex.npy": npy(np.full((SIZE, SIZE, 3), 0.5j)),
    },
    "semseg": {
        "a.png": saved(GREY % 6), "palette.png": saved(PALETTE), "bit.png": saved(PICTURE.convert("1")),
        "deep.png": saved((GREY % 6).astype(np.uint16)), "a.jpg": saved(GREY % 6, "jpeg"), "rgb.png": saved(RGB),
        "jpeg.png": saved(GREY % 6, "jpeg"), "outside.png": saved(GREY), "f.npy": npy(GREY % 6 + 0.7),
        "i8.npy": npy((GREY % 6).astype(np.int64)), "over.npy": npy((GREY % 6).astype(np.int64) + 2**32),
        "minus.npy": npy((GREY % 6).astype(np.int8) - 1), "bool.npy": npy(HALF), "complex.npy": npy(GREY + 1j),
    },
    "landcover": {"palette.png": saved(PALETTE), "deep.png": saved((GREY % 6).astype(np.uint16)),
    "rgb.png": saved(RGB)},
    "mask": {
        "01.png": saved(HALF.astype(np.uint8)), "255.png": saved(HALF.astype(np.uint8) * 255), "bit.png": saved(HALF),
        "grey.png": saved(GREY), "la.png": saved(with_alpha(Image.new("L", (SIZE, SIZE), 255), HALF.astype(np.uint8))),
        "deep.png": saved(np.where(HALF, 65535, 300).astype(np.uint16)), "a.npy": npy(HALF), "u1.npy": npy(HALF * 7),
        "three.npy": npy(GREY % 3), "a.jpg": saved(HALF.astype(np.uint8) * 255, "jpeg"), "complex.npy": npy(HALF * 1j),
    },
    "edges": {"a.png": saved(HALF), "f.npy": npy(GREY / 255), "over.npy": npy(GREY / 20),
    "float.tif": saved(FLOATS, "tiff")},
    "thermal": {
        "a.npy": npy(GREY / 4), "int.npy": npy(GREY // 4), "a.png": saved(GREY // 4), "complex.npy": npy(GREY / 4 + 1j),
        "bool.npy": npy(HALF), "text.npy": npy(HALF.astype(str)), "nan.npy": npy(np.where(HALF, np.nan, 2)),
        "huge.npy": npy(np.where(HALF, 1e300, 2)), "kelvin.npy": npy(GREY / 4 + 273),
        "dates.npy": npy(GREY.astype("M8[s]")),
    },
    "clip_global": {"a.npy": npy(np.ones(4)), "int.npy": npy(np.arange(4)), "complex.npy": npy(np.ones(4) * 1j),
                    "bool.npy": npy(np.ones(4, bool)), "five.npy": npy(np.ones(5)), "nan.npy": npy(np.full(4, np.nan))},
    "caption": {
        "bom.txt": "\ufeff a red cube\n".encode(), "utf16.txt": "a red cube".encode("utf-16"),
        "le.txt": "a red cube".encode("utf-16-le"), "latin.txt": "a b\xfc".encode("latin-1"), "empty.txt": b" \n",
        "a.json": b'"a red cube"', "list.json": b'["a red cube", "b"]', "null.json": b"null", "number.json": b"[1]",
        "half.json": b'"a \\ud83d cube"', "deep.json": b"[" * 5000, "twice.json": b'{"a": 1, "a": 2}',
    },
    "category": {"a.txt": b"cat\n", "a.json": b'"a sea lion"', "other.txt": b"cow", "empty.txt": b"\n"},
    "boxes": {
        "a.json": boxes(), "bom.json": b"\xef\xbb\xbf" + boxes(), "inverted.json": boxes({"bbox": [0.5, 0, 0.2, 1],
        "label": "a"}),
        "null.json": boxes({"bbox": [0, 0, 1, 1], "label": None}), "list.json": boxes({"bbox": [0, 0, 1, 1],
        "label": ["a"]}),
        "outside.json": boxes({"bbox": [0, 0, 1, 1.5], "label": "a"}), "five.json": boxes({"bbox": [0] * 5,
        "label": "a"}),
        "bool.json": boxes({"bbox": [False, 0, 1, 1], "label": "a"}), "text.json": boxes({"bbox": ["0", 0, 1, 1],
        "label": "a"}),
        "nan.json": boxes({"bbox": [0, 0, 1, float("nan")], "label": "a"}), "deep.json": b"[" * 5000,
        "twice.json": b'[{"bbox": [0, 0, 1, 1], "bbox": [0, 0, 0, 0], "label": "a"}]', "dict.json": b"{}",
        "half.json": b'[{"bbox": [0, 0, 1, 1], "label": "\\ud83d"}]', "empty.json": boxes({"bbox": [0, 0, 1, 1],
        "label": ""}),
    },
    "palette": {"a.json": b"[[255, 0, 0], [1, 2, 3]]", "float.json": b"[[0.5, 0, 0]]", "over.json": b"[[256, 0, 0]]",
                "bool.json": b"[[true, 0, 0]]", "deep.json": b"[" * 5000, "none.json": b"[]", "rgb.png": saved(RGB)},
    "metadata": {"a.json": b'{"n_humans": 2}', "twice.json": b'{"n_humans": 2, "n_humans": 3}',
    "nan.json": b'{"n_humans": NaN}',
                 "list.json": b"[2]", "other.json": b'{"n_human": 2}', "deep.json": b'{"a":' * 5000},
    "answer": {"a.json": b'[{"concept": "cube", "kind": "point", "target": [0.5, 0.25]}]', "dict.json": b"{}",
               "kind.json": b'[{"concept": "cube", "kind": "pint", "target": [0.5, 0.25]}]', "deep.json": b"[" * 5000,
               "outside.json": b'[{"concept": "cube", "kind": "point", "target": [0.5, 1.25]}]'},
    "tok_clip": {"a.npy": npy(np.arange(4)), "over.npy": npy(np.arange(4) + 2**32),
    "outside.npy": npy(np.arange(4) + 50),
                 "minus.npy": npy(np.arange(4) - 1), "float.npy": npy(np.arange(4.0)),
                 "bool.npy": npy(np.ones(4, bool)),
                 "five.npy": npy(np.arange(5)), "u8.npy": npy(np.array([2**64 - 1] * 4, np.uint64))},
}  # fmt: skip


def outcome(read, file: str):
    """ids, or what is wrong, without the file's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read()
        except ValueError as error:
            return str(error).replace(file, "").strip(": ")


@pytest.mark.parametrize("signal", FILES)
def test_one_reader(signal, tokenizers, sampler, tmp_path, monkeypatch):
    """Training, generation, in-context examples and the demo give the same ids of a file, or refuse it alike."""
    demo = pytest.importorskip("m4.demo.page")
    tokenizer = tokenizers[signal]
    modality, (name,) = tokenizer.modality, [tokenizer.modality.name]
    folder = name if signal.startswith("tok_") else modality.signal
    refused = 0
    for number, (file, data) in enumerate(FILES[signal].items()):
        path = tmp_path / str(number) / folder / file
        path.parent.mkdir(parents=True)
        path.write_bytes(data)

        def training(path=path):
            source = Folders(root=path.parent.parent, validation_share=0, test_share=0)
            (record,) = encode([read_for(source.split("train", "unused"), [tokenizer])[0]], {name: tokenizer})
            return record[name]

        def generation(path=path):
            (stored,) = tokenizer.encode([read_sample({folder: path}, {folder: tokenizer})[folder]])
            return stored

        def shots(path=path):
            return encode_shot(Shot(inputs={name: path}), sampler.tokenizers, sampler.modalities)[0][name]

        def in_the_demo(path=path):
            inputs, _ = demo._read(sampler, {name: str(path)}, [], tmp_path)
            return tokenizer.encode([inputs[name]])[0]

        readers = {"training": training, "generation": generation, "shots": shots}
        if not isinstance(modality, demo.Sequence):  # others are written out on the page, never read from a file
            readers["demo"] = in_the_demo
        found = {reader: outcome(read, str(path)) for reader, read in readers.items()}
        first = found["generation"]
        for reader, other in found.items():
            assert isinstance(other, str) == isinstance(first, str), (file, found)
            if isinstance(first, str):
                assert other.endswith(first) or first.endswith(other), (file, found)
            else:
                np.testing.assert_array_equal(other, first, err_msg=f"{file}: {reader}")
        refused += isinstance(first, str)
    assert refused == NUM_REFUSED[signal], refused


NUM_REFUSED = {
    "rgb": 12, "photo": 1, "depth": 11, "normals": 5, "semseg": 9, "landcover": 1, "mask": 2, "edges": 1, "thermal": 7,
    "clip_global": 4, "caption": 9, "category": 2, "boxes": 13, "palette": 5, "metadata": 5, "answer": 4, "tok_clip": 7,
}  # fmt: skip


# ---- One geometry ---------------------------------------------------------------------------------------------------


def wide(tmp_path) -> dict[str, Path]:
    """The same picture, 2 : 1, at several scales: its left quarter is marked in every signal."""
    marked = lambda h, w, is_on, is_off: np.where(np.arange(w)[None] < w // 4, is_on, is_off).repeat(h, 0)  # noqa: E731
    normals = np.where(marked(32, 64, True, False)[..., None], (0.0, 0.0, 1.0), (0.0, 1.0, 0.0))
    box = {"bbox": [0.25, 0, 0.75, 0.25], "label": "left"}, {"bbox": [0, 0.2, 1, 0.8], "label": "middle"}
    points = [{"concept": "p", "kind": "point", "target": [0.5, x]} for x in (0.1, 0.5)]
    cells = marked(4, 4, 1, 0)
    answer = [*points, {"concept": "m", "kind": "mask", "target": (1 - cells).tolist()}]
    contents = {
        "rgb.png": saved(marked(32, 64, 250, 10).astype(np.uint8)),
        "depth.png": saved(marked(64, 128, 3000, 9000).astype(np.uint16)),
        "normals.npy": npy(normals),
        "semseg.png": saved(marked(16, 32, 3, 1).astype(np.uint8)),
        "mask.png": saved(marked(32, 64, 255, 0).astype(np.uint8)),
        "edges.png": saved(marked(64, 128, 255, 0).astype(np.uint8)),
        "thermal.npy": npy(marked(32, 64, 70.0, 20.0)),
        "boxes.json": json.dumps(box).encode(),
        "answer.json": json.dumps(answer).encode(),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return {name.partition(".")[0]: tmp_path / name for name in contents}


def test_all_signals_of_a_sample_are_cropped_alike(tokenizers, tmp_path):
    files = wide(tmp_path)
    with pytest.warns(UserWarning) as notices:
        read = read_sample(files, tokenizers)
    said = "\n".join(str(n.message) for n in notices)
    for name in ("rgb.png: 64 x 32", "depth.png: 128 x 64", "semseg.png: 32 x 16"):
        assert f"{name} resized and cropped to 16 x 16" in said
    assert "boxes.json: 1 of 2 boxes lie outside" in said and "answer.json: 1 of 3 items lie outside" in said
    # The middle square begins where the mark ends.
    assert abs(read["rgb"][:, 3:].astype(int) - 10).max() < 3 and not read["mask"].any() and (read["semseg"] == 1).all()
    assert (read["depth"] == 9).all() and (read["thermal"] == 20).all() and (read["normals"] == (0, 1, 0)).all()
    assert read["edges"][:, 3:].max() < 0.02
    np.testing.assert_allclose(read["boxes"]["bbox"], [[0, 0, 1, 1]])
    assert read["boxes"]["label"] == ["middle"]
    point, mask = read["answer"]
    np.testing.assert_allclose(point["target"], [0.5, 0.5])
    assert mask["target"].all()  # cells of the picture's middle


def test_all_signals_of_a_sample_are_padded_alike(tokenizers, tmp_path):
    files = wide(tmp_path)
    classes = files.pop("semseg")
    thermal = files.pop("thermal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = read_sample(files, tokenizers, pad=True)
        for name, file in (("semseg", classes), ("thermal", thermal)):
            with pytest.raises(ValueError, match=f"{name}.*cannot be padded: no value stands for what is beyond"):
                read_sample({name: file}, tokenizers, pad=True)
    bars, mark, rest = np.s_[[0, 1, 2, 3, 12, 13, 14, 15]], np.s_[4:12, :4], np.s_[4:12, 4:]
    assert (read["rgb"][bars] == 128).all() and read["rgb"][4:12, :3].min() > 230 and read["rgb"][4:12, 5:].max() < 30
    for name, on, off in (("depth", 3, 9), ("mask", True, False), ("normals", (0, 0, 1), (0, 1, 0))):
        assert (read[name][bars] == 0).all(), name
        assert (read[name][mark] == on).all() and (read[name][rest] == off).all(), name
    assert (read["edges"][bars] == 0).all() and read["edges"][4:12, :3].min() > 0.9
    np.testing.assert_allclose(read["boxes"]["bbox"], [[0.375, 0, 0.625, 0.25], [0.25, 0.2, 0.75, 0.8]], atol=1e-6)
    np.testing.assert_allclose(read["answer"][1]["target"], [0.5, 0.5])
    assert read["answer"][2]["target"].tolist() == [[0] * 4, [0, 1, 1, 1], [0, 1, 1, 1], [0] * 4]


SHAPES = {(32, 64): True, (48, 95): True, (21, 43): True, (32, 32): False, (32, 60): False, (64, 32): False}


@pytest.mark.parametrize("shape, fits", SHAPES.items())
def test_pictures_of_one_sample_have_one_shape(shape, fits, tokenizers, tmp_path):
    files = wide(tmp_path)
    (tmp_path / "other.npy").write_bytes(npy(np.full(shape, 2.0)))
    given = {"rgb": files["rgb"], "depth": tmp_path / "other.npy"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if fits:
            assert read_sample(given, tokenizers)["depth"].shape == (16, 16)
            return
        with pytest.raises(ValueError, match=rf"rgb.png has 32 x 64 pixels, .*other.npy {shape[0]} x {shape[1]} "):
            read_sample(given, tokenizers)
        tagged = {"rgb": files["rgb"], "depth#not": tmp_path / "other.npy"}  # another picture
        read_sample(tagged, {name: tokenizers[name.partition("#")[0]] for name in tagged})


def test_turned_pictures_turn_their_maps(tokenizers, tmp_path):
    left = np.where(HALF, 5, 1).astype(np.uint8)
    for name in ("rgb", "semseg", "mask"):
        (tmp_path / f"{name}.png").write_bytes(saved(left * 40 if name == "rgb" else left, exif=turned()))
    read = read_sample({n: tmp_path / f"{n}.png" for n in ("rgb", "semseg", "mask")}, tokenizers)
    assert (read["rgb"][:8] == 200).all() and (read["rgb"][8:] == 40).all()
    assert (read["semseg"][:8] == 5).all() and (read["semseg"][8:] == 1).all()
    assert read["mask"][:8].all() and not read["mask"][8:].any()


def test_depth_that_no_sensor_saw_is_unknown(tokenizers, tmp_path):
    (tmp_path / "d.png").write_bytes(saved(np.where(HALF, 65535, 2000).astype(np.uint16)))
    with pytest.warns(UserWarning, match="65535 in depth of 16 bits.* unknown"):
        depth = read_sample({"depth": tmp_path / "d.png"}, tokenizers)["depth"]
    assert (depth == np.where(HALF, 0, 2)).all()


# ---- Masks ----------------------------------------------------------------------------------------------------------


def half_masks() -> dict[str, bytes]:
    """The left half stays, told in every way."""
    on = HALF.astype(np.uint8)
    two = Image.fromarray(on, "L")
    colours = [two.copy() for _ in range(3)]
    pairs = [((0, 0, 0), (255, 0, 0)), ((9, 9, 90), (200, 200, 0)), ((0, 0, 0), (1, 1, 1))]
    for picture, (dark, light) in zip(colours, pairs, strict=True):
        picture.putpalette([*dark, *light])
    white, black = (Image.new("RGB", (SIZE, SIZE), c) for c in ("white", "black"))
    alpha = with_alpha(white, on * 255)
    red = np.where(HALF[..., None], (255, 0, 0), 0).astype(np.uint8)
    return {
        **{f"{name}.png": saved(on * high) for name, high in (("one", 1), ("two", 2), ("all", 255), ("grey", 100))},
        "bit.png": saved(HALF), "red.png": saved(red), "rgb.png": saved(np.repeat(on[..., None] * 255, 3, -1)),
        **{f"palette{i}.png": saved(p) for i, p in enumerate(colours)},
        "clear.png": saved(two, transparency=0), "rgba.png": saved(alpha), "la.png": saved(alpha.convert("LA")),
        "black.png": saved(with_alpha(black, on * 255)),
        "drawn.png": saved(with_alpha(two.point(lambda v: v * 255), on * 55 + 200)),
        "alpha.webp": saved(alpha, "webp", lossless=True),
        "deep.png": saved(np.where(HALF, 65535, 300).astype(np.uint16)),
        "low.png": saved(on.astype(np.uint16)), "a.jpg": saved(on * 255, "jpeg"), "a.gif": saved(on * 255, "gif"),
        "a.bmp": saved(on * 255, "bmp"), "a.pbm": saved(HALF, "ppm"), "a.pgm": saved(on * 255, "ppm"),
        "f.tif": saved(Image.fromarray(on.astype(np.float32)), "tiff"),
        "dark.tif": saved(Image.fromarray(on * np.float32(0.4)), "tiff"),
        "i.tif": saved(Image.fromarray(on.astype(np.int32) * 9), "tiff"),
        "turned.png": saved(np.rot90(on), exif=turned()),
        "large.png": saved(on.repeat(3, 0).repeat(3, 1)), "bool.npy": npy(HALF), "u1.npy": npy(on),
        "f8.npy": npy(on * 0.5),
        "soft.png": saved(np.where(HALF, 200 + np.arange(SIZE), np.arange(SIZE)).astype(np.uint8)),
    }  # fmt: skip


def test_masks_mean_what_they_show(tokenizers, tmp_path):
    """Both as what is kept of a picture, and as a signal."""
    (tmp_path / "picture.png").write_bytes(saved(RGB))
    for name, data in half_masks().items():
        (tmp_path / name).write_bytes(data)
        kept = read_mask(tmp_path / name, tokenizers["rgb"], tmp_path / "picture.png")
        np.testing.assert_array_equal(kept, HALF, err_msg=name)
        if name != "large.png":
            np.testing.assert_array_equal(tokenizers["mask"].read(tmp_path / name), HALF, err_msg=name)


def test_masks_that_keep_all_or_nothing_or_have_another_shape(tokenizers, tmp_path):
    files = {
        "tall.png": np.ones((32, 16)),
        "none.png": np.zeros((16, 16)),
        "all.png": np.full((16, 16), 255),
        "rgb.png": RGB,
    }
    for name, array in files.items():
        (tmp_path / name).write_bytes(saved(array.astype(np.uint8)))
    keep = lambda name: read_mask(tmp_path / name, tokenizers["rgb"], tmp_path / "rgb.png")  # noqa: E731
    with pytest.raises(ValueError, match=r"tall.png has 32 x 16 pixels, .*rgb.png 16 x 16 "):
        keep("tall.png")
    with pytest.warns(UserWarning, match="none.png: nothing stays"):
        assert not keep("none.png").any()
    with pytest.warns(UserWarning, match="all.png: everything stays"):
        assert keep("all.png").all()
    for name, message in (("bomb.png", "allowed: at most"), ("gone.png", "No such file")):
        if name == "bomb.png":
            (tmp_path / name).write_bytes(BOMB)
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            keep(name)


def test_tokens_are_no_mask_of_what_stays(tmp_path):
    np.save(tmp_path / "tokens.npy", np.array([3, 1, 2]))
    with pytest.raises(ValueError, match=r"tokens.npy holds int64 \[3\]; allowed: an image, or an array \[H W\]"):
        load_mask(tmp_path / "tokens.npy")
    for array in (np.eye(4, dtype=bool), np.eye(4, dtype=np.int64), np.eye(4, dtype=np.float32)):
        np.save(tmp_path / "mask.npy", array)
        np.testing.assert_array_equal(load_mask(tmp_path / "mask.npy"), np.eye(4) > 0)


def test_masks_are_cropped_and_padded_as_their_picture(tokenizers, tmp_path):
    files = wide(tmp_path)
    for pad in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rgb = read_sample({"rgb": files["rgb"]}, tokenizers, pad=pad)["rgb"]
            kept = read_mask(files["mask"], tokenizers["rgb"], files["rgb"], pad=pad)
        np.testing.assert_array_equal(kept[:, 1:], rgb[:, 1:, 0] > 200)


# ---- Files and what is written out ----------------------------------------------------------------------------------


def test_a_label_is_no_file(tokenizers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"cat": "a file", "a cube": "x", "notes.txt": " words of a file\n", "l.txt": "dog\n"}.items():
        Path(name).write_text(text)
    read = lambda name, value: read_sample({name: value}, tokenizers)[name]  # noqa: E731
    assert read("category", "cat") == "cat" and read("caption", "a cube") == "a cube"
    assert read("caption", "notes.txt") == read("caption", Path("notes.txt")) == "words of a file"
    assert read("category", "l.txt") == "dog"
    with pytest.warns(UserWarning, match="gone.txt is taken as a text itself"):
        assert read("caption", "gone.txt") == "gone.txt"
    assert file_of("notes.txt", "text", words_name_files=False) is None
    (tmp_path / "b.png").write_bytes(saved(RGB))
    items = [{"inputs": {"rgb": "b.png"}, "outputs": {"category": "cat", "caption": "notes.txt"}}]
    (tmp_path / "shots.json").write_text(json.dumps(items))
    (shot,) = read_shots(tmp_path / "shots.json")
    assert shot.outputs == {"category": "cat", "caption": tmp_path / "notes.txt"}
    (tmp_path / "shots.json").write_text("[" * 5000)
    with pytest.raises(ValueError, match="shots.json cannot be read: .*deep"):
        read_shots(tmp_path / "shots.json")


def test_what_is_no_file_is_refused(tokenizers, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, message in ((tmp_path / "pipe.png", "a FIFO; allowed: files"), (tmp_path / "gone.png", "No such file")):
        with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
            read_sample({"rgb": path}, tokenizers)
    (tmp_path / "null.json").write_bytes(b"null")
    (tmp_path / "ids.npy").write_bytes(npy(np.arange(3)))
    for name in ("caption", "boxes", "answer", "metadata", "category"):
        for file, message in (("null.json", "null is no value"), ("ids.npy", "tokens .*which training alone reads")):
            with pytest.raises(ValueError, match=f"{file}: {message}"):
                read_sample({name: tmp_path / file}, tokenizers)


def test_a_transparent_picture_of_the_demo_has_a_white_ground():
    demo = pytest.importorskip("m4.demo.page")
    layer = np.zeros((SIZE, SIZE, 4), np.uint8)
    layer[:2, :2] = 255
    pixels = np.dstack([RGB, np.where(HALF, 255, 0).astype(np.uint8)])
    picture, painted = demo._picture({"background": pixels, "layers": [layer]})
    np.testing.assert_array_equal(picture, np.where(HALF[..., None], RGB, 255))
    assert painted.sum() == 4 and painted[:2, :2].all()


# ---- What m4 writes, it reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_is_read_back_to_the_same_ids(name, tokenizers, tmp_path):
    """By the path of training, from a folder of samples as `generate` writes them, and by that of generation."""
    tokenizer = tokenizers[name]
    modality = tokenizer.modality
    if name == "audio":
        pytest.importorskip("soundfile")
    given = tokenizer.encode([example(i)[name] for i in range(3)])
    is_vectors = isinstance(tokenizer, Ids) and isinstance(modality, Features)
    signals = given if is_vectors else tokenizer.decode(given)
    expected = tokenizer.encode(signals)
    for i, signal in enumerate(signals):
        (tmp_path / f"photo_{i}").mkdir()
        tokenizer.write(signal, tmp_path / f"photo_{i}", image=None)
    (tmp_path / "sheet.png").write_bytes(b"")
    (tmp_path / "failed.tsv").write_bytes(b"")
    source = Generated(root=tmp_path, validation_share=0, test_share=0)
    source.prepare("unused")
    assert len(source.signature("unused")) == 12
    split = read_for(source.split("train", "unused"), [tokenizer])
    assert [e["id"] for e in split] == ["photo_0", "photo_1", "photo_2"]
    folder = modality.name if name.startswith("tok_") else modality.signal
    assert set(split[0]) == {folder, "id", "file"}  # drawings are no signals
    for record, ids in zip(encode(list(split), {modality.name: tokenizer}), expected, strict=True):
        np.testing.assert_array_equal(record[modality.name], ids)
    for i, ids in enumerate(expected):
        (again,) = tokenizer.encode([tokenizer.read(Path(split[i]["file"]))])
        np.testing.assert_array_equal(again, ids)


def test_depth_beyond_16_bits_is_written_too(tokenizers, tmp_path):
    tokenizer = DepthRecipe(**SMALL | {"min_depth": 0.01, "max_depth": 200.0}).fit(
        [example(i) for i in range(8)], seed=0
    )
    depth = np.where(HALF, 150, 0.02).astype(np.float32)
    (tmp_path / "a").mkdir()
    tokenizer.write(depth, tmp_path / "a", image=None)
    (given,) = Generated(root=tmp_path, validation_share=0, test_share=0).split("train", "unused")
    np.testing.assert_array_equal(given["depth"], depth)


def test_a_generated_folder_without_samples(tmp_path):
    with pytest.raises(ValueError, match="has no folders of samples"):
        Generated(root=tmp_path).prepare("unused")
    with pytest.raises(ValueError, match="does not exist"):
        Generated(root=tmp_path / "gone").prepare("unused")


def test_what_the_packaged_model_generates_is_trained_on(tmp_path):
    """A folder of pictures, then token shards of what was made of it: the ids are those of the results."""
    rng = np.random.default_rng(0)
    with Image.open(ROOT / "tests/data/scene.png") as scene:
        pixels = np.asarray(scene.convert("RGB"))
    for i in range(3):
        noisy = np.clip(pixels + rng.integers(-9, 9, pixels.shape), 0, 255).astype(np.uint8)
        (tmp_path / f"{i}.png").write_bytes(saved(noisy))
    scenes = dataclasses.replace(Sampler.load("scenes"), devices=jax.devices()[:1])
    targets = [s for s in scenes.modalities.signals if s != "rgb"]
    results = scenes({"rgb": [tmp_path / f"{i}.png" for i in range(3)]}, targets, seed=1)
    for i in range(3):
        results.write(tmp_path / "out" / str(i), i, with_inputs=True)
    source = Generated(root=tmp_path / "out", validation_share=0, test_share=0)
    prepared = prepare([Dataset(source=source)], tokenizers_of("scenes"), tmp_path / "data", seed=0)
    (shards,) = prepared.shards("train")
    assert len(shards) == 3
    signals = {**results.inputs, **results}
    for name, tokenizer in scenes.tokenizers.items():
        for i, ids in enumerate(tokenizer.encode(signals[tokenizer.modality.signal])):
            np.testing.assert_array_equal(shards[i][name], ids, err_msg=name)
