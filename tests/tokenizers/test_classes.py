"""Classes as tokens: labels there and back; their measures against counts by hand; evaluations on several data sets."""

import dataclasses

import numpy as np
import pytest

from m4.config import load_config
from m4.data.dataset import Dataset
from m4.data.sources.scenes import Scenes
from m4.data.sources.thermal import ThermalScenes
from m4.evaluation.conditional_generation import ConditionalGeneration, ConditionalTask
from m4.evaluation.gallery import stacked
from m4.evaluation.measures.classes import ClassAccuracy, ClassMapAccuracy
from m4.evaluation.measures.depth import DepthAccuracy
from m4.evaluation.measures.maps import MapAccuracy
from m4.inference.parallel import MaskGIT
from m4.tokens.tokenizer import load_tokenizer, save_tokenizer
from m4_tokenizers.modalities.classes import ClassRecipe
from m4_tokenizers.modalities.maps import MapRecipe


def test_labels_there_and_back(tmp_path):
    tokenizer = ClassRecipe(classes=("cat", "dog", "newt")).fit([], seed=0)
    ids = tokenizer.encode(["newt", "cat"])
    assert [x.tolist() for x in ids] == [[2], [0]] and tokenizer.decode(ids) == ["newt", "cat"]
    assert tokenizer.modality.vocab_size == 3 and tokenizer.modality.max_tokens == 1
    save_tokenizer(tokenizer, tmp_path / "category.safetensors")
    loaded = load_tokenizer(tmp_path / "category.safetensors")
    assert loaded.recipe == tokenizer.recipe and loaded.read("dog") == "dog"
    loaded.write("dog", tmp_path, image=None)
    assert (tmp_path / "category.txt").read_text() == "dog\n"
    assert loaded.draw("dog", image=None).shape == (128, 128, 3)
    with pytest.raises(ValueError, match="no class 'dgo'.*dog"):
        loaded.read("dgo")
    with pytest.raises(ValueError, match="at least two"):
        ClassRecipe(classes=("cat",))


def test_measures_by_hand():
    train = [{"category": c} for c in ("cat", "cat", "dog")]
    measure = ClassAccuracy()
    assert measure.score(["cat", "cat", "dog"], train)["value"] == 1
    assert measure.baseline(train, [{"category": c} for c in ("cat", "dog", "dog", "dog")])["value"] == 0.25
    truth, found = np.array([[0, 1], [2, 2]]), np.array([[1, 1], [2, 0]])
    score = ClassMapAccuracy().score([found], [{"semseg": truth}])
    assert score == {"value": 2 / 4, "foreground": 2 / 4}
    assert ClassMapAccuracy().baseline([{"semseg": truth}], [{"semseg": truth}])["value"] == 1


def test_the_best_constant_is_a_baseline_of_maps():
    """Of values spread around two, the more frequent one, though the mean lies between them."""
    rng = np.random.default_rng(0)
    maps = [np.where(rng.random((8, 8)) < 0.7, 20.0, 60.0) + rng.uniform(-1, 1, (8, 8)) for _ in range(20)]
    examples = [{"heat": m} for m in maps]
    measure = MapAccuracy(signal="heat", tolerance=1.0)
    assert measure.baseline(examples, examples)["value"] == pytest.approx(0.7, abs=0.05)


def test_each_direction_has_its_data_set(tmp_path):
    few = {"num_train": 4, "num_validation": 3, "num_test": 5, "num_heldout": 2}
    scheme = MaskGIT(steps=1)
    depth = ConditionalTask(name="depth", inputs=("rgb",), target="depth", scheme=scheme, metric=DepthAccuracy())
    thermal = MapAccuracy(signal="thermal", tolerance=2)
    heat = ConditionalTask(name="heat", inputs=("rgb",), target="thermal", scheme=scheme, metric=thermal)
    tiny = load_config("tests/tiny_config.py")
    recipe = MapRecipe(signal="thermal", name="thermal_tokens", lowest=0, highest=80)
    config = dataclasses.replace(
        tiny,
        tokenizers=(*tiny.tokenizers, recipe),
        datasets=(Dataset(source=Scenes(**few)), Dataset(source=ThermalScenes(seed=1, **few), name="camera")),
        evaluators=(
            ConditionalGeneration(tasks=(depth, heat, dataclasses.replace(depth, name="there", dataset="camera"))),
        ),
        data_dir=str(tmp_path),
    )
    config.check()
    (first, splits, train), (second, others, _) = config.evaluators[0].examples(config)
    assert [d.name for d in first] == ["depth"] and [d.name for d in second] == ["heat", "there"]
    assert len(splits["test"]) == 5 and len(train) == 4 and "thermal" in others["test"][0]
    task = dataclasses.replace(depth, dataset="camra")
    wrong = dataclasses.replace(config, evaluators=(ConditionalGeneration(tasks=(task,)),))
    with pytest.raises(ValueError, match="no data set 'camra'.*camera"):
        wrong.check()
    nowhere = dataclasses.replace(config, datasets=config.datasets[:1])
    with pytest.raises(ValueError, match="no data set has raw examples.*heat: rgb, thermal"):
        ConditionalGeneration(tasks=(heat,)).examples(nowhere)


def test_sheets_one_below_the_other():
    sheet = stacked([np.zeros((2, 3, 3), np.uint8), np.zeros((1, 5, 3), np.uint8)])
    assert sheet.shape == (3, 5, 3) and (sheet[:2, 3:] == 255).all() and not sheet[2].any()
