"""Tokenizers: round trips, tolerance to junk, files that come back byte-equal, and training that only improves."""

import dataclasses
import json
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m4.tokens.tokenizer import Recipe, Tokenizer, load_tokenizer, save_tokenizer
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.depth import DepthRecipe
from m4_tokenizers.modalities.image import ImageRecipe, PixelPatchesRecipe
from m4_tokenizers.modalities.text import EOS, TextRecipe
from m4_tokenizers.networks.patch_mixing import PatchDecoder, PatchEncoder
from m4_tokenizers.networks.patches import to_patches
from m4_tokenizers.quantizers.codebooks import code_use, fit_codebook, nearest_codes
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.train import train

COLOURS = {"red": (200, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 210)}
TINY = dict(
    encoder=PatchEncoder(width=18, num_blocks=1),
    quantizer=LearnedVectorQuantizer(num_codes=32, latent_size=8),
    decoder=PatchDecoder(width=18, num_blocks=1),
    num_held_out=16,
)


def example(index: int) -> dict:
    """A coloured square on a grey ground under a sky of unknown depth."""
    rng = np.random.default_rng(index)
    name = list(COLOURS)[rng.integers(3)]
    y, x = rng.integers(8, 40, 2)
    side = rng.integers(10, 22)
    horizon = int(rng.integers(16, 28))
    rgb = np.full((64, 64, 3), rng.integers(150, 220), np.uint8)
    rgb[horizon:] = rng.integers(80, 130)
    depth = np.zeros((64, 64), np.float32)
    depth[horizon:] = np.linspace(20, 2, 64 - horizon, dtype=np.float32)[:, None]
    instance = np.zeros((64, 64), np.int32)
    square = np.s_[y : y + side, x : x + side]
    rgb[square], depth[square], instance[square] = COLOURS[name], 2 + 6 * rng.random(), 1
    bbox = np.array([[y, x, y + side, x + side]], np.float32) / 64
    boxes = {"bbox": bbox, "label": [f"{name} square"]}
    return {"rgb": rgb, "depth": depth, "instance": instance, "boxes": boxes, "caption": f"a {name} square"}


EXAMPLES = [example(i) for i in range(96)]


@pytest.fixture(scope="module")
def text():
    return TextRecipe(max_length=512).fit(EXAMPLES, seed=0)


@pytest.fixture(scope="module")
def boxes():
    return BoxRecipe(max_objects=8).fit(EXAMPLES, seed=0)


@pytest.fixture(scope="module")
def image():
    return ImageRecipe(num_steps=4, **TINY).fit(EXAMPLES, seed=0)


@pytest.fixture(scope="module")
def depth():
    return DepthRecipe(num_steps=60, **TINY).fit(EXAMPLES, seed=0)


@pytest.fixture(scope="module")
def pixels():
    return PixelPatchesRecipe().fit(EXAMPLES, seed=0)


def test_folder_does_not_shadow_hugging_face():
    import tokenizers

    assert hasattr(tokenizers, "Tokenizer") and not Path("tokenizers/__init__.py").exists()


@pytest.mark.parametrize("name", ["text", "boxes", "image", "depth", "pixels"])
def test_files_come_back_byte_equal(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    assert isinstance(tokenizer, Tokenizer) and tokenizer.modality == tokenizer.recipe.modality
    save_tokenizer(tokenizer, tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    save_tokenizer(loaded, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert loaded.modality == tokenizer.modality and loaded.card == json.loads(json.dumps(tokenizer.card))
    signals = [e[tokenizer.modality.signal] for e in EXAMPLES[:3]]
    for a, b in zip(tokenizer.encode(signals), loaded.encode(signals), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["text", "boxes", "image", "depth", "pixels"])
def test_batch_equals_single_and_ids_are_in_range(name, request):
    tokenizer = request.getfixturevalue(name)
    signals = [e[tokenizer.modality.signal] for e in EXAMPLES[:70]]
    batch = tokenizer.encode(signals)
    for i in (0, 69):
        np.testing.assert_array_equal(batch[i], tokenizer.encode([signals[i]])[0])
    if name != "pixels":
        assert all(ids.min() >= 0 and ids.max() < tokenizer.modality.vocab_size for ids in batch)
        assert all(len(ids) <= tokenizer.modality.max_tokens for ids in batch)
    assert tokenizer.encode([]) == []
    decoded = tokenizer.decode(batch[:2])
    np.testing.assert_equal(decoded[1], tokenizer.decode(batch[1:2])[0])


@pytest.mark.parametrize("name", ["text", "boxes", "image", "depth"])
def test_writes_and_draws(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    signal = EXAMPLES[0][tokenizer.modality.signal]
    tokenizer.write(signal, tmp_path, image=EXAMPLES[0]["rgb"])
    for picture in (tokenizer.draw(signal, image=None), tokenizer.draw(signal, image=EXAMPLES[0]["rgb"])):
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    files = {
        "text": {"caption.txt"},
        "boxes": {"boxes.json", "boxes.png"},
        "image": {"rgb.png"},
        "depth": {"depth.png", "depth_color.png"},
    }
    assert {p.name for p in tmp_path.iterdir()} == files[name]


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60))
def test_any_text_round_trips(text, content):
    ids = text.encode([content])[0]
    assert ids[-1] == EOS and (ids[:-1] >= text.layout.first_text).all()
    assert text.decode([ids]) == [content]


def test_text_layout(text):
    names = text.layout.names
    assert names[:6] == ("[PAD]", "[UNK]", "[SOS]", "[EOS]", "[S_0]", "[S_1]")
    assert text.modality.first_sentinel == names.index("[S_1]") == 5 and text.modality.end_id == 3
    assert text.layout.first_coordinate == names.index("v0=0") and names[-1] == "[D_31]"
    assert len(text.encode(["a red square"])[0]) == 4  # a word with its space is one token
    typed = "[EOS] [S_1] v0=3"
    assert text.decode(text.encode([typed])) == [typed]


def test_larger_corpus_gets_merges():
    words = ["".join(chr(97 + (i * j) % 26) for j in range(3, 9)) + str(i) for i in range(300)]
    recipe = TextRecipe(vocab_size=700, max_length=64)
    corpus = [{"caption": " ".join(words[i : i + 5])} for i in range(296)]
    fitted, again = recipe.fit(corpus, seed=0), recipe.fit(corpus, seed=0)
    assert fitted.merges and fitted.state() == again.state()
    assert len(fitted.pieces) == 700 - fitted.layout.first_text
    typed = "v0=1 é " + words[3]
    assert fitted.decode(fitted.encode([typed])) == [typed]


def test_text_that_is_too_long_or_junk(text):
    short = TextRecipe(max_length=8).fit(EXAMPLES, seed=0)
    with pytest.raises(ValueError, match=r"caption of \d+ tokens .* allowed 8: 'zzzz"):
        short.encode(["z" * 50])
    junk = np.random.default_rng(0).integers(0, text.modality.vocab_size, (50, 40))
    assert all(isinstance(t, str) for t in text.decode(list(junk)))
    with pytest.raises(ValueError, match="vocab_size=300 is too small"):
        TextRecipe(vocab_size=300)


unit = st.floats(0, 1, width=32)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(unit, unit, unit, unit, st.text(min_size=1, max_size=6)), max_size=5))
def test_boxes_round_trip_within_half_a_bin(items):
    tokenizer = BoxRecipe(max_objects=64).fit(EXAMPLES[:8], seed=0)
    bbox = np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d, _ in items], np.float32)
    signal = {"bbox": bbox.reshape(-1, 4), "label": [label for *_, label in items]}
    decoded = tokenizer.decode(tokenizer.encode([signal]))[0]
    assert decoded["label"] == signal["label"]
    assert np.abs(decoded["bbox"] - signal["bbox"]).max(initial=0) <= 0.5 / 64 + 1e-6


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 639), max_size=40))
def test_box_parser_never_raises(boxes, ids):
    decoded = boxes.decode_with_scores(np.array(ids, np.int32), np.full(len(ids), -0.5))
    assert len(decoded["bbox"]) == len(decoded["label"]) == len(decoded["score"])
    assert (decoded["bbox"][:, :2] <= decoded["bbox"][:, 2:]).all()


def test_box_parser_skips_malformed_pieces_and_scores(boxes):
    ids = boxes.encode([EXAMPLES[0]["boxes"]])[0]
    assert len(ids) == 6  # a label in training is one token
    mixed = np.concatenate([ids[:2], ids[4:5], ids[:-1], ids[1:4], ids])
    logprobs = np.log(np.linspace(0.1, 0.9, len(mixed)))
    decoded = boxes.decode_with_scores(mixed, logprobs)
    assert decoded["label"] == EXAMPLES[0]["boxes"]["label"] * 2
    assert decoded["score"][0] == pytest.approx(np.exp(logprobs[3:8].mean()), rel=1e-5)


def test_box_files(boxes, tmp_path):
    signal = EXAMPLES[0]["boxes"]
    boxes.write(signal, tmp_path, image=EXAMPLES[0]["rgb"])
    for value in (str(tmp_path / "boxes.json"), (tmp_path / "boxes.json").read_text()):
        read = boxes.read(value)
        np.testing.assert_allclose(read["bbox"], signal["bbox"], atol=1e-5)
        assert read["label"] == signal["label"]
    for value in ("[{]", str(tmp_path / "none.json"), '[{"bbox": [1, 2], "label": "a"}]'):
        with pytest.raises(ValueError, match="JSON"):
            boxes.read(value)
    with pytest.raises(ValueError, match="must lie in"):
        boxes.encode([{"bbox": np.array([[0, 0, 2, 2]], np.float32), "label": ["a"]}])


def test_depth_range_and_validity(depth, tmp_path):
    signals = [e["depth"] for e in EXAMPLES]
    decoded = np.stack(depth.decode(depth.encode(signals)))
    known = decoded > 0
    assert ((decoded[known] >= 0.5) & (decoded[known] <= 30.001)).all()
    assert (known == (np.stack(signals) > 0)).mean() > 0.9
    pixels = depth.recipe.to_arrays(signals)
    assert pixels.min() >= -1 and pixels.max() <= 1
    np.testing.assert_allclose(np.stack(depth.recipe.to_signals(pixels)), np.stack(signals), rtol=1e-4)
    for wrong, words in ((-1.0, "negative"), (np.nan, "not finite")):
        with pytest.raises(ValueError, match=words):
            depth.encode([np.where(signals[0] > 5, np.float32(wrong), signals[0])])
    with pytest.raises(ValueError, match="are its units others"):
        depth.encode([signals[0] * np.float32(1000)])
    depth.write(signals[0], tmp_path, image=None)
    np.testing.assert_allclose(depth.read(str(tmp_path / "depth.png")), signals[0], atol=6e-4)
    np.save(tmp_path / "depth.npy", signals[0])
    np.testing.assert_array_equal(depth.read(str(tmp_path / "depth.npy")), signals[0])
    assert (depth.draw(signals[0], image=None)[signals[0] == 0] == 0).all()
    with pytest.raises(ValueError, match="float64"):
        depth.encode([signals[0].astype(np.float64)])


def test_any_image_mode_is_read(image, tmp_path):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    rgba = np.zeros((64, 64, 4), np.uint8)
    variants = {
        "grey.png": Image.fromarray(grey),
        "alpha.png": Image.fromarray(rgba),
        "palette.png": Image.fromarray(EXAMPLES[0]["rgb"]).quantize(64),
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    read = {}
    for name, variant in variants.items():
        variant.save(tmp_path / name)
        read[name] = image.read(str(tmp_path / name))
        assert read[name].shape == (64, 64, 3) and read[name].dtype == np.uint8
    np.testing.assert_array_equal(read["grey.png"][..., 1], grey)
    np.testing.assert_array_equal(read["deep.png"][..., 2], grey)
    assert (read["alpha.png"] == 255).all()  # transparent: white

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    wide = Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2)).resize((160, 80))
    wide.save(tmp_path / "turned.jpg", exif=exif)
    with pytest.warns(UserWarning, match="80 x 160 resized and cropped to 64 x 64"):
        turned = image.read(str(tmp_path / "turned.jpg")).astype(int)
    assert turned[-1].mean() > turned[0].mean() + 50
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match="broken.png: damaged, or no picture that can be read"):
        image.read(str(tmp_path / "broken.png"))


@pytest.mark.parametrize("name", ["image", "pixels"])
def test_wrong_images_are_named(name, request):
    tokenizer = request.getfixturevalue(name)
    with pytest.raises(ValueError, match=r"float32 \[32, 64, 3\] was given; allowed: uint8 \[64, 64, 3\]"):
        tokenizer.encode([np.zeros((32, 64, 3), np.float32)])


def test_wrong_ids_are_named(image):
    with pytest.raises(ValueError, match=r"64 ids in \[0, 32\), but got 64 in \[0, 32\]"):
        image.decode([np.array([32] + [0] * 63)])


def test_pixels_are_lossless_with_channels_fastest(pixels):
    rgb = EXAMPLES[0]["rgb"]
    patches = pixels.encode([rgb])[0]
    assert patches.dtype == np.uint8 and patches.shape == (64, 192)
    np.testing.assert_array_equal(patches[9].reshape(8, 8, 3), rgb[8:16, 8:16])
    np.testing.assert_array_equal(pixels.decode([patches])[0], rgb)


def test_codebook_uses_all_codes_and_is_seeded():
    vectors = np.random.default_rng(0).normal(size=(4000, 6)).astype(np.float32)
    codes = fit_codebook(vectors, num_codes=64, seed=1)
    np.testing.assert_array_equal(codes, fit_codebook(vectors, num_codes=64, seed=1))
    ids, distances = nearest_codes(vectors, codes)
    brute = ((vectors[:100, None] - codes[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(ids[:100], brute.argmin(1))
    np.testing.assert_allclose(distances[:100], brute.min(1), atol=1e-4)
    assert code_use(ids, 64)["codes_used"] == 1
    with pytest.raises(ValueError, match="64 codes need at least as many"):
        fit_codebook(vectors[:10], num_codes=64, seed=1)


def test_training_improves_on_k_means_and_is_seeded():
    recipe: Recipe = ImageRecipe(num_steps=80, batch_size=16, **TINY)
    start = dataclasses.replace(recipe, num_steps=0).fit(EXAMPLES, seed=0)
    patches = to_patches(recipe.to_arrays([EXAMPLES[0]["rgb"]]), 8).reshape(-1, 192)
    _, arrays = start.state()
    latent = (patches - arrays["encoder.mean"]) @ arrays["encoder.project"]
    expected, _ = nearest_codes(latent, arrays["quantizer.codes"])  # step 0 is the k-means tokenizer
    assert (start.encode([EXAMPLES[0]["rgb"]])[0] == expected).mean() > 0.98
    trained = recipe.fit(EXAMPLES, seed=0)
    assert trained.card["psnr"] > start.card["psnr"] > start.card["psnr_of_mean"]
    again = recipe.fit(EXAMPLES, seed=0)
    for name, array in trained.state()[1].items():
        np.testing.assert_array_equal(array, again.state()[1][name])


def test_no_warnings_on_exact_size(image, tmp_path):
    Image.fromarray(EXAMPLES[0]["rgb"]).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(image.read(str(tmp_path / "a.png")), EXAMPLES[0]["rgb"])


@pytest.mark.parametrize("recipe", [ImageRecipe(), DepthRecipe()])
def test_examples_of_several_data_sets_may_lack_instances(recipe):
    """Objects are measured where all examples have them."""
    given = [e[recipe.signal] for e in EXAMPLES[:4]]
    with_objects = recipe.measure(given, given, EXAMPLES[:4])
    without = recipe.measure(given, given, [*EXAMPLES[:3], {recipe.signal: given[3]}])
    assert any("on_objects" in name for name in with_objects)
    assert without == {name: x for name, x in with_objects.items() if "on_objects" not in name}


def test_train_writes_files_and_sheets(tmp_path, capsys):
    source = types.SimpleNamespace(prepare=lambda data_dir: None, split=lambda name, data_dir: EXAMPLES)
    recipes = (PixelPatchesRecipe(), TextRecipe(), BoxRecipe())
    config = types.SimpleNamespace(tokenizers=recipes, source=source, data_dir="", seed=0)
    train(config, signals=["caption", "boxes"], out=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{n}.{e}" for n in ("caption", "boxes") for e in ("safetensors", "json", "png")
    }
    assert load_tokenizer(tmp_path / "boxes.safetensors").card["num_labels"] == 3
    assert "mean_tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no tokenizer of signal 'captoin'.*Did you mean 'caption'"):
        train(config, signals=["captoin"], out=tmp_path)
