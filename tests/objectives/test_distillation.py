"""Distillation: the loss is its definition, a frozen teacher stays as it is, and what does not fit is named."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, mask_keys, run
from flax import nnx

from m4.adaptation.registers import Registers
from m4.checkpoints.model_file import save_model
from m4.checkpoints.runs import check_tokenizers, load_run, write_run
from m4.commands.plan import abstract_batch
from m4.config import Config, load_config
from m4.data.dataset import Dataset
from m4.distributed import mesh as sharding
from m4.distributed.mesh import MeshConfig
from m4.masking.dirichlet import Masking, Strategy
from m4.model.encoder_decoder import Model
from m4.objectives import cross_entropy as losses
from m4.objectives.cross_entropy import TeacherOutputs
from m4.objectives.distillation import Distillation
from m4.objectives.masked_modeling import MaskedModeling
from m4.tokens.modality import Features, Grid, Modalities
from m4.training.trainer import Trainer
from m4_tokenizers.modalities.stored import IdsRecipe


@pytest.fixture(scope="module")
def teacher(small_model, modalities):
    """Of another width and depth."""
    larger = dataclasses.replace(
        small_model, width=24, hidden=32, encoder_depth=1, decoder_depth=1, extensions=(Registers(num=3),)
    )
    return Model(larger, modalities, rngs=nnx.Rngs(5))


def plain_loss(model, hidden, teacher, hidden_of_teacher, targets, share, weighting):
    """The definition, with every logit of both."""
    total, means, valid, modality = 0.0, [], np.asarray(targets.valid), np.asarray(targets.modality)
    for i, m in enumerate(model.modalities):
        if m.vocab_size:
            log_p = jax.nn.log_softmax(model.logits(hidden, m.name))
            soft = jax.nn.softmax(teacher.logits(hidden_of_teacher, m.name))
            hard = jax.nn.one_hot(jnp.clip(targets.ids, 0, m.vocab_size - 1), m.vocab_size)
            each = -(((1 - share) * hard + share * soft) * log_p).sum(-1)
            mine = valid & (modality == i)
            total += jnp.where(mine, each, 0).sum()
            if mine.any():
                means.append(jnp.where(mine, each, 0).sum() / mine.sum())
    return jnp.stack(means).mean() if weighting == "modality" else total / valid.sum()


@pytest.fixture(scope="module")
def student(small_model, modalities):
    return Model(small_model, modalities, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("weighting,share,block", [("modality", 0.3, 3), ("token", 1.0, 512)])
def test_loss_and_gradients_equal_the_definition(student, teacher, make_batch, weighting, share, block, monkeypatch):
    """And the modalities' own means are those of the data, as without a teacher."""
    sums = losses.summed_cross_entropy
    monkeypatch.setattr(losses, "summed_cross_entropy", lambda *a: sums(*a, block=block))
    targets = jax.tree.map(jnp.asarray, make_batch(4)).targets
    shape, rng = targets.ids.shape, np.random.default_rng(0)
    hidden, theirs = (jnp.asarray(rng.normal(size=(*shape, m.config.width)), jnp.float32) for m in (student, teacher))
    graph, params = nnx.split(student, nnx.Param)
    taught = TeacherOutputs(theirs, 40 * teacher.output_table, jnp.float32(share))
    sharper = nnx.clone(teacher)
    sharper.token_embedding[...] = taught.table

    def ours(params, hidden, taught):
        return losses.cross_entropy(nnx.merge(graph, params), hidden, targets, weighting=weighting, taught=taught)

    def plain(params, hidden):
        return plain_loss(nnx.merge(graph, params), hidden, sharper, theirs, targets, share, weighting)

    (a, detail), ga = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(params, hidden, taught)
    b, gb = jax.jit(jax.value_and_grad(plain, (0, 1)))(params, hidden)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    without, expected = jax.jit(ours)(params, hidden, None)
    assert abs(without - a) > 1e-3 and max(jnp.abs(g).max() for g in jax.tree.leaves(ga)) > 1e-3
    for name, mean in expected["loss"].items():
        np.testing.assert_allclose(detail["loss"][name], mean, rtol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(student, make_batch):
    targets = jax.tree.map(jnp.asarray, make_batch(4)).targets
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(*targets.ids.shape, 16)), jnp.float32)
    graph, params = nnx.split(student, nnx.Param)

    def loss(params, hidden, taught):
        return losses.cross_entropy(nnx.merge(graph, params), hidden, targets, taught=taught)[0]

    def largest(share):
        taught = TeacherOutputs(hidden, student.output_table, jnp.float32(share))
        return max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient(params, hidden, taught)))

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    assert largest(1.0) < 1e-7 and largest(0.5) > 1e-3


@pytest.fixture(scope="module")
def config(modalities, small_model, teacher, tmp_path_factory):
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_model(teacher, file)
    targets = {m.name: 1.0 for m in modalities if not isinstance(m, Features)}
    strategy = Strategy(inputs={m.name: 1.0 for m in modalities}, targets=targets)
    return Config(
        name="student",
        datasets=(Dataset(tokens="nothing"),),
        tokenizers=tuple(IdsRecipe(modality=m) for m in modalities),
        masking=Masking(num_inputs=16, num_targets=16, strategies=(strategy,)),
        model=dataclasses.replace(small_model, encoder_depth=1, decoder_depth=1),
        objectives=(Distillation(teacher=str(file), share=0.7, z_loss=1e-3),),
        batch_size=16,
        num_steps=4,
    )


def with_distillation(config, **fields):
    return dataclasses.replace(config, objectives=(dataclasses.replace(config.objectives[0], **fields),))


def on(axes: dict[str, int]):
    count = int(np.prod([*axes.values()]))
    return MeshConfig(**axes).make(jax.devices()[:count])


def train(config, mesh, make_example):
    """(parameters, losses, those of the teacher) after some steps."""
    trainer, found = Trainer(config, mesh), []
    loaded, state = trainer.place(trainer.load()), trainer.init()
    for step in range(1, 5):
        examples = [make_example(i) for i in range(16 * step, 16 * step + 16)]
        batch = config.masking(examples, config.modalities, mask_keys(16, seed=step))
        with jax.set_mesh(mesh):
            state, scalars = trainer.step(state, sharding.shard_batch(batch, mesh), step, loaded)
        found.append(float(scalars["loss"]))
    return *(jax.tree.map(np.asarray, jax.tree.leaves(x)) for x in (state.params, loaded[0][1])), found


def test_eight_devices_in_micro_batches_equal_one(config, make_example, teacher, monkeypatch):
    """And the teacher stays as it is."""
    monkeypatch.setattr(sharding, "MIN_SIZE_TO_SHARD", 1)
    alone, kept, found = train(config, on({"data": 1}), make_example)
    parts = dataclasses.replace(config, micro_batches=2)
    together, also_kept, others = train(parts, on({"data": 2, "fsdp": 2, "tensor": 2}), make_example)
    np.testing.assert_allclose(found, others, rtol=3e-6)
    assert found[-1] < found[0]
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
    for of_one, of_eight, x in zip(kept, also_kept, jax.tree.leaves(nnx.state(teacher, nnx.Param)), strict=True):
        np.testing.assert_array_equal(of_one, x)
        np.testing.assert_array_equal(of_eight, x)


def test_the_program_is_made_without_the_teachers_numbers(config):
    """They are its arguments, not constants in it."""
    mesh = on({"data": 2, "fsdp": 4})
    trainer = Trainer(config, mesh)
    abstract = trainer.abstract(trainer.load())
    assert {type(x) for x in jax.tree.leaves(abstract)} == {jax.ShapeDtypeStruct}
    args = trainer.abstract_state, abstract_batch(config, mesh), jax.ShapeDtypeStruct((), np.int32), abstract
    with jax.set_mesh(mesh):
        assert len(trainer.step.trace(*args).jaxpr.in_avals) == len(jax.tree.leaves(args))


def test_what_does_not_fit_is_named(config, modalities, teacher, tmp_path):
    config.check()
    for fields, message in (
        (
            {"teacher": config.objectives[0].teacher + "x"},
            "teacher=.* is not there.*Did you mean '.*teacher.safetensors'",
        ),
        ({"teacher": ""}, "teacher='' is not there"),
        ({"share": 0.0}, "share=0.0 must be above 0"),
        ({"share": 1.5}, "share=1.5 must be above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            with_distillation(config, **fields).check()

    def load(c, axes={"data": 1}):  # noqa: B006
        return Trainer(c, on(axes)).load()

    larger = dataclasses.replace(modalities[2], vocab_size=9)
    for items, message in (
        ((*modalities[:2], larger, modalities[3]), "equal vocabularies; it has .*vocab_size=7.* this model has .*=9"),
        ((*modalities, Grid(name="new", signal="new", vocab_size=3, shape=(2,))), "it has None, where .*'new'"),
        (modalities[::-1], "in the same order"),
    ):
        with pytest.raises(ValueError, match=message):
            load(dataclasses.replace(config, tokenizers=tuple(IdsRecipe(modality=m) for m in items)))
    with pytest.raises(ValueError, match="width=24 must be a multiple of fsdp x tensor = 16"):
        sharding.check_sizes(16, 16, 1, 24, jax.sharding.AbstractMesh((1, 4, 4), sharding.AXES))
    inputs = Modalities([*modalities, Grid(name="in", signal="in", vocab_size=3, shape=(2,), is_target=False)])
    save_model(Model(config.model, inputs, rngs=nnx.Rngs(0)), tmp_path / "t.safetensors")
    other = dataclasses.replace(
        with_distillation(config, teacher=str(tmp_path / "t.safetensors")),
        tokenizers=tuple(IdsRecipe(modality=m) for m in inputs),
        model=dataclasses.replace(config.model, embeddings="separate"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="embeddings='shared', this model 'separate'"):
        load(other)


@pytest.mark.slow  # resume itself is in test_training, meshes and micro-batches of a teacher above
def test_a_run_is_distilled_and_resumed(data_dir, tmp_path):
    """By train.py; and a teacher whose tokens mean something else is refused."""
    tiny = load_config(str(ROOT / "tests/tiny_config.py"))
    save_model(Model(tiny.model, tiny.modalities, rngs=nnx.Rngs(3)), tmp_path / "teacher.safetensors")
    options = ["--data-dir", str(data_dir), "--num-steps", "4", "--save-every", "2", "--evaluators.0.num-samples", "2"]
    options += ["--model.width", "16"]
    options += ["--workdir", str(tmp_path / "w")]
    (tmp_path / "student.py").write_text(
        "import dataclasses\n"
        "from m4.config import load_config\n"
        "from m4.objectives.distillation import Distillation\n"
        f"taught = Distillation(teacher={str(tmp_path / 'teacher.safetensors')!r})\n"
        "config = dataclasses.replace(load_config('tests/tiny_config.py'), objectives=(taught,))\n"
    )
    done = run(*options, config=tmp_path / "student.py")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoints, whole = tmp_path / "w" / "checkpoints", load_run(tmp_path / "w")
    saved = {p.name for p in (checkpoints / "4").iterdir() if p.is_dir()}
    assert saved == {"params", "optimizer", "counters", "data", "config"}
    shutil.rmtree(checkpoints / "4")
    done = run(*options, config=tmp_path / "student.py")
    assert done.returncode == 0 and "resumed from step 2" in done.stdout, done.stderr[-3000:]
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(x.model, nnx.Param)) for x in (whole, load_run(tmp_path / "w"))), strict=True
    ):
        np.testing.assert_array_equal(a, b)

    write_run(whole, tmp_path / "exported")
    assert load_run(tmp_path / "exported").config.objectives == (MaskedModeling(),)
    check_tokenizers(tmp_path / "w", whole.tokenizers)
    swapped = {**whole.tokenizers, "rgb_tokens": whole.tokenizers["depth_tokens"]}
    with pytest.raises(ValueError, match="has another tokenizer of rgb_tokens.*tokenizers_of"):
        check_tokenizers(tmp_path / "w", swapped)
