"""LoRA and adapters: nothing changes at first, merging is exact, each token takes its own modality's pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m4.adaptation.adapter_files import load_adapter, save_adapter
from m4.adaptation.bottleneck import Bottleneck
from m4.adaptation.lora import LoRA
from m4.adaptation.merge import merge_extensions
from m4.config import Config
from m4.distributed.mesh import MeshConfig
from m4.model.encoder_decoder import Model
from m4.model.parameters import parameters
from m4.tensor_file import TensorFile
from m4.training.optimizer import OptimizerConfig
from m4.training.trainer import Trainer
from m4_tokenizers.modalities.stored import IdsRecipe

KINDS = {
    "lora": {"extensions": (LoRA(rank=2),)},
    "routed": {"extensions": (LoRA(rank=2, routed=True),)},
    "adapter": {"extensions": (Bottleneck(size=3),)},
    "gelu": {"extensions": (LoRA(rank=2, routed=True),), "mlp": "gelu"},
}


@pytest.fixture(scope="module")
def batch(make_batch):
    return jax.tree.map(jnp.asarray, make_batch(4))


def model_with(small_model, modalities, **options) -> Model:
    return Model(dataclasses.replace(small_model, **options), modalities, rngs=nnx.Rngs(0))


def trained(model: Model, seed: int = 0) -> Model:
    """As if it had been fine-tuned: what was zero is not."""
    model, rng = nnx.clone(model), np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-2:] == ("lora", "b") or path[-2:] == ("adapter", "up"):
            x = variable[...]
            nnx.update(
                model, nnx.from_flat_state([(path, variable.replace(jnp.asarray(rng.normal(size=x.shape), x.dtype)))])
            )
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_first(kind, small_model, modalities, batch):
    options = KINDS[kind]
    plain = {k: v for k, v in options.items() if k == "mlp"}
    before = model_with(small_model, modalities, **plain)
    after = model_with(small_model, modalities, **options)
    shared = dict(nnx.to_flat_state(nnx.state(after, nnx.Param)))
    for path, variable in nnx.to_flat_state(nnx.state(before, nnx.Param)):
        np.testing.assert_array_equal(variable[...], shared[path][...], err_msg=str(path))
    np.testing.assert_array_equal(after(batch), before(batch))
    assert np.abs(np.asarray(trained(after)(batch)) - np.asarray(before(batch))).max() > 1e-2


def test_blocks_have_pairs_of_their_own(small_model, modalities):
    a = np.asarray(model_with(small_model, modalities, **KINDS["lora"]).encoder.attention.query.lora.a[...])
    assert not np.array_equal(a[0], a[1])


def test_merging_is_exact(small_model, modalities, batch):
    model = trained(model_with(small_model, modalities, **KINDS["lora"]))
    without = merge_extensions(model)
    assert without.config.extensions == ()
    np.testing.assert_allclose(without(batch), model(batch), atol=1e-5)
    with pytest.raises(ValueError, match="only what is the same for all tokens"):
        merge_extensions(model_with(small_model, modalities, **KINDS["routed"]))
    with pytest.raises(ValueError, match="extensions="):
        merge_extensions(without)


def test_each_token_takes_the_pair_of_its_modality(small_model, modalities, batch):
    """A change to one modality's pairs leaves hidden vectors that do not see it as they were, bit for bit."""
    model = model_with(small_model, modalities, **KINDS["routed"])
    for i, m in enumerate(modalities):
        if not m.is_target:
            continue
        changed = nnx.clone(model)
        b = changed.decoder.mlp.down.lora.b
        # The last block: no other token sees the change. Not the same in all numbers, which the norm would take away.
        b[...] = b[...].at[-1, i].set(jnp.linspace(-1, 1, b.shape[-1])[None])
        before, after = (np.asarray(x(batch)) for x in (model, changed))
        is_own = np.asarray(batch.targets.modality) == i
        valid = np.asarray(batch.targets.valid)
        np.testing.assert_array_equal(before[~is_own & valid], after[~is_own & valid])
        if (is_own & valid).any():
            assert (before[is_own & valid] != after[is_own & valid]).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_alone(kind, small_model, modalities, batch, tmp_path):
    base = model_with(small_model, modalities, **KINDS[kind])
    tuned = trained(base)
    save_adapter(tuned, tmp_path / "small.safetensors")
    whole = sum(x.nbytes for x in jax.tree.leaves(nnx.state(base, nnx.Param)))
    assert (tmp_path / "small.safetensors").stat().st_size < whole
    loaded = load_adapter(base, tmp_path / "small.safetensors")
    np.testing.assert_array_equal(loaded(batch), tuned(batch))
    plain = model_with(small_model, modalities)
    with pytest.raises(ValueError, match="unknown"):
        load_adapter(plain, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="no extensions whose parameters"):
        save_adapter(plain, tmp_path / "none.safetensors")


def test_rows_travel_with_lora(small_model, modalities, batch, tmp_path):
    """What `train` would choose: LoRA, and one modality's rows of every table, for a model that has neither trained."""
    tuned = trained(model_with(small_model, modalities, **KINDS["lora"]))
    rows = slice(*tuned.table_rows["token_embedding"][1:3])
    tuned.token_embedding[...] = tuned.token_embedding[...].at[rows].add(1.0)
    patterns = ("*.lora.*", f"*[{modalities.names[1]}]")
    save_adapter(tuned, tmp_path / "small.safetensors", patterns)
    arrays = TensorFile.read(tmp_path / "small.safetensors").entries
    assert all(".lora." in name or name.endswith(f"[{modalities.names[1]}]") for name in arrays)
    loaded = load_adapter(model_with(small_model, modalities, **KINDS["lora"]), tmp_path / "small.safetensors")
    np.testing.assert_array_equal(loaded(batch), tuned(batch))
    other = model_with(small_model, modalities, extensions=(LoRA(rank=2, alpha=1.0),))
    with pytest.raises(ValueError, match="was trained with .*LoRA"):
        load_adapter(other, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"nothing.\* fits no parameter"):
        save_adapter(tuned, tmp_path / "none.safetensors", ("*.lora.*", "nothing.*"))


# ---- What is trained ------------------------------------------------------------------------------------------------


def steps_of(small_model, modalities, masking, batch, num_steps=3, **optimizer):
    """Parameters by name before and after some steps, and how many were said to be trained."""
    c = Config(
        name="part", datasets=(), tokenizers=tuple(IdsRecipe(modality=m) for m in modalities), masking=masking,
        model=small_model, batch_size=4, num_steps=num_steps, average_decay=0.9,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.5, **optimizer),
    )  # fmt: skip
    trainer = Trainer(c, MeshConfig().make(jax.devices()[:1]))
    state = trainer.init()
    before = {n: np.array(x) for n, x in parameters(state.params).items()}
    for step in range(1, num_steps + 1):
        state, _ = trainer.step(state, batch, step)
    kept = [x.shape for x in jax.tree.leaves(state.optimizer)]
    return trainer, before, {n: np.array(x) for n, x in parameters(state.params).items()}, kept


def test_only_rows_of_one_modality_are_trained(small_model, modalities, masking, batch):
    name = next(m.name for m in modalities if m.is_input and m.is_target)
    i = modalities.index(name)
    trainer, before, after, _ = steps_of(
        small_model, modalities, masking, batch, train=(f"token_embedding[{name}]", f"modality_embedding[{name}]")
    )
    rows = trainer.model.input_rows[i : i + 2]
    assert trainer.num_trained == (rows[1] - rows[0] + 1) * small_model.width
    for parameter, x in before.items():
        changed = (x != after[parameter]).reshape(len(x), -1).any(1)
        if parameter == "token_embedding":
            assert changed[slice(*rows)].any() and not np.delete(changed, np.arange(*rows)).any()
        elif parameter == "modality_embedding":
            assert np.flatnonzero(changed).tolist() == [i]
        else:
            assert not changed.any(), parameter


def test_freeze_takes_out_of_train(small_model, modalities, masking, batch):
    _, before, after, moments = steps_of(
        small_model, modalities, masking, batch, train=("encoder.*",), freeze=("*.mlp.*",)
    )
    changed = {name for name, x in before.items() if (x != after[name]).any()}
    assert changed and all(n.startswith("encoder.") and ".mlp." not in n for n in changed)
    assert sum(map(np.prod, moments)) < sum(x.size for x in before.values())  # no moments of what is frozen


def test_patterns_that_fit_nothing_are_an_error(small_model, modalities, masking, batch):
    name = modalities[0].name
    for options in ({"train": (f"token_embeding[{name}]",)}, {"freeze": (f"token_embedding[{name}s]",)}):
        (field,) = options
        with pytest.raises(ValueError, match=f"{field}='.*fits no parameter.*token_embedding"):
            steps_of(small_model, modalities, masking, batch, **options)
