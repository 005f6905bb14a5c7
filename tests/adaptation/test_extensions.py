"""Extensions change the model by files of their own: what was there keeps its bits, and what they add is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mask_keys
from flax import nnx

from m4.adaptation.adapter_files import load_adapter, save_adapter
from m4.adaptation.bottleneck import Bottleneck
from m4.adaptation.lora import LoRA
from m4.config import Config
from m4.data.dataset import Dataset
from m4.distributed.mesh import MeshConfig, shard_batch
from m4.in_context.example_encoder import ExampleEncoder
from m4.in_context.independent_items import IndependentItems
from m4.in_context.similarity_prior import SimilarityPrior
from m4.model.blocks import Block
from m4.model.encoder_decoder import Model
from m4.model.extensions import Extension
from m4.model.layers import Linear
from m4.model.parameters import matches_pattern, parameters
from m4.objectives.base import Objective
from m4.objectives.masked_modeling import MaskedModeling
from m4.tokens.batch import normalized
from m4.training.optimizer import OptimizerConfig
from m4.training.trainer import Trainer
from m4_tokenizers.modalities.stored import IdsRecipe


class Offset(nnx.Module):
    """Of each token by its modality: a user's own part of a linear map."""

    per_token = True

    def __init__(self, num_modalities, num_out, rngs):
        self.rows = nnx.Param(0.1 * jax.random.normal(rngs.extensions(), (num_modalities, num_out)))

    def __call__(self, x, info):
        return jnp.where((info.modality >= 0)[:, None], self.rows[...][info.modality], 0).astype(x.dtype)


class Gain(nnx.Module):
    """A factor, and the size of what it is taken of: a user's own part of a block."""

    def __init__(self):
        self.gain = nnx.Param(jnp.ones(()))

    def __call__(self, x, inputs):
        return x * self.gain[...], {"size": jnp.square(x).mean()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Extension):
    parameters = ("*.offset.*", "*.gain.*")

    @property
    def parameters_by_modality(self):
        return ("*.offset.*",)

    def wrap(self, module, config, num_modalities, rngs):
        if isinstance(module, Linear):
            module.add("offset", Offset(num_modalities, module.kernel.shape[1], rngs))
        if isinstance(module, Block):
            module.add("gain", Gain())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizePenalty(Objective):
    """Reads what the blocks return besides."""

    name = "size"

    def __call__(self, outputs, part, totals, loaded):
        sizes = [outputs.auxiliary["size"], outputs.context.auxiliary["size"]]
        return 1e-3 * sum(x.sum() for x in sizes), {"size/blocks": jnp.float32(sum(x.size for x in sizes))}


EXTENSIONS = {
    "lora": LoRA(rank=2),
    "routed": LoRA(rank=2, routed=True),
    "bottleneck": Bottleneck(size=3),
    "independent": IndependentItems(num_blocks=1),
    "encoder": ExampleEncoder(),
    "prior": SimilarityPrior(size=4),
    "mine": Mine(),
}


@pytest.fixture
def config(small_model):
    return dataclasses.replace(small_model, encoder_depth=2, decoder_depth=2)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_the_models_own_parameters_keep_their_bits(name, config, modalities):
    plain = parameters(nnx.state(Model(config, modalities, rngs=nnx.Rngs(0)), nnx.Param))
    wider = dataclasses.replace(config, extensions=(EXTENSIONS[name],))
    extended = parameters(nnx.state(Model(wider, modalities, rngs=nnx.Rngs(0)), nnx.Param))
    for parameter, x in plain.items():
        np.testing.assert_array_equal(extended[parameter], x)
    own = {*extended} - {*plain}
    assert own == {n for n in extended if any(matches_pattern(n, p) for p in EXTENSIONS[name].parameters)}


def test_all_of_them_together(config, modalities, make_batch):
    names = [name for name in EXTENSIONS if name != "routed"]
    together = dataclasses.replace(config, extensions=tuple(EXTENSIONS[name] for name in names))
    model, batch = Model(together, modalities, rngs=nnx.Rngs(0)), normalized(make_batch(4), modalities)
    stacked = model(batch)
    model.unstack()
    outputs = model.outputs(batch)
    np.testing.assert_allclose(outputs.hidden, stacked, atol=1e-5)
    assert outputs.auxiliary["size"].shape == outputs.context.auxiliary["size"].shape == (2,)
    with pytest.raises(ValueError, match="extensions=.*must be of different classes"):
        dataclasses.replace(config, extensions=(LoRA(), LoRA(rank=2)))


def test_a_users_own_is_trained_saved_and_loaded_alone(config, modalities, make_example, tmp_path):
    c = Config(
        name="mine",
        datasets=(Dataset(tokens="nothing"),),
        tokenizers=tuple(IdsRecipe(modality=m) for m in modalities),
        masking=masking(modalities),
        model=dataclasses.replace(config, extensions=(Mine(),)),
        objectives=(MaskedModeling(), SizePenalty()),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, train=Mine.parameters),
        batch_size=8,
        num_steps=3,
    )
    c.check()
    results = []
    for axes in ({"data": 1}, {"data": 2, "fsdp": 2}):
        mesh = MeshConfig(**axes).make(jax.devices()[: int(np.prod([*axes.values()]))])
        trainer = Trainer(c, mesh)
        state = trainer.init()
        before = jax.device_get(parameters(state.params))
        batch = c.masking([make_example(i) for i in range(8)], modalities, mask_keys(8))
        for step in (1, 2, 3):
            with jax.set_mesh(mesh):
                state, scalars = trainer.step(state, shard_batch(batch, mesh), step)
        assert scalars["size/blocks"] == 4
        after = jax.device_get(parameters(state.params))
        changed = {n for n, x in after.items() if (x != before[n]).any()}
        assert changed and all(any(matches_pattern(n, p) for p in Mine.parameters) for n in changed)
        results.append(after)
    for name, x in results[0].items():
        np.testing.assert_allclose(results[1][name], x, atol=5e-4)  # Adam: gradients near zero move as far as others
    tuned = nnx.merge(nnx.graphdef(trainer.model), jax.device_get(state.params))
    save_adapter(tuned, tmp_path / "mine.safetensors")
    fresh = Model(c.model, modalities, rngs=nnx.Rngs(0))
    loaded = parameters(nnx.state(load_adapter(fresh, tmp_path / "mine.safetensors"), nnx.Param))
    assert any(".offset." in name for name in changed)
    for name in changed:
        np.testing.assert_array_equal(loaded[name], after[name])


def masking(modalities):
    from m4.masking.dirichlet import Masking, Strategy
    from m4.tokens.modality import Features

    targets = {m.name: 1.0 for m in modalities if not isinstance(m, Features)}
    strategy = Strategy(inputs={m.name: 1.0 for m in modalities}, targets=targets)
    return Masking(num_inputs=16, num_targets=16, strategies=(strategy,))
