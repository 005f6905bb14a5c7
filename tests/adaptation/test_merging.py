"""Models between two: their ends, tables by modality, a sweep that keeps the best; scores from before a fine-tuning."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m4.adaptation.bottleneck import Bottleneck
from m4.adaptation.interpolation import interpolate
from m4.adaptation.lora import LoRA
from m4.checkpoints.runs import load_run
from m4.commands.merge import sweep
from m4.evaluation.base import evaluate
from m4.files import read_json, write_json
from m4.model.encoder_decoder import Model
from m4.model.parameters import parameters
from m4.tokens.modality import Grid, Modalities


def arrays(model) -> dict[str, np.ndarray]:
    return {n: np.asarray(x) for n, x in parameters(nnx.state(model, nnx.Param)).items()}


def test_ends_and_middle(small_model, modalities, make_batch):
    a, b = (Model(small_model, modalities, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    first, second = arrays(a), arrays(b)
    for alpha in (0.0, 0.25, 1.0):
        for name, x in arrays(interpolate(a, b, alpha)).items():
            np.testing.assert_allclose(x, (1 - alpha) * first[name] + alpha * second[name], atol=1e-7)
    batch = jax.tree.map(jnp.asarray, make_batch(2))
    np.testing.assert_array_equal(interpolate(a, b, 1.0)(batch), b(batch))


def test_a_modality_of_the_second_alone_stays(small_model, modalities):
    more = Modalities([Grid(name="infrared", signal="infrared", vocab_size=5, shape=(2, 2)), *modalities])
    a, b = Model(small_model, modalities, rngs=nnx.Rngs(0)), Model(small_model, more, rngs=nnx.Rngs(1))
    mixed, own = arrays(interpolate(a, b, 0.0)), arrays(b)
    np.testing.assert_array_equal(mixed["token_embedding"][:5], own["token_embedding"][:5])
    np.testing.assert_array_equal(mixed["token_embedding"][5:], arrays(a)["token_embedding"])
    np.testing.assert_array_equal(mixed["mask_token"], arrays(a)["mask_token"])
    with pytest.raises(ValueError, match=r"do not have the same parameters.*token_embedding\[infrared\]"):
        interpolate(b, a, 0.5)


def test_lora_is_merged_before(small_model, modalities, make_batch):
    """The ends are the two models' functions; what one has by its own has no middle."""
    batch = jax.tree.map(jnp.asarray, make_batch(2))
    a = Model(small_model, modalities, rngs=nnx.Rngs(0))
    b = Model(dataclasses.replace(small_model, extensions=(LoRA(rank=2),)), modalities, rngs=nnx.Rngs(0))
    pair = b.decoder.mlp.down.lora.b
    pair[...] = jax.random.normal(jax.random.key(0), pair.shape)
    for alpha, end in ((0.0, a), (1.0, b)):
        np.testing.assert_allclose(interpolate(a, b, alpha)(batch), end(batch), atol=1e-5)
    with_adapters = Model(
        dataclasses.replace(small_model, extensions=(Bottleneck(size=2),)), modalities, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="different extensions"):
        interpolate(a, with_adapters, 0.5)
    other = Model(dataclasses.replace(small_model, num_heads=4), modalities, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="different num_heads"):
        interpolate(a, other, 0.5)


def test_a_sweep_scores_and_keeps_the_best(whole_run, tmp_path, monkeypatch):
    results = sweep(whole_run, whole_run, [0, 1], tmp_path / "merged")
    scores = {k: r["normalised"] for k, r in json.loads((whole_run / "metrics.json").read_text()).items()}
    scores = {name: x for name, x in scores.items() if "_heldout" not in name}
    assert results["test"]["0"] == results["test"]["1"] == pytest.approx(scores)
    assert results["validation"]["0"] == results["validation"]["1"] != results["test"]["0"]
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == [
        "config.json", "digests.json", "merge.json", "merge.md", "merge.png", "model.safetensors", "tokenizers",
    ]  # fmt: skip
    own, kept = (arrays(load_run(run).model) for run in (whole_run, tmp_path / "merged"))
    for name, x in own.items():
        np.testing.assert_array_equal(x, kept[name])
    with pytest.raises(ValueError, match="alphas must be finite"):
        sweep(whole_run, whole_run, [float("nan")], tmp_path / "none")


@pytest.mark.slow  # two evaluations of a run
def test_scores_from_before_a_fine_tuning(whole_run, tmp_path, capsys):
    run = tmp_path / "tuned"
    shutil.copytree(whole_run, run)
    (run / ".evaluated.json").unlink()
    config = read_json(run / "config.json")
    for began_from, said in ((str(whole_run), "before"), (str(tmp_path / "gone"), "no scores from before")):
        write_json(run / "config.json", {**config, "init_from": began_from})
        results = evaluate(run, "directions")
        assert said in capsys.readouterr().out
        for r in results.values():
            assert ("before" in r) == (said == "before")
            if "before" in r:
                assert r["before"] == pytest.approx(r["normalised"])
        (run / ".evaluated.json").unlink()
