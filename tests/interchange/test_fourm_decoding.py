"""What 4M's demo shows of recorded tokens: every text, value, person, instance and picture of the fixtures."""

import json
from pathlib import Path

import numpy as np
import parity_run
import pytest
from conftest import PARITY

from m4.interchange.fourm import IMAGENET_MEAN, IMAGENET_STD
from m4_tokenizers.interchange import fourm_decoding as demo
from m4_tokenizers.interchange.fourm_decoding import MergedSequence
from m4_tokenizers.modalities.text import WordPieceRecipe

PIPELINE = PARITY / "pipeline"
START = np.array([5], np.int32)  # [S_1], the input of a sequence of which nothing is given
MODELS = {"tok_canny_edge": "tok_edge", "tok_sam_edge": "tok_edge"}  # others are named as their modality
CASES = ("rgb_to_all", "text_to_all", "super_resolution")


def read(*path: str):
    """A JSON or npz file of the fixtures."""
    file = PIPELINE.joinpath(*path)
    if not file.exists():
        pytest.skip(f"no fixture {'/'.join(path)}: set M4_PARITY to the folder of parity fixtures")
    if file.suffix == ".json":
        return json.loads(file.read_text())
    with np.load(file) as arrays:
        return dict(arrays)


def recorded_tokens(case: str) -> dict[str, np.ndarray]:
    return read(case, "tokens.npz")


@pytest.fixture(scope="module")
def text():
    path = PARITY / "text" / "text_tokenizer_4m_wordpiece_30k.json"
    if not path.exists():
        pytest.skip("the original's WordPiece file is not here: set M4_PARITY to the folder of parity fixtures")
    return WordPieceRecipe(path=str(path)).fit([], seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    """name -> the fixture's tiny tokenizer, converted once."""
    known = {}

    def get(name: str):
        if name not in known:
            spec = read("models", name, "state_dict.json")
            presets = spec["presets"] if "presets" in spec else {}
            known[name] = parity_run.converted_tokenizer(PIPELINE / "models" / name, {"presets": presets})
        return known[name]

    return get


@pytest.fixture(scope="module")
def sequences():
    """(case, result) of each of the 60 sequences."""
    cases, results = read("sequences", "cases.json"), read("sequences", "results.json")
    pairs = list(zip(cases["sequences"], results["sequences"], strict=True))
    assert len(pairs) == 60
    return pairs


def of_kind(sequences, *kinds: str):
    """(name, decoded text, result) of the sequences of some kinds."""
    return [(case["name"], result["decoded_text"], result) for case, result in sequences if case["kind"] in kinds]


def same_picture(given: np.ndarray, arrays, name: str, *, levels: int = 1, atol: float = 5e-5) -> None:
    """Against a whole picture, or its 8-bit version and its crop of [96:128, 96:128] in full precision."""
    if name in arrays:
        np.testing.assert_allclose(given, arrays[name], atol=atol, rtol=0)
        return
    as_bytes = np.round(255 * given.clip(0, 1)).astype(int)
    assert np.abs(as_bytes - arrays[f"{name}.u8"].astype(int)).max() <= levels
    np.testing.assert_allclose(given[96:128, 96:128], arrays[f"{name}.crop"], atol=atol, rtol=0)


def test_texts(sequences, text):
    for case, result in sequences:
        ids = np.array(case["ids"], np.int32)
        assert text.decode_verbatim(ids) == result["decoded_text"], case["name"]
        sequence = MergedSequence(ids, np.zeros(len(ids), bool), np.zeros(len(ids), bool))
        np.testing.assert_array_equal(demo.shown_ids(sequence), ids)
    for name, decoded, result in of_kind(sequences, "caption", "det"):
        assert [demo.without_end(decoded)] == result["value"], name


def test_merging_of_generated_sequences(text):
    cases, results = (read("sequences", f"{name}.json")["merges"] for name in ("cases", "results"))
    assert len(cases) == 7
    for case, result in zip(cases, results, strict=True):
        merged = demo.merge_generated(START, np.array(case["pred_ids"], np.int32))
        for ours, theirs in zip(merged, ("merged_ids", "input_mask", "target_mask"), strict=True):
            np.testing.assert_array_equal(ours, result[theirs], err_msg=case["text"])
        shown = text.decode_verbatim(demo.shown_ids(merged))
        if case["key"] == "caption":
            assert [demo.without_end(shown)] == result["decoded"]
        else:
            assert list(demo.palette_picture(shown).shape) == result["decoded"]["shape"]


def test_spans_are_merged_at_sentinels():
    merged = demo.merge_spans(np.array([300, 5, 302, 6]), np.array([299, 5, 301, 11, 310, 5, 303]))
    np.testing.assert_array_equal(merged, [300, 301, 303, 302])


def check_error(decode, text: str, expected: str) -> None:
    """The class of the error is the original's."""
    with pytest.raises((LookupError, ValueError, OverflowError)) as caught:
        decode(text)
    assert caught.type.__name__ == expected


def test_detected_boxes(sequences):
    for name, _, result in of_kind(sequences, "det"):
        shown = result["value"][0]
        if "boxes_error" in result:
            check_error(demo.detected_boxes, shown, result["boxes_error"])
        else:
            assert [list(box) for box in demo.detected_boxes(shown)] == result["boxes"], name


def test_metadata(sequences):
    for name, decoded, result in of_kind(sequences, "metadata"):
        if "error" in result:
            check_error(demo.metadata, decoded, result["error"])
        else:
            values = demo.metadata(decoded)
            assert values == result["value"] and [*values] == [*result["value"]], name


def test_palettes(sequences):
    pictures = read("sequences", "outputs.npz")
    for name, decoded, result in of_kind(sequences, "color_palette"):
        if "error" in result:
            check_error(demo.palette_picture, decoded, result["error"])
        else:
            picture = demo.palette_picture(decoded)
            assert [*picture.shape] == result["array"]["shape"] and picture.dtype == result["array"]["dtype"], name
            np.testing.assert_array_equal(np.round(255 * picture), pictures[name])


def test_people(sequences, tokenizer):
    arrays, poses = read("sequences", "outputs.npz"), tokenizer("human_poses")
    image = read("sequences", "inputs.npz")["rgb_u8"].astype(np.float32) / 255
    has_image = {case["name"]: case["rgb"] for case, _ in sequences}
    compared = 0
    for name, decoded, result in of_kind(sequences, "human_poses"):
        people = demo.people(decoded, poses)
        assert len(people) == (result["people"] if "people" in result else 0), name
        for i, person in enumerate(people):
            for field, ours in person._asdict().items():
                theirs = arrays[f"{name}.{i}.{field}"]
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
                np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0, err_msg=f"{name} {field}")
                compared += 1
        picture = demo.people_picture(decoded, image if has_image[name] else None)
        assert [*picture.shape] == result["array"]["shape"] and picture.dtype == result["array"]["dtype"], name
        expected = image / 2 if result["picture"] == "half_of_rgb" else np.ones((224, 224, 4))
        np.testing.assert_allclose(picture, expected, atol=1e-7)
    assert compared == sum(key.startswith("human_poses") for key in arrays)


def test_people_that_cannot_be_read(text, tokenizer):
    """The seven of rgb_to_all, by the messages that the original printed."""
    messages = read("rgb_to_all", "case.json")["messages"]
    decoded = text.decode_verbatim(recorded_tokens("rgb_to_all")["human_poses.tensor"][0])
    windows = demo.person_tokens(decoded)
    assert len(windows) == len(messages) == 7
    for tokens, message in zip(windows, messages, strict=True):
        with pytest.raises(KeyError if "pred_cam" in message else ValueError) as caught:
            demo.person(tokens, tokenizer("human_poses"))
        # The original names a word without its first three letters.
        assert message.split("'")[1] in str(caught.value)


def test_instances(sequences, tokenizer):
    arrays, masks = read("sequences", "outputs.npz"), tokenizer("sam_instance")
    for name, decoded, result in of_kind(sequences, "sam_instance"):
        boxes, codes = demo.instance_tokens(decoded)
        if f"{name}.mask_tokens" not in arrays:
            assert not len(boxes) and not arrays[name].any(), name
            continue
        np.testing.assert_array_equal(codes, arrays[f"{name}.mask_tokens"], err_msg=name)
        logits = demo.instance_logits(codes, masks)
        np.testing.assert_allclose(logits, arrays[f"{name}.mask_logits"][:, 0], atol=2e-5, rtol=0)
        # Pixels within rounding errors of the threshold may differ.
        close = sum(x < 1e-5 for x in result["min_distance_to_half"])
        picture = demo.instance_picture(boxes, logits)
        assert (picture != arrays[name]).any(-1).sum() <= close, name


def test_averaged_instances():
    """Two near copies are one instance of the mean box; a third at another place has its own colour."""
    boxes = np.array([[10, 20, 74, 84], [10, 22, 74, 84], [100, 100, 132, 132]], np.int32)
    logits = np.full((3, 64, 64), 9, np.float32)
    logits[:, 0, 0] = -9
    picture = demo.instance_picture(boxes, logits)
    colours = np.unique(picture.reshape(-1, 3), axis=0)
    np.testing.assert_array_equal(colours, [[0, 0, 0], [68, 78, 10], [216, 162, 130]])
    rows, columns = np.nonzero((picture == (216, 162, 130)).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (21, 83, 10, 73)


@pytest.mark.parametrize("case", CASES)
def test_sequences_of_a_run(case, text, tokenizer):
    decoded, arrays, tokens = read(case, "decoded.json"), read(case, "outputs.npz"), recorded_tokens(case)
    names = ["caption", "det", "human_poses", "sam_instance", "color_palette", "metadata"]
    for name in [n for n in names if f"{n}.tensor" in tokens]:
        final = MergedSequence(*(tokens[f"{name}.{field}"][0] for field in MergedSequence._fields))
        if f"{name}.ar_pred_ids" in tokens:
            merged = demo.merge_generated(START, tokens[f"{name}.ar_pred_ids"][0])
            for ours, theirs in zip(merged, final, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        shown = text.decode_verbatim(demo.shown_ids(final))
        if name in ("caption", "det"):
            assert [demo.without_end(shown)] == decoded[name]
        elif name == "metadata":
            assert demo.metadata(shown) == decoded[name]
        elif name == "color_palette":
            same_picture(demo.palette_picture(shown), arrays, name)
        elif name == "sam_instance":
            boxes, codes = demo.instance_tokens(shown)
            logits = demo.instance_logits(codes, tokenizer("sam_instance"))
            np.testing.assert_array_equal(demo.instance_picture(boxes, logits), arrays[name])
        else:
            assert not demo.people(shown, tokenizer("human_poses"))
            same_picture(demo.people_picture(shown, arrays["rgb@224.u8"].astype(np.float32) / 255), arrays, name)


def test_image_of_a_run():
    """The input picture, from the bytes before it was standardised."""
    arrays = read("rgb_to_all", "outputs.npz")
    mean, deviation = (np.array(x, np.float32) for x in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (recorded_tokens("rgb_to_all")["resized_u8"].astype(np.float32) / 255 - mean) / deviation
    same_picture(demo.denormalized(pixels), arrays, "rgb@224", levels=0, atol=1e-6)


def raw_of_grid(case: str, name: str, tokenizer) -> np.ndarray:
    """[H W C]: what the tokenizer returns for recorded tokens and the recorded first noise."""
    about = read(case, "case.json")
    ids = recorded_tokens(case)[f"{name}.tensor"]
    side = int(len(ids[0]) ** 0.5)
    kind, key = name.split("@")[0], f"randn:{case}:{name}"
    noise = None
    if key in about["randn"]:
        drawn = parity_run.make_checkpoint.noise(about["plan"]["noise_seed"], key, about["randn"][key])
        noise = np.moveaxis(drawn.astype(np.float32), 1, -1)
    steps = next(stage["decoding_steps"] for stage in about["plan"]["stages"] if stage["case"] == case)
    network = tokenizer(MODELS[kind] if kind in MODELS else kind)
    return demo.decode_raw(network, ids.reshape(1, side, side), noise=noise, num_steps=steps)[0]


def check_raw(raw: np.ndarray, arrays, name: str) -> None:
    channels_first, compared = np.moveaxis(raw, -1, 0), 0
    parts = {
        "channels": channels_first[:: max(raw.shape[-1] // 16, 1)][:16],
        "every8": channels_first[:, ::8, ::8],
        "crop": channels_first[:, 100:112, 100:112] if "semseg" in name else channels_first[:, 96:128, 96:128],
    }
    for part, ours in parts.items():
        if f"raw.{name}.{part}" in arrays:
            np.testing.assert_allclose(ours, arrays[f"raw.{name}.{part}"][0], atol=2e-4, rtol=0, err_msg=part)
            compared += 1
    assert compared


def grids(size: int):
    """(case, modality) of all grids of a resolution; the files of a case name them."""
    found = []
    for case in CASES:
        path = Path(PIPELINE / case / "case.json")
        decoded = json.loads(path.read_text())["decoded"] if path.exists() else {}
        found += [(case, name) for name in decoded if name.startswith("tok_") and name.endswith(f"@{size}")]
    return found or [(CASES[0], f"tok_clip@{size}")]


def check_grid(case: str, name: str, tokenizer) -> None:
    arrays, kind = read(case, "outputs.npz"), name.split("@")[0]
    raw = raw_of_grid(case, name, tokenizer)
    check_raw(raw, arrays, name)
    picture = demo.PICTURES[kind](raw)
    if kind == "tok_semseg":  # scores of a few pixels tie up to rounding errors
        same = raw.argmax(-1) == arrays[f"raw.{name}.argmax"][0]
        assert (~same).sum() <= 5
        assert np.abs(np.round(255 * picture) - arrays[f"{name}.u8"])[same].max() <= 1
        np.testing.assert_allclose(
            picture[96:128, 96:128][same[96:128, 96:128]], arrays[f"{name}.crop"][same[96:128, 96:128]], atol=1e-6
        )
    elif kind == "tok_depth":  # a rounding error may choose the neighbour of 256 colours
        same_picture(picture, arrays, name, levels=4, atol=4 / 255)
    else:
        same_picture(picture, arrays, name)
        if f"{name}.exact_pca" in arrays:
            np.testing.assert_allclose(picture, arrays[f"{name}.exact_pca"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(c, n, marks=[pytest.mark.slow] * (c != CASES[0] and n != "tok_rgb@224")) for c, n in grids(224)],
)
def test_grids(case, name, tokenizer):
    check_grid(case, name, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), grids(448))
def test_large_grids(case, name, tokenizer):
    check_grid(case, name, tokenizer)


def test_noise_is_for_diffusion_decoders(tokenizer):
    ids = np.zeros((1, 4, 4), np.int32)
    with pytest.raises(ValueError, match="a diffusion decoder needs noise"):
        demo.decode_raw(tokenizer("tok_edge"), ids)
    with pytest.raises(ValueError, match="others take none"):
        demo.decode_raw(tokenizer("sam_instance"), ids, noise=np.zeros((1, 64, 64, 1), np.float32))


def test_constant_maps_have_a_picture():
    assert np.isfinite(demo.depth_picture(np.ones((8, 8, 1), np.float32))).all()
    assert not demo.feature_picture(np.ones((4, 4, 6), np.float32)).any()
