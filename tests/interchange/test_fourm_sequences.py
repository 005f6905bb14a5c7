"""4M's people and instances as tokenizers: texts there and back, and what they say as files."""

import json

import numpy as np
import parity_run
import pytest
from conftest import PARITY
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from m4.tokens.tokenizer import load_tokenizer, save_tokenizer, tokenizer_hash
from m4_tokenizers.interchange.fourm_decoding import Person
from m4_tokenizers.interchange.fourm_sequences import (
    OFFSETS,
    PARENTS,
    ReleasedInstancesRecipe,
    ReleasedPeopleRecipe,
    draw_people,
    joints,
    run_lengths,
)

PIPELINE, TEXT = PARITY / "pipeline", PARITY / "text/text_tokenizer_4m_wordpiece_30k.json"
RECIPES = {"human_poses": ReleasedPeopleRecipe, "sam_instance": ReleasedInstancesRecipe}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    if not PIPELINE.is_dir() or not TEXT.is_file():
        pytest.skip("no fixture pipeline: set M4_PARITY to the folder of parity fixtures")
    root, made = tmp_path_factory.mktemp("parts"), {}
    for name, recipe in RECIPES.items():
        spec = json.loads((PIPELINE / "models" / name / "state_dict.json").read_text())
        presets = spec["presets"] if "presets" in spec else {}
        parts = parity_run.converted_tokenizer(PIPELINE / "models" / name, {"presets": presets})
        save_tokenizer(parts, root / f"{name}.safetensors")
        made[name] = recipe(path=str(TEXT), parts=str(root / f"{name}.safetensors")).fit([], seed=0)
    return made


def texts(kind: str):
    """(ids, text) of the fixtures' sequences that end once, at their end."""
    cases, results = (json.loads((PIPELINE / f"sequences/{n}.json").read_text()) for n in ("cases", "results"))
    pairs = zip(cases["sequences"], results["sequences"], strict=True)
    chosen = [(c["ids"], r["decoded_text"].removesuffix(" [EOS]")) for c, r in pairs if c["kind"] == kind]
    return [(ids, text) for ids, text in chosen if ids.count(3) == 1 and ids[-1] == 3 and "[" not in text and text]


@pytest.mark.parametrize("name", [*RECIPES])
def test_texts_are_encoded_and_decoded(name, tokenizers, tmp_path):
    tokenizer, pairs = tokenizers[name], texts(name)
    assert len(pairs) >= 4
    for ids, text in pairs:
        assert tokenizer.decode([np.array(ids)]) == [text]
        if len(ids) <= tokenizer.modality.max_length:
            np.testing.assert_array_equal(tokenizer.encode([text])[0], ids)
    save_tokenizer(tokenizer, tmp_path / "a.safetensors")
    again = load_tokenizer(tmp_path / "a.safetensors")
    save_tokenizer(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert again.decode([np.array(pairs[0][0])]) == [pairs[0][1]]


def test_people_are_written_and_drawn(tokenizers, tmp_path):
    tokenizer, image = tokenizers["human_poses"], np.full((224, 224, 3), 255, np.uint8)
    (text,) = [text for _, text in texts("human_poses") if len(tokenizer.people(text)) == 2][:1]
    tokenizer.write(text, tmp_path, image=image)
    assert (tmp_path / "poses.txt").read_text() == text + "\n"
    people = json.loads((tmp_path / "poses.json").read_text())
    assert len(people) == 2 and np.shape(people[0]["body_pose"]) == (1, 23, 3, 3)
    np.testing.assert_allclose(people[1]["betas"], tokenizer.people(text)[1].betas, rtol=1e-6)
    with Image.open(tmp_path / "poses.png") as picture:
        drawn = np.asarray(picture)
    assert drawn.shape == (224, 224, 3) and 50 < (drawn != 255).any(-1).sum() < 20_000
    assert (draw_people([], image) == image).all()


def test_instances_are_written_and_drawn(tokenizers, tmp_path):
    tokenizer = tokenizers["sam_instance"]
    text = max((text for _, text in texts("sam_instance")), key=lambda t: len(tokenizer.masks(t)[0]))
    tokenizer.write(text, tmp_path, image=None)
    boxes, masks = tokenizer.masks(text)
    found = json.loads((tmp_path / "instances.json").read_text())
    assert len(found) == len(masks) > 1
    for item, box, mask in zip(found, boxes, masks, strict=True):
        np.testing.assert_array_equal(item["bbox"], box)
        np.testing.assert_array_equal(filled(item["segmentation"]), mask)
        rows, columns = np.nonzero(mask)
        assert rows.min() >= box[1] and rows.max() < box[3] and columns.min() >= box[0] and columns.max() < box[2]
    with Image.open(tmp_path / "instances.png") as picture:
        assert ((np.asarray(picture) != 0).any(-1) == masks.any(0)).all()


def filled(segmentation: dict) -> np.ndarray:
    values = np.arange(len(segmentation["counts"])) % 2 == 1
    return np.repeat(values, segmentation["counts"]).reshape(segmentation["size"], order="F")


@given(mask=arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=60, deadline=None)
def test_run_lengths_hold_the_mask(mask):
    np.testing.assert_array_equal(filled(run_lengths(mask)), mask)


def test_joints_of_the_rest_pose_are_those_of_the_body():
    """Without rotations every bone is where the body has it; a turned pelvis turns all; a knee turns what is below."""
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    still = np.broadcast_to(np.eye(3, dtype=np.float32), (1, 24, 3, 3)).copy()

    def of(rotations) -> np.ndarray:
        zeros = [np.zeros(shape, np.float32) for shape in ((1, 10), (1, 3), (4,), (1, 2), ())]
        betas, camera, box, center, size = zeros
        return joints(Person(rotations[:, :1], betas, rotations[:, 1:], camera, box, center, size))

    rest = of(still)
    for joint, parent in enumerate(PARENTS[1:], 1):
        np.testing.assert_allclose(rest[joint] - rest[parent], OFFSETS[joint])
    np.testing.assert_allclose(of(np.concatenate([turn[None, None], still[:, 1:]], axis=1)), rest @ turn.T, atol=1e-6)
    knee = still.copy()
    knee[0, 4] = turn
    below = [4 in ancestors(joint) for joint in range(24)]
    np.testing.assert_array_equal(np.abs(of(knee) - rest).max(1) > 1e-6, below)


def ancestors(joint: int) -> set[int]:
    return set() if joint <= 0 else {PARENTS[joint]} | ancestors(PARENTS[joint])
