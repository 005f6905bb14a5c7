"""Few-shot evaluation: controls change what they say, baselines see no context, tables hold every figure."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tqdm import tqdm

from m4.data.sources.scenes import Scenes
from m4.evaluation import few_shot as fewshot
from m4.evaluation.base import Report
from m4.evaluation.few_shot import CONTROLS, FewShot, nearest_mean, summary
from m4.in_context.tasks.fast_binding import FastBinding, SceneKinds
from m4.in_context.tasks.operators import OperatorInduction
from m4.in_context.tasks.source import EpisodeSource
from m4.inference.sampler import Sampler
from m4.masking.episodes import Episode, EpisodeMasking, Shot
from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.registry import from_json, to_json
from m4.tokens.modality import Modalities
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.text import TextRecipe

SMALL = FastBinding(
    kinds=SceneKinds(scenes=Scenes(variant="kinds", num_train=200, num_validation=1, num_test=1, num_heldout=250))
)


@pytest.fixture(scope="module")
def sampler():
    source = [{"rgb": np.zeros((64, 64, 3), np.uint8), "caption": "a red cube"}]
    tokenizers = {r.modality.name: r.fit(source, seed=0) for r in (PixelPatchesRecipe(), TextRecipe(max_length=12))}
    modalities = Modalities([t.modality for t in tokenizers.values()])
    config = ModelConfig(width=16, num_heads=2, encoder_depth=1, decoder_depth=1, hidden=16)
    model = Model(config, modalities, rngs=nnx.Rngs(0))
    return Sampler(model, tokenizers, batch_size=8, devices=jax.devices()[:1])


def test_controls_change_what_they_say(data_dir):
    SMALL.prepare(data_dir)
    first, second = (SMALL.draw("test", i, data_dir) for i in range(2))
    rng = np.random.default_rng(0)
    labels = lambda shots: [s.outputs["caption"] for s in shots]  # noqa: E731
    shuffled = CONTROLS["shuffled_labels"](first.shots, rng, second)
    assert sorted(labels(shuffled)) == sorted(labels(first.shots)) and labels(shuffled) != labels(first.shots)
    assert all(a.inputs["rgb"] is b.inputs["rgb"] for a, b in zip(shuffled, first.shots, strict=True))
    other = CONTROLS["shuffled_images"](first.shots[:4], rng, second)
    assert labels(other) == labels(first.shots[:4])
    assert all(a.inputs["rgb"] is b.inputs["rgb"] for a, b in zip(other, second.shots, strict=False))
    bare = CONTROLS["text_only"](first.shots, rng, second)
    assert labels(bare) == labels(first.shots) and not any(s.inputs for s in bare)


def test_images_are_controlled_where_the_answer_is_no_text():
    """Boxes are no images: they stay, and stay with their phrase."""
    box = {"bbox": np.zeros((1, 4), np.float32), "label": ("red cube",)}
    image = np.zeros((2, 2, 3), np.uint8)
    one, two = (Shot(inputs={"rgb": image + i, "caption": "red cube"}, outputs={"boxes": box}) for i in range(2))
    episode = Episode(shots=(two,), query=two)
    (other,), (bare,) = (
        CONTROLS[name]([one], np.random.default_rng(0), episode) for name in ("shuffled_images", "text_only")
    )
    assert other.inputs["rgb"] is two.inputs["rgb"] and other.outputs == bare.outputs == {"boxes": box}
    assert bare.inputs == {"caption": "red cube"}


def test_examples_that_find_no_place_end_the_evaluation(sampler, data_dir):
    episodes = [OperatorInduction(form="text").draw("test", i, data_dir) for i in range(2)]
    shots = [e.shots for e in episodes]
    with pytest.raises(ValueError, match="cannot be measured with so many shots"):
        fewshot.judge(sampler, OperatorInduction(form="text"), episodes, shots, FewShot(), budget=20)


def test_nearest_mean_and_its_shared_covariance():
    """Far apart classes are told by both; where one direction is mere noise within classes, only the second sees so."""
    rng = np.random.default_rng(0)
    centres = np.array([[3.0, 0, 0], [-3.0, 0, 0]])
    shots = np.repeat(centres, 4, axis=0) + rng.normal(size=(8, 3)) * 0.1
    labels = ["a"] * 4 + ["b"] * 4
    for shared in (False, True):
        assert nearest_mean(shots, labels, np.array([2.5, 0, 0]), shared) == "a"
        assert nearest_mean(shots, labels, np.array([-2.5, 0, 0]), shared) == "b"
    noise = np.array([0, 20.0, 0]) * np.tile([1, -1], 4)[:, None]
    skewed = np.repeat(centres, 4, axis=0) + noise + np.repeat([[0, 6.0, 0], [0, -6.0, 0]], 4, axis=0)
    query = np.array([2.8, -9.0, 0])
    assert nearest_mean(skewed, labels, query) == "b" and nearest_mean(skewed, labels, query, shared=True) == "a"


def test_standard_errors():
    assert summary([1.0, 0.0, 1.0, 0.0]) == {"mean": 0.5, "sem": pytest.approx(12**-0.5), "num_queries": 4}


def test_every_condition_is_measured(sampler, data_dir, tmp_path):
    c = FewShot(
        tasks=(SMALL, OperatorInduction(form="text")), shots=(0, 2), num_queries=4, seeds=2, token_counts=(1, 4)
    )
    results = {}
    for task in c.tasks:
        task.prepare(data_dir)
        with tqdm(file=io.StringIO()) as bar:
            results[task.name] = fewshot.evaluate_task(sampler, task, c, str(data_dir), bar)
            assert bar.n == fewshot.num_scores(task, c)
    images, text = results.values()
    controls = {"chance", "shots", "open", "shuffled_labels"}
    assert {*text} == controls
    assert images["chance"]["2"]["mean"] == 1 / 2 and text["chance"]["2"]["mean"] == 1 / 3
    assert {*images} == controls | {"shuffled_images", "text_only", "nearest_mean", "gda", "tokens_1", "tokens_4"}
    assert {*images["shots"]} == {"0", "2"} and {*images["gda"]} == {"2"}
    for conditions in results.values():
        for cells in conditions.values():
            for cell in cells.values():
                assert {*cell} == {"mean", "sem", "num_queries"} and 0 <= cell["mean"] <= 1
                assert cell["num_queries"] == 8
    assert fewshot.table(results, c).count("\n| fast_binding_2way") == 10
    tiles = fewshot.prompts(sampler, c, str(data_dir))
    Report(tmp_path, "scores").write(results, fewshot.table(results, c), {"": fewshot.curves(results, c), "_2": tiles})
    assert json.loads((tmp_path / "scores.json").read_text()) == results
    with Image.open(tmp_path / "scores.png") as picture:
        assert picture.width > 500 and len(np.unique(np.asarray(picture.convert("L")))) > 10
    with Image.open(tmp_path / "scores_2.png") as picture:
        np.testing.assert_array_equal(picture, tiles)
    # 4 examples, the query and the answer; of the first row those with images are coloured, of the second none is.
    assert tiles.shape[1] == 6 * 132 + 4
    coloured = [np.ptp(tiles[20:120, 4 + 132 * i : 132 * (i + 1)], axis=2).max() > 30 for i in range(6)]
    assert coloured == [True] * 5 + [False] and np.ptp(tiles[170:], axis=2).max() == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.json", "scores.md", "scores.png", "scores_2.png"]


def test_settings_are_checked_and_saved():
    c = FewShot(tasks=(FastBinding(ways=5),), num_tokens=4)
    assert from_json(json.loads(json.dumps(to_json(c)))) == c
    with pytest.raises(ValueError, match=r"fast_binding_2way has max_shots=4, and shots=\(0, 1, 2, 4, 8\)"):
        FewShot(tasks=(dataclasses.replace(SMALL, max_shots=4),))
    both = FewShot(tasks=(FastBinding(), FastBinding(ways=5)), num_tokens=(4, 16))
    assert [both.tokens_of(t) for t in both.tasks] == [4, 16] and c.tokens_of(c.tasks[0]) == 4
    with pytest.raises(ValueError, match="one for each of 2 tasks"):
        dataclasses.replace(both, num_tokens=(4,))
    FewShot(tasks=(OperatorInduction(form="interleaved"),))  # 18 items, more than a model has learned addresses
    with pytest.raises(ValueError, match="each task can be measured once"):
        FewShot(tasks=(SMALL, FastBinding()))
    with pytest.raises(ValueError, match="needs tasks"):
        FewShot(tasks=())


def test_a_source_of_episodes_has_the_records_that_masking_expects(data_dir):
    """9 examples of one image: EpisodeMasking's default is FastBinding's."""
    assert EpisodeSource(task=SMALL).records == EpisodeMasking().num_records
