"""Prompts of many items: their addresses, training on them, and answers; also of more than a model was trained with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mask_keys
from flax import nnx

from m4.config import Config, load_config
from m4.distributed.mesh import MeshConfig
from m4.in_context.example_encoder import ExampleEncoder
from m4.in_context.independent_items import IndependentItems
from m4.in_context.prompting import answer, build_prompts, score
from m4.in_context.shots import encode
from m4.in_context.similarity_prior import SimilarityPrior
from m4.inference.prompts import make_prompt
from m4.inference.sampler import Sampler
from m4.masking.dirichlet import Masking
from m4.masking.episodes import EpisodeMasking, Shot
from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.model.positions import item_address
from m4.tokens.batch import Targets, Tokens
from m4.tokens.modality import Modalities
from m4.training.optimizer import OptimizerConfig
from m4.training.trainer import Trainer
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.text import TextRecipe

NUM_ITEMS = 64  # the query and 63 examples
MIXED = (IndependentItems(num_blocks=1), ExampleEncoder(depth=1), SimilarityPrior(size=8, words="caption"))


@pytest.fixture(scope="module")
def tokenizers():
    pixels, text = PixelPatchesRecipe(image_size=16, patch_size=8), TextRecipe(max_length=12, vocab_size=600)
    source = [{"rgb": np.zeros((16, 16, 3), np.uint8), "caption": "a red cube"}]
    return {r.modality.name: r.fit(source, seed=0) for r in (pixels, text)}


@pytest.fixture(scope="module")
def own(tokenizers):
    return Modalities([t.modality for t in tokenizers.values()])


def config_of(extensions=(), **options) -> ModelConfig:
    sizes = {"width": 16, "num_heads": 2, "encoder_depth": 2, "decoder_depth": 2, "hidden": 24}
    return ModelConfig(**sizes, embedding_scale=14.0, extensions=extensions, **options)


def shot(seed: int, answer: str = "") -> Shot:
    image = np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    return Shot(inputs={"rgb": image}, outputs={"caption": answer} if answer else {})


SHOTS = [shot(i, ("dax", "wug", "fep")[i % 3]) for i in range(NUM_ITEMS - 1)]


def test_learned_rows_come_first_and_sines_of_their_size_follow():
    learned = 0.3 * jax.random.normal(jax.random.key(0), (5, 64))
    x = np.asarray(item_address(learned, jnp.arange(200)[None], 10_000.0))[0]
    np.testing.assert_array_equal(x[:5], learned)
    np.testing.assert_allclose(np.square(x[5:]).mean(1), np.square(learned).mean(), rtol=1e-5)
    distances = np.linalg.norm(x[5:, None] - x[None, 5:], axis=-1) + 9 * np.eye(195)
    assert distances.min() > 0.5  # all are told apart
    frequency = 10_000.0 ** -(np.arange(32) / 32)
    expected = np.sqrt(2 * np.square(learned).mean()) * np.concatenate([np.sin(77 * frequency), np.cos(77 * frequency)])
    np.testing.assert_allclose(x[77], expected, atol=1e-5)
    # Nothing is learned of the items beyond, and nothing is lost where a table is still empty, as that of 4M.
    gradient = jax.grad(lambda t: item_address(t, jnp.array([[1, 9]]), 10_000.0).sum())(jnp.zeros((5, 64)))
    np.testing.assert_array_equal(gradient, np.eye(5)[1][:, None] * np.ones(64))


@pytest.mark.parametrize(
    "extensions,max_items", [((), 17), (MIXED, 17), pytest.param(MIXED, NUM_ITEMS, marks=pytest.mark.slow)]
)
def test_a_prompt_of_64_items_is_answered(extensions, max_items, tokenizers, own):
    """By a model that knows as many addresses, and by one that knows 17. Padding changes nothing, bit for bit."""
    model = Model(config_of(extensions, max_items=max_items), own, rngs=nnx.Rngs(0))
    sampler, query = Sampler(model, tokenizers, devices=jax.devices()[:1]), shot(99)
    assert isinstance(answer(sampler, query, "caption", shots=SHOTS)["caption"], str)
    scores = score(sampler, [query], "caption", [["dax", "wug", "fep"]], shots=SHOTS)
    assert np.isfinite(scores).all()
    other = score(sampler, [query], "caption", [["dax", "wug", "fep"]], shots=[shot(5, "dax wug"), *SHOTS[1:]])
    assert np.abs(scores - other).max() > 0  # the oldest example is read
    ((record, partial, context),) = build_prompts(sampler, [query], "caption", SHOTS, 0, 2048)
    prompt = make_prompt([record], [partial], own.named("caption"), own, contexts=[context])
    inputs, features = jax.tree.map(jnp.asarray, prompt.rows())
    valid = np.asarray(inputs.valid)
    for column in (inputs.item, inputs.example):
        assert {*np.asarray(column)[valid]} == {*range(NUM_ITEMS)}
    (ids,) = tokenizers["caption"].encode(["dax"])
    zero, m = jnp.zeros((1, len(ids)), jnp.int32), own.named("caption")
    place, previous = jnp.arange(len(ids))[None], jnp.asarray([[m.first_sentinel, *ids[:-1]]])
    targets = (jnp.asarray(ids[None]), previous, zero + own.index("caption"), place, zero, zero, zero == 0)

    def hidden(inputs):
        return np.asarray(model.decode(Targets(*targets), model.encode(inputs, features)))

    for value in (0, 1, 63):
        noise = Tokens(*(jnp.where(inputs.valid, x, value) for x in inputs[:-1]), inputs.valid)
        noise = noise._replace(modality=jnp.minimum(noise.modality, 1), position=jnp.minimum(noise.position, 3))
        noise = jax.tree.map(lambda x, y: jnp.where(inputs.valid, x, y), inputs, noise)
        np.testing.assert_array_equal(hidden(noise), hidden(inputs))


@pytest.mark.parametrize("max_items", [pytest.param(1, marks=pytest.mark.slow), NUM_ITEMS])
def test_a_tiny_model_is_trained_on_prompts_of_64_items(max_items, tokenizers, own):
    """With learned addresses and with sines alone; the loss falls, and an answer is finite."""
    masking = EpisodeMasking(num_examples=NUM_ITEMS, labelled=(63, 63), num_tokens=(1,), max_items=NUM_ITEMS)
    config = Config(
        name="items", datasets=(), tokenizers=tuple(t.recipe for t in tokenizers.values()),
        masking=Masking(num_inputs=640, num_targets=12, strategies=()), batch_size=2, num_steps=12,
        model=config_of(MIXED, max_items=max_items), optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    )  # fmt: skip
    episodes = [[encode(s, tokenizers, own)[0] for s in (*SHOTS, shot(70 + i, "dax"))] for i in range(2)]
    batch = masking(episodes, own, mask_keys(2), 640, 12)
    assert all({*x[valid]} == {*range(64)} for x, valid in zip(batch.inputs.item, batch.inputs.valid, strict=True))
    trainer = Trainer(config, MeshConfig().make(jax.devices()[:1]))
    state, losses = trainer.init(), []
    for step in range(1, 13):
        state, scalars = trainer.step(state, batch, step)
        losses.append(float(scalars["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]
    sampler = Sampler(trainer.trained(state), tokenizers, devices=jax.devices()[:1])
    assert np.isfinite(score(sampler, [shot(99)], "caption", [["dax", "wug"]], shots=SHOTS)).all()


def test_the_example_encoder_passes_further_images_of_the_query(tokenizers, own):
    """Items of the query are the query, whatever their number."""
    extensions = (ExampleEncoder(depth=1),)
    model = Model(config_of(extensions), own, rngs=nnx.Rngs(0))
    plain = Model(config_of(), own, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.from_flat_state(
        [(p, x) for p, x in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "shot_encoder" not in p[0]]
    ))  # fmt: skip
    several = Shot(inputs={"rgb": [shot(i).inputs["rgb"] for i in range(2)]})
    samplers = [Sampler(m, tokenizers, devices=jax.devices()[:1]) for m in (model, plain)]
    alone, same = (score(s, [several], "caption", [["dax", "wug"]]) for s in samplers)
    np.testing.assert_array_equal(alone, same)
    with_shots = [score(s, [several], "caption", [["dax", "wug"]], shots=SHOTS[:2]) for s in samplers]
    assert np.abs(with_shots[0] - with_shots[1]).max() > 1e-4


def test_items_that_no_data_set_numbers_are_an_error():
    quickstart = load_config("configs/quickstart.py")
    episodes = dataclasses.replace(quickstart.datasets[0], masking=EpisodeMasking(num_examples=5, labelled=(2, 4)))
    config = dataclasses.replace(quickstart, datasets=(episodes,))
    config.check()
    with pytest.raises(ValueError, match=r"model.max_items=64 .* below 17; set EpisodeMasking\(max_items=64\)"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, max_items=64)).check()
