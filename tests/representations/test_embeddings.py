"""Embeddings of the encoder alone: of any subset of signals, whatever the batch; probes read labels from them."""

import jax
import numpy as np
import pytest
from flax import nnx

import m4
from m4.adaptation.registers import Registers
from m4.evaluation import probes
from m4.inference.sampler import Sampler
from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.representations.embed import features
from m4.tokens.modality import Modalities
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.text import TextRecipe


@pytest.fixture(scope="module")
def sampler():
    source = [{"rgb": np.zeros((64, 64, 3), np.uint8), "caption": "a red cube"}]
    tokenizers = {r.modality.name: r.fit(source, seed=0) for r in (PixelPatchesRecipe(), TextRecipe(max_length=12))}
    modalities = Modalities([t.modality for t in tokenizers.values()])
    config = ModelConfig(
        width=16, num_heads=2, encoder_depth=2, decoder_depth=1, hidden=16, extensions=(Registers(num=2),)
    )
    return Sampler(Model(config, modalities, rngs=nnx.Rngs(0)), tokenizers, batch_size=4, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3)).astype(np.uint8))


def test_any_subset_of_signals(sampler, images):
    captions = ["a red cube", None, "red", None, None, "a cube"]
    found = features(sampler, {"rgb": images, "caption": captions})
    assert m4.features is features and found.pooled.shape == (6, 16) and found.tokens.shape[::2] == (6, 16)
    alone = features(sampler, {"rgb": images})
    np.testing.assert_allclose(found.pooled[[1, 3, 4]], alone.pooled[[1, 3, 4]], atol=1e-5)
    assert np.abs(found.pooled[[0, 2, 5]] - alone.pooled[[0, 2, 5]]).max() > 1e-3
    valid = found.inputs.valid
    assert (valid.sum(1) - 64)[[1, 3, 4]].tolist() == [0, 0, 0] and (valid.sum(1)[[0, 2, 5]] > 64).all()
    mean = (found.tokens * valid[..., None]).sum(1) / valid.sum(1)[:, None]
    np.testing.assert_allclose(found.pooled, mean, atol=1e-5)
    assert (found.tokens[~valid] == 0).all()


def test_a_sample_is_the_same_in_any_batch(sampler, images):
    every = features(sampler, {"rgb": images})
    for i in (0, 5):
        one = features(sampler, {"rgb": images[i]})
        np.testing.assert_allclose(one.pooled[0], every.pooled[i], atol=1e-5)


def test_clear_errors(sampler, images):
    with pytest.raises(ValueError, match="non-empty lists of one length"):
        features(sampler, {"rgb": images, "caption": ["a"]})
    with pytest.raises(ValueError, match="sample 1 has no input"):
        features(sampler, {"rgb": [images[0], None]})
    with pytest.raises(ValueError, match="unknown modality 'rgbb'"):
        features(sampler, {"rgbb": images})


def test_probes_read_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    known = np.eye(3)[labels] + rng.normal(size=(600, 3)) * 0.2
    noise = rng.normal(size=(600, 8))
    for x, low, high in ((known, 0.95, 1.0), (noise, 0.2, 0.47)):
        found = probes.accuracies(x[:400], labels[:400], x[400:], labels[400:], np.arange(len(x) - 400))
        for cell in found.values():
            assert low <= cell["mean"] <= high and 0 <= cell["sem"] < 0.04
    # What only a linear map sees: one informative direction among louder ones.
    hidden = np.concatenate([known * 0.1, rng.normal(size=(600, 40)) * 5], axis=1)
    found = probes.accuracies(hidden[:400], labels[:400], hidden[400:], labels[400:], np.arange(len(x) - 400))
    assert found["linear"]["mean"] > 0.85 > found["k-NN"]["mean"]
