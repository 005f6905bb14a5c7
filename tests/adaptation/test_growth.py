"""A pretrained model with one modality more: old rows and old answers are the same bits; what else may be trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m4.adaptation.lora import LoRA
from m4.checkpoints.model_file import save_model
from m4.checkpoints.runs import load_run
from m4.checkpoints.warm_start import load_weights
from m4.config import Config, load_config
from m4.distributed.mesh import MeshConfig
from m4.inference.autoregressive import Autoregressive
from m4.inference.parallel import MaskGIT
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage
from m4.model.encoder_decoder import Model
from m4.model.parameters import parameters
from m4.tokens.modality import Features, Grid, Modalities, Sequence
from m4.training.optimizer import OptimizerConfig
from m4.training.trainer import Trainer
from m4_tokenizers.modalities.maps import MapRecipe
from m4_tokenizers.modalities.stored import IdsRecipe, tokenizers_of
from m4_tokenizers.networks.patch_mixing import PatchDecoder, PatchEncoder

NEW = {
    "grid": Grid(name="thermal_tokens", signal="thermal", vocab_size=9, shape=(3, 4)),
    "sequence": Sequence(
        name="words", signal="audio", vocab_size=40, max_length=6, first_sentinel=5, num_sentinels=8, end_id=3
    ),
    "features": Features(name="vectors", signal="vectors", shape=(3, 4), size=5),
}


def trainer_of(small_model, modalities, masking, **optimizer) -> Trainer:
    c = Config(
        name="grown", datasets=(), tokenizers=tuple(IdsRecipe(modality=m) for m in modalities), masking=masking,
        model=small_model, batch_size=4, num_steps=3, optimizer=OptimizerConfig(warmup_steps=1, **optimizer),
    )  # fmt: skip
    return Trainer(c, MeshConfig().make(jax.devices()[:1]))


@pytest.mark.parametrize("kind", NEW)
def test_old_rows_and_outputs_are_the_same_bits(kind, small_model, modalities, masking, make_batch, tmp_path):
    old = Model(small_model, modalities, rngs=nnx.Rngs(7))
    save_model(old, tmp_path / "old.safetensors")
    trainer = trainer_of(small_model, Modalities([*modalities, NEW[kind]]), masking)
    state = trainer.init()
    params, report = load_weights(state.params, trainer.model, tmp_path / "old.safetensors")
    assert not report.missing and not report.mismatched and all(NEW[kind].name in name for name in report.new)
    new = trainer.trained(trainer.with_params(state, params))
    batch = jax.tree.map(jnp.asarray, make_batch(4))
    np.testing.assert_array_equal(new(batch), old(batch))
    for table, rows in old.table_rows.items():
        grown = new.table_rows[table]
        for i in range(len(modalities)):
            a, b = (np.asarray(parameters(nnx.state(m, nnx.Param))[table]) for m in (old, new))
            np.testing.assert_array_equal(a[rows[i] : rows[i + 1]], b[grown[i] : grown[i + 1]])


def test_routed_pairs_follow_their_modalities(small_model, modalities, masking, make_batch, tmp_path):
    """LoRA by modality, grown by a modality that comes first: each keeps its own pairs."""
    routed = dataclasses.replace(small_model, extensions=(LoRA(rank=2, routed=True),))
    old = Model(routed, modalities, rngs=nnx.Rngs(7))
    b = old.decoder.mlp.down.lora.b
    b[...] = jax.random.normal(jax.random.key(0), b.shape)
    save_model(old, tmp_path / "old.safetensors")
    trainer = trainer_of(routed, Modalities([NEW["grid"], *modalities]), masking)
    state = trainer.init()
    params, report = load_weights(state.params, trainer.model, tmp_path / "old.safetensors")
    assert not report.missing and not report.mismatched
    new = trainer.trained(trainer.with_params(state, params))
    batch = jax.tree.map(jnp.asarray, make_batch(4))
    later = batch._replace(
        inputs=batch.inputs._replace(modality=batch.inputs.modality + 1),
        targets=batch.targets._replace(modality=batch.targets.modality + 1),
    )
    np.testing.assert_allclose(new(later), old(batch), atol=1e-5)  # a sum over one route more


def test_nothing_to_train_is_an_error(small_model, modalities, masking):
    with pytest.raises(ValueError, match="leave no parameter to train"):
        _ = trainer_of(small_model, modalities, masking, freeze=("*",)).num_trained


def test_projector_only(small_model, modalities, masking, make_batch):
    """Frozen features of a new modality: their projection and its embedding learn, everything else keeps its bytes."""
    name = next(m.name for m in modalities if isinstance(m, Features))
    train = (f"feature_projections.{name}.*", f"modality_embedding[{name}]")
    trainer = trainer_of(small_model, modalities, masking, train=train, weight_decay=0.5)
    state, batch = trainer.init(), jax.tree.map(jnp.asarray, make_batch(4))
    before = {n: np.array(x) for n, x in parameters(state.params).items()}
    for step in (1, 2, 3):
        state, _ = trainer.step(state, batch, step)
    changed = {n for n, x in parameters(state.params).items() if (np.asarray(x) != before[n]).any()}
    assert changed == {n for n in before if n.startswith(f"feature_projections.{name}.")} | {"modality_embedding"}


def test_a_trained_model_answers_as_before(whole_run):
    """The quickstart's kinds of stages, greedy and drawn, before the first step of a fine-tuning."""
    tiny = load_config("tests/tiny_config.py")
    thermal = MapRecipe(
        signal="thermal", name="thermal_tokens", lowest=0, highest=80, num_steps=3,
        encoder=PatchEncoder(width=18, num_blocks=0), decoder=PatchDecoder(width=18, num_blocks=1),
    )  # fmt: skip
    config = dataclasses.replace(tiny, tokenizers=(*tokenizers_of(str(whole_run)), thermal))
    trainer = Trainer(config, MeshConfig().make(jax.devices()[:1]))
    state = trainer.init()
    params, report = load_weights(state.params, trainer.model, whole_run)
    assert {n.split("[")[-1] for n in report.new} == {"thermal_tokens]"}
    run = load_run(whole_run)
    source = [{"thermal": x} for x in np.random.default_rng(0).uniform(0, 80, (16, 64, 64)).astype(np.float32)]
    grown = Sampler(
        trainer.trained(trainer.with_params(state, params)),
        {**run.tokenizers, "thermal_tokens": thermal.fit(source, seed=0)},
    )
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    plan = [
        Stage(target="depth", scheme=MaskGIT(steps=2, temperature=1.0)),
        Stage(target="caption", scheme=Autoregressive(temperature=1.0)),
    ]
    before, after = (s({"rgb": picture}, plan, seed=3) for s in (Sampler.load(whole_run), grown))
    np.testing.assert_array_equal(before["depth"], after["depth"])
    assert before["caption"] == after["caption"]
