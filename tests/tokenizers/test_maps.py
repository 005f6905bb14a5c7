"""Maps of any quantity: units, errors, pictures; the thermal camera of the scenes."""

import numpy as np
import pytest

from m4.data.sources import thermal as camera
from m4.data.sources.rendering import scene
from m4.data.sources.scenes import Scenes
from m4.data.sources.thermal import ThermalScenes, thermal
from m4.evaluation.measures.maps import MapAccuracy
from m4_tokenizers.modalities.maps import MapRecipe, MapTokenizer
from m4_tokenizers.networks.patch_mixing import PatchEncoder

RECIPE = {"signal": "thermal", "name": "thermal_tokens", "lowest": 0, "highest": 80, "units": "degrees Celsius"}
TINY = {"encoder": PatchEncoder(num_blocks=0), "num_steps": 60, "batch_size": 16, "log_every": 60, "save_every": 60}


@pytest.fixture(scope="module")
def examples() -> list[dict]:
    scenes = [scene("simple", 0, "test", i) for i in range(60)]
    return [{**e, "thermal": thermal(e["depth"], e["instance"], e["objects"])} for e in scenes]


@pytest.fixture(scope="module")
def tokenizer(examples) -> MapTokenizer:
    return MapRecipe(**RECIPE, **TINY).fit(examples, seed=0)


def test_arrays_and_back():
    recipe = MapRecipe(**{**RECIPE, "lowest": -10, "highest": 30}, channels=3, image_size=16)
    maps = np.random.default_rng(0).uniform(-10, 30, (2, 16, 16, 3)).astype(np.float32)
    arrays = recipe.to_arrays(list(maps))
    assert arrays.shape == (2, 16, 16, 3) and arrays.min() >= -1 and arrays.max() <= 1
    np.testing.assert_allclose(recipe.to_signals(arrays), maps, atol=1e-4)
    clipped = recipe.to_signals(recipe.to_arrays([maps[0] + 20]))[0]
    np.testing.assert_allclose(clipped, np.minimum(maps[0] + 20, 30), atol=1e-4)


def test_a_tokenizer_learns_temperatures(tokenizer, examples, tmp_path):
    card = tokenizer.card
    assert card["mean_error"] < card["baseline"]["mean_error"] / 2 if "baseline" in card else card["mean_error"] < 5
    ids = tokenizer.encode([e["thermal"] for e in examples[:3]])
    assert [x.shape for x in ids] == [(64,)] * 3
    decoded = tokenizer.decode(ids)
    assert decoded[0].shape == (64, 64) and decoded[0].dtype == np.float32
    tokenizer.write(decoded[0], tmp_path, image=None)
    np.testing.assert_array_equal(tokenizer.read(str(tmp_path / "thermal.npy")), decoded[0])
    hot, cold = (tokenizer.draw(np.full((64, 64), t, np.float32), image=None)[0, 0] for t in (79, 1))
    assert hot.astype(int).sum() > 2 * cold.astype(int).sum()
    np.testing.assert_allclose(tokenizer.average([decoded[0], decoded[0] + 2]), decoded[0] + 1, atol=1e-4)


def test_clear_errors():
    recipe = MapRecipe(**RECIPE)
    flat = np.full((64, 64), 20, np.float32)
    with pytest.raises(ValueError, match=r"a map of thermal of \[32, 64\] was given; allowed: \[64, 64\]"):
        recipe.to_arrays([flat[:32]])
    with pytest.raises(ValueError, match="not finite"):
        recipe.to_arrays([np.where(np.eye(64) > 0, np.nan, flat)])
    with pytest.raises(ValueError, match="a median of 293.*degrees Celsius from 0 to 80.*units"):
        recipe.to_arrays([flat + 273])
    with pytest.raises(ValueError, match="lowest < highest"):
        MapRecipe(**{**RECIPE, "highest": -1})


def test_what_a_thermal_camera_sees(examples):
    """Large is warmer than small at one distance, near is warmer than far, nothing is colder than the air."""
    depth, instance = np.array([[2.0, 2.0, 8.0, 0.0]], np.float32), np.array([[1, 2, 2, 0]])
    objects = [{"material": "matte", "size": "small"}, {"material": "matte", "size": "large"}]
    small, large, far, sky = thermal(depth, instance, objects)[0]
    assert large > small > camera.AIR and large > far > camera.AIR and sky == camera.AIR
    for e in examples[:10]:
        assert e["thermal"].dtype == np.float32 and e["thermal"].min() >= camera.AIR
        assert e["thermal"][e["instance"] > 0].min() > e["thermal"][e["instance"] == 0].max() - camera.GROUND_HEAT


def test_accuracy_of_maps(examples):
    measure = MapAccuracy(signal="thermal", tolerance=2.0)
    truth = [e["thermal"] for e in examples]
    assert measure.score(truth, examples) == {"value": 1.0, "mean_error": 0.0}
    assert measure.score([t + 3 for t in truth], examples)["value"] == 0.0
    assert 0 <= measure.baseline(examples, examples)["value"] < 0.6


def test_thermal_scenes_are_the_scenes_and_lie_beside_them(examples, tmp_path):
    counts = {"num_train": 2, "num_validation": 1, "num_test": 2, "num_heldout": 1}
    source, plain = ThermalScenes(**counts), Scenes(**counts)
    assert source.folder(tmp_path) == plain.folder(tmp_path)
    source.prepare(tmp_path)
    warm, known = source.split("test", tmp_path), plain.split("test", tmp_path)
    for i, e in enumerate(examples[:2]):
        np.testing.assert_array_equal(warm[i]["thermal"], e["thermal"])
        assert "thermal" not in known[i]
        np.testing.assert_array_equal(warm[i]["rgb"], known[i]["rgb"])
