"""Palettes and metadata: round trips, tolerance to junk, strictness to users, and the original's ids."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer

from m4.interchange import fourm
from m4.registry import from_json, to_json
from m4.tokens.records import encode
from m4.tokens.tokenizer import Recipe, Tokenizer, load_tokenizer, save_tokenizer
from m4_tokenizers.modalities.metadata import FIELDS, Bins, MetadataRecipe, Steps, Whole, image_metadata
from m4_tokenizers.modalities.palette import PaletteRecipe, extract_palette

PARITY = Path(os.environ.get("M4_PARITY", ROOT.parent / "shared" / "parity"))
BY_NAME = {field.name: field for field in FIELDS}


def image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (16, 12, 3)).astype(np.uint8)


EXAMPLES = [{"rgb": image(i), "metadata": image_metadata(image(i))} for i in range(8)]
EXAMPLES[0]["palette"] = np.array([[1, 2, 3]], np.uint8)
PALETTE: Recipe = PaletteRecipe()
METADATA: Recipe = MetadataRecipe(fields=(*FIELDS, Bins("cloud_cover", 0, 1, 50)))
TOKENIZERS = {"palette": PALETTE.fit(EXAMPLES, seed=3), "metadata": METADATA.fit(EXAMPLES, seed=3)}
SIGNALS = {
    "palette": [PALETTE.signal_of(e) for e in EXAMPLES],
    "metadata": [METADATA.signal_of(e) for e in EXAMPLES] + [{"cloud_cover": 0.3, "n_humans": 2}],
}


@pytest.fixture(params=["palette", "metadata"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def wordpiece():
    """Path of the original's WordPiece file, which is not ours to hand on, and what Hugging Face makes of it."""
    path = PARITY / "text" / "text_tokenizer_4m_wordpiece_30k.json"
    if not path.exists():
        pytest.skip("the original's WordPiece file is not here: set M4_PARITY to the folder of parity fixtures")
    return str(path), FastTokenizer.from_file(str(path))


def test_files_come_back_byte_equal(name, tmp_path):
    tokenizer = TOKENIZERS[name]
    assert isinstance(tokenizer, Tokenizer) and tokenizer.modality == tokenizer.recipe.modality
    save_tokenizer(tokenizer, tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    save_tokenizer(loaded, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert loaded.recipe == tokenizer.recipe == from_json(to_json(tokenizer.recipe))
    assert loaded.card == tokenizer.card and loaded.card["component"] == name and loaded.card["fit_seed"] == 3
    ids = tokenizer.encode(SIGNALS[name])
    assert loaded.card["longest"] == max(len(row) for row in ids[:8]) <= tokenizer.modality.max_length
    for a, b in zip(ids, loaded.encode(SIGNALS[name]), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.int32 and a.min() >= 0 and a.max() < tokenizer.modality.vocab_size and a[-1] == 3
    np.testing.assert_equal(loaded.decode(ids)[1], tokenizer.decode(ids[1:2])[0])
    assert tokenizer.encode([]) == []


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=7))
def test_palettes_round_trip_exactly(colours):
    palette = np.array(colours, np.uint8)
    decoded = TOKENIZERS["palette"].decode(TOKENIZERS["palette"].encode([palette]))[0]
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, palette)


number = st.floats(-1e4, 1e6) | st.integers(-(10**30), 10**30) | st.floats(0, 1)
fields = st.builds(
    lambda low, width, num_bins: Bins("own", low, low + width, num_bins),
    *(st.floats(-1e3, 1e3), st.floats(1e-2, 1e3), st.integers(2, 1000)),
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(FIELDS) | fields, number)
def test_a_number_falls_into_its_bin(field, value):
    value = int(value) if isinstance(field, Whole) else value
    index = field.bin(value)
    assert 0 <= index < field.num_bins
    centre = field.value(index)
    assert field.bin(centre) == index
    if isinstance(field, Whole) and 0 <= value < field.step * field.num_bins:
        assert abs(centre - value) <= field.step / 2
    if isinstance(field, Bins):
        assert abs(centre - min(max(value, field.low), field.high)) <= 0.501 * (field.high - field.low) / (
            field.num_bins - 1
        )


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.sampled_from(sorted(BY_NAME)), st.integers(0, 2000)))
def test_metadata_comes_back_as_centres_in_the_order_of_fields(metadata):
    tokenizer = TOKENIZERS["metadata"]
    ids = tokenizer.encode([metadata])[0]
    decoded = tokenizer.decode([ids])[0]
    assert decoded == {n: f.value(f.bin(metadata[n])) for n, f in BY_NAME.items() if n in metadata}
    assert list(decoded) == [n for n in BY_NAME if n in metadata]
    np.testing.assert_array_equal(tokenizer.encode([decoded])[0], ids)


junk = st.lists(st.integers(0, 1075) | st.integers(20, 60) | st.integers(276, 290), max_size=40)


@settings(deadline=None, max_examples=100)
@given(junk | st.lists(st.integers(-5, 40_000), max_size=40))
def test_junk_ids_never_raise(ids):
    for tokenizer in TOKENIZERS.values():
        tokenizer.draw(tokenizer.decode([np.array(ids, np.int32)])[0], image=None)
    palette, metadata = (tokenizer.decode([np.array(ids)])[0] for tokenizer in TOKENIZERS.values())
    assert palette.dtype == np.uint8 and palette.ndim == 2 and palette.shape[1] == 3 and len(palette) <= 7
    assert set(metadata) <= {*BY_NAME, "cloud_cover"}


def test_decode_keeps_what_is_whole():
    palette, metadata = TOKENIZERS.values()
    ids = palette.encode([np.array([[1, 2, 3], [4, 5, 6]], np.uint8)])[0]
    torn = np.concatenate([ids[1:3], ids[:4], ids[:1], ids[4:6], ids[-1:], ids])
    np.testing.assert_array_equal(palette.decode([torn])[0], [[1, 2, 3]])  # nothing behind [EOS]
    ids = metadata.encode([{"n_humans": 3, "entropy": 5.0}])[0]
    assert metadata.decode([ids[[1, 0, 0, 1, 2, 4]]]) == [{"n_humans": 3}]
    no_such_bin = ids[[2, 3]] + [0, 40]
    assert metadata.decode([no_such_bin]) == [{}]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 2**31))
def test_extracted_palettes(num_distinct, num_colors, seed):
    rng = np.random.default_rng(seed)
    distinct = np.unique(rng.integers(0, 256, (num_distinct, 3)), axis=0).astype(np.uint8)
    picture = distinct[rng.integers(0, len(distinct), (7, 9))]
    palette = extract_palette(picture, num_colors)
    np.testing.assert_array_equal(palette, extract_palette(picture, num_colors))
    assert palette.dtype == np.uint8 and 1 <= len(palette) <= num_colors
    colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    if len(colours) <= num_colors:
        assert {tuple(c) for c in palette.tolist()} == {tuple(c) for c in colours.tolist()}
        count = dict(zip(map(tuple, colours.tolist()), counts.tolist(), strict=True))
        ordered = [count[tuple(c)] for c in palette.tolist()]
        assert ordered == sorted(ordered, reverse=True)


def test_a_palette_is_that_of_the_example_or_else_of_its_image():
    np.testing.assert_array_equal(PALETTE.signal_of(EXAMPLES[0]), [[1, 2, 3]])
    np.testing.assert_array_equal(PALETTE.signal_of(EXAMPLES[1]), extract_palette(EXAMPLES[1]["rgb"], 5))
    stored = encode(EXAMPLES[:2], TOKENIZERS)  # as the data pipeline does
    assert [sorted(record) for record in stored] == [["metadata", "palette"]] * 2
    (bare,) = encode([{"palette": EXAMPLES[0]["palette"]}], TOKENIZERS)
    assert bare.keys() == {"palette"}
    with pytest.raises(ValueError, match="has none of palette, metadata, but: caption"):
        encode([{"caption": "neither"}], TOKENIZERS)


def test_image_metadata_of_known_images():
    grey = np.zeros((4, 6, 3), np.uint8)
    grey[:, :3] = 254
    found = image_metadata(grey)
    assert found == {
        **{"original_width": 6, "original_height": 4, "colorfulness": 0, "brightness": 127, "contrast": 127},
        **{"saturation": 0, "entropy": 1},
    }
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 255
    found = image_metadata(red)
    assert found["saturation"] == 255 and found["entropy"] == 0 and found["contrast"] == 0
    assert found["colorfulness"] == pytest.approx(0.3 * np.hypot(255, 127.5))
    assert list(found) == [n for n in BY_NAME if n in found]
    TOKENIZERS["metadata"].encode([found])


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        (np.zeros((0, 3), np.uint8), r"\[0, 3\] was given; allowed: .* n from 1 to 7"),
        (np.zeros((8, 3), np.uint8), r"\[8, 3\] was given"),
        (np.zeros((2, 4), np.uint8), r"\[2, 4\] was given"),
        (np.zeros((2, 3), np.float32), r"whole numbers in \[0, 255\], but are float32"),
        (np.array([[0, 256, 0]]), r"int64 from 0 to 256"),
    ],
)
def test_wrong_palettes_are_named(signal, message):
    with pytest.raises(ValueError, match=message):
        TOKENIZERS["palette"].encode([signal])


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        ({"colourfulness": 2}, "unknown metadata field 'colourfulness'; .*Did you mean 'colorfulness'"),
        ({"entropy": float("nan")}, "entropy=nan must be a finite number"),
        ({"n_humans": float("inf")}, "n_humans=inf must be a finite number"),
        ({"entropy": "high"}, "entropy='high' must be a finite number"),
        ({"n_humans": True}, "n_humans=True must be a finite number"),
        ({"n_humans": 2.5}, "n_humans=2.5 must be a whole number"),
        ([("n_humans", 2)], "list was given; allowed: a dict"),
    ],
)
def test_wrong_metadata_is_named(signal, message):
    with pytest.raises(ValueError, match=message):
        TOKENIZERS["metadata"].encode([signal])


def test_wrong_recipes_and_images_are_named(tmp_path):
    full = {field.name: 1 for field in FIELDS}
    with pytest.raises(ValueError, match="metadata of 43 tokens is longer than the allowed 40"):
        MetadataRecipe(max_length=40).fit([], seed=0).encode([full])
    for make, message in (
        (lambda: PaletteRecipe(num_colors=8), "num_colors=8, max_colors=7; allowed"),
        (lambda: MetadataRecipe(fields=(*FIELDS, Whole("entropy"))), r"\['entropy'\] are given twice"),
        (lambda: MetadataRecipe(fields=()), "no fields"),
        (lambda: MetadataRecipe(fields=(Whole("n", num_bins=1001),), wordpiece="x"), "needs 1001 bins .* has 1000"),
        (lambda: Bins("a", 1, 0, 50), "allowed are low < high"),
        (lambda: Steps("a", (1, 1)), "each above the one before"),
        (lambda: extract_palette(np.zeros((2, 2), np.uint8), 5), r"uint8 \[2, 2\] was given; allowed: uint8 \[H, W, 3"),
        (lambda: extract_palette(image(0), 0), "num_colors=0 must be 1 to 256"),
        (lambda: image_metadata(np.zeros((2, 2, 3))), r"float64 \[2, 2, 3\] was given"),
        (lambda: PaletteRecipe(wordpiece=str(tmp_path / "none.json")).fit([], seed=0), "no WordPiece file"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_palettes_are_read_and_written(tmp_path):
    tokenizer, palette = TOKENIZERS["palette"], np.array([[255, 0, 0], [0, 128, 255]], np.uint8)
    tokenizer.write(palette, tmp_path, image=None)
    assert {p.name for p in tmp_path.iterdir()} == {"palette.json", "palette.png"}
    for value in (str(tmp_path / "palette.json"), "[[255, 0, 0], [0, 128, 255]]", "#ff0000, #0080ff"):
        read = tokenizer.read(value)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, palette)
    with pytest.warns(UserWarning, match="resized and cropped"):
        assert len(tokenizer.read(str(tmp_path / "palette.png"))) <= 5
    Image.fromarray(np.repeat(palette, 2048, axis=0).reshape(64, 64, 3)).save(tmp_path / "image.png")
    assert sorted(tokenizer.read(str(tmp_path / "image.png")).tolist()) == sorted(palette.tolist())
    assert tokenizer.draw(palette, image=None).shape == (64, 128, 3)
    assert (tokenizer.draw(palette[:0], image=None) == 255).all()
    for value in ("[[1, 2]]", "[[", "[[1, 2, 300]]", "[[0.5, 0, 0]]", "[]", "#ff00", "#xyzxyz", "none.json"):
        with pytest.raises(ValueError, match="a palette must be JSON like"):
            tokenizer.read(value)
    with pytest.raises(ValueError, match="palette must be JSON like.*or image file"):
        tokenizer.read(str(tmp_path / "none.png"))


def test_metadata_is_read_and_written(tmp_path):
    tokenizer, metadata = TOKENIZERS["metadata"], {"n_humans": 2, "colorfulness": 40.5}
    tokenizer.write({**metadata, "n_humans": np.int64(2)}, tmp_path, image=None)
    assert json.loads((tmp_path / "metadata.json").read_text()) == metadata
    for value in (str(tmp_path / "metadata.json"), json.dumps(metadata), "n_humans=2, colorfulness=40.5"):
        assert tokenizer.read(value) == metadata
    picture = tokenizer.draw({field.name: 1 for field in FIELDS}, image=None)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and (picture != 255).any()
    for value in ("n_humans", "n_humans=two", "n_human=2", '{"n_humans"', "[2]", "{}x", "none.json", "entropy=NaN"):
        with pytest.raises(ValueError, match="metadata must be like colorfulness=40"):
            tokenizer.read(value)


def test_ids_are_the_originals(wordpiece, tmp_path):
    """Strings as the original writes them, and our tokens, have the same ids."""
    path, original = wordpiece

    def expected(text: str) -> list[int]:
        assert original.encode(text, add_special_tokens=False).tokens == text.split()
        return [*original.encode(text, add_special_tokens=False).ids, 3]

    palette = PaletteRecipe(wordpiece=path).fit(EXAMPLES, seed=0)
    colours = np.array([[255, 0, 0], [0, 128, 255]], np.uint8)
    ids = palette.encode([colours])[0]
    assert ids.tolist() == expected("v1=2 v0=255 v0=0 v0=0 v0=0 v0=128 v0=255")
    np.testing.assert_array_equal(palette.decode([ids])[0], colours)
    assert len(palette.decode([original.encode("v1=1 v0=256 v0=0 v0=0").ids])[0]) == 0

    metadata = MetadataRecipe(wordpiece=path, max_length=40).fit([], seed=0)
    for signal, text in (
        ({"original_width": 640, "original_height": 427}, "v1=0 v0=20 v1=1 v0=13"),
        ({"original_width": 10**6, "caption_n_chars": 1234, "n_humans": 0}, "v1=0 v0=999 v1=2 v0=999 v1=5 v0=0"),
        ({"colorfulness": 150, "brightness": 127.5, "contrast": 200}, "v1=9 v0=49 v1=10 v0=24 v1=11 v0=49"),
        ({"geometric_complexity": 0.375, "occlusion_score": 0.2499}, "v1=17 v0=24 v1=18 v0=48"),
        ({"watermark_score": 0.5, "aesthetic_score": 4.4}, "v1=19 v0=1 v1=20 v0=0"),
        ({"aesthetic_score": 5.5, "watermark_score": 0.49}, "v1=19 v0=0 v1=20 v0=2"),
    ):
        assert metadata.encode([signal])[0].tolist() == expected(text)
    assert metadata.modality == fourm.modality("metadata")
    assert palette.modality == fourm.modality("color_palette")
    save_tokenizer(palette, tmp_path / "a")
    save_tokenizer(load_tokenizer(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
