"""The contrastive loss is its formula over the whole batch's rows that have both; retrieval ranks what is near."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mask_keys
from flax import nnx
from PIL import Image

from m4.adaptation.registers import Registers
from m4.checkpoints.runs import TrainedModel, write_run
from m4.config import Config
from m4.data.dataset import Dataset
from m4.data.sources.scenes import Scenes
from m4.distributed import mesh as sharding
from m4.distributed.mesh import MeshConfig
from m4.evaluation.base import evaluate
from m4.evaluation.retrieval import Retrieval, by_chance, measure, shuffled_partners
from m4.files import read_json, write_json
from m4.masking.dirichlet import Masking, Strategy
from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.model.pooling import encoder_outputs
from m4.objectives.contrastive import Contrast, group_embeddings, info_nce
from m4.objectives.masked_modeling import MaskedModeling
from m4.registry import from_json, to_json
from m4.tokens.batch import normalized
from m4.tokens.modality import Modalities
from m4.training.trainer import Trainer
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.stored import IdsRecipe
from m4_tokenizers.modalities.text import TextRecipe

THERE = np.array([True, False, True, True, True, False, True])


def plain_loss(p, q, there, temperature, like) -> float:
    """The definition, one row at a time. like: [B B], what each pair counts."""
    cos = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
    rows, total = np.flatnonzero(there), 0.0
    p, q = p - p[rows].mean(0), q - q[rows].mean(0)
    for x, y in ((p, q), (q, p)):
        for i in rows:
            similarity = np.array([cos(x[i], y[j]) for j in rows]) / temperature
            log_p = similarity - np.log(np.exp(similarity).sum())
            weights = like[i, rows]
            total -= (weights * log_p).sum() / weights.sum()
    return total / 2 / len(rows)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_and_its_gradients_are_the_formula(weighted):
    """By finite differences in which w_ij stays as it is: no gradient comes through it. Absent rows count nothing."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 7, 5))
    unit = p - p[THERE].mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    like = (1 + unit @ unit.T) / 2 if weighted else np.eye(7)
    loss = lambda p, q: info_nce(p, q, jnp.asarray(THERE), 0.3, weighted)[0]  # noqa: E731
    arrays = jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)
    assert loss(*arrays) == pytest.approx(plain_loss(p, q, THERE, 0.3, like), rel=1e-5)
    gradients = jax.grad(loss, argnums=(0, 1))(*arrays)
    for which, x in enumerate((p, q)):
        for place in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[place] = 1e-5
            up, down = ([y + sign * step if k == which else y for k, y in enumerate((p, q))] for sign in (1, -1))
            slope = (plain_loss(*up, THERE, 0.3, like) - plain_loss(*down, THERE, 0.3, like)) / 2e-5
            assert float(gradients[which][place]) == pytest.approx(slope, abs=2e-5)
        assert (np.asarray(gradients[which])[~THERE] == 0).all()


def test_partners_are_found_among_rows_that_have_both():
    p = jnp.eye(7)
    q = p[jnp.asarray([0, 6, 2, 4, 3, 1, 6])]  # of the rows that are there, 3 and 4 look like each other's partner
    loss, accuracy, count = info_nce(p, q, jnp.asarray(THERE))
    assert (count, accuracy) == (5, pytest.approx(3 / 5)) and loss > 1
    assert info_nce(p, p, jnp.asarray(THERE))[0] < 1e-3
    loss, accuracy, count = info_nce(p, q, jnp.zeros(7, bool))
    assert loss == count == 0 and np.isnan(accuracy)
    gradient = jax.grad(lambda p: info_nce(p, jnp.zeros((7, 7)), jnp.zeros(7, bool))[0])(jnp.zeros((7, 7)))
    assert (gradient == 0).all()


def test_what_all_rows_of_a_group_share_counts_nothing():
    p, q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 5)), jnp.float32)
    loss = info_nce(p, q, jnp.asarray(THERE))[0]
    shared = jnp.arange(5.0)[None]
    assert info_nce(p + 30 * shared, q - 5 * shared, jnp.asarray(THERE))[0] == pytest.approx(float(loss), rel=1e-4)


CONTRAST = Contrast(a=("rgb_pixels", "depth_tokens"), b=("caption",), weight=0.5)


@pytest.fixture(scope="module")
def config(modalities, small_model):
    strategy = Strategy(inputs={m.name: 1.0 for m in modalities}, targets={"rgb_tokens": 1.0, "caption": 1.0})
    return Config(
        name="contrast",
        datasets=(Dataset(tokens="nothing"),),
        tokenizers=tuple(IdsRecipe(modality=m) for m in modalities),
        masking=Masking(num_inputs=16, num_targets=16, strategies=(strategy,)),
        model=dataclasses.replace(small_model, extensions=(Registers(num=2),), encoder_depth=1, decoder_depth=1),
        objectives=(MaskedModeling(), CONTRAST),
        batch_size=16,
        num_steps=4,
    )


@pytest.fixture(scope="module")
def batch(config, make_example):
    """Some rows have no caption, and some nothing else."""

    def example(i):
        whole = make_example(i)
        return {n: x for n, x in whole.items() if i % 4 > 1 or (n == "caption") == (i % 4)}

    return config.masking([example(i) for i in range(16)], config.modalities, mask_keys(16))


def test_each_group_is_encoded_by_itself(config, batch, modalities):
    model = Model(config.model, modalities, rngs=nnx.Rngs(0))
    batch = normalized(jax.tree.map(jnp.asarray, batch), modalities)
    is_caption = batch.inputs.modality == modalities.index("caption")
    other = batch._replace(inputs=batch.inputs._replace(ids=jnp.where(is_caption, 7, batch.inputs.ids)))
    before, has = group_embeddings(model, batch, CONTRAST.a)
    np.testing.assert_array_equal(before, group_embeddings(model, other, CONTRAST.a)[0])
    of_a = np.isin(batch.inputs.modality, [modalities.index(n) for n in CONTRAST.a]) & batch.inputs.valid
    np.testing.assert_array_equal(has, of_a.any(1))
    assert not has.all() and (np.asarray(before)[~has] == 0).all()
    in_place = batch.inputs._replace(valid=batch.inputs.valid & is_caption)  # among empty slots, not without them
    expected = encoder_outputs(model, in_place, batch.features)[1]
    np.testing.assert_allclose(group_embeddings(model, batch, ("caption",))[0], expected, atol=1e-5)
    examples = batch._replace(inputs=batch.inputs._replace(example=batch.inputs.example + 1))
    assert not group_embeddings(model, examples, CONTRAST.a)[1].any()  # in-context examples are not the query
    captions = [np.asarray(group_embeddings(model, b, ("caption",))[0]) for b in (batch, other)]
    assert np.abs(captions[0] - captions[1]).max() > 1e-2


@pytest.mark.parametrize("weighted,axes", [(False, {"data": 8}), (True, {"data": 2, "fsdp": 2, "tensor": 2})])
def test_eight_devices_equal_one(weighted, axes, config, batch, modalities, monkeypatch):
    """Rows are compared over the whole batch, whatever the cut."""
    monkeypatch.setattr(sharding, "MIN_SIZE_TO_SHARD", 1)
    contrast = dataclasses.replace(CONTRAST, weighted=weighted)
    graph, params = nnx.split(Model(config.model, modalities, rngs=nnx.Rngs(0)), nnx.Param)

    def loss(params, batch):
        part = normalized(batch, modalities)
        return contrast(nnx.merge(graph, params).outputs(part), part, None, None)

    def on(mesh):
        placed = jax.device_put(params, sharding.shardings(params, mesh))
        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(loss, has_aux=True))(placed, sharding.shard_batch(batch, mesh))

    alone = on(MeshConfig().make(jax.devices()[:1]))
    assert 2 < alone[0][1]["contrast/pairs"] < 16 and max(jnp.abs(g).max() for g in jax.tree.leaves(alone[1])) > 1e-3
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(on(MeshConfig(**axes).make())), strict=True):
        # Within float32 rounding of the largest: what is shared is taken off before cosines, so gradients reach 10.
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1, np.abs(a).max()))


def test_a_step_adds_it_by_its_weight(config, batch):
    mesh, logged = MeshConfig().make(jax.devices()[:1]), []
    trainer = Trainer(config, mesh)
    state = trainer.init()
    for step in range(1, 5):
        with jax.set_mesh(mesh):
            state, scalars = trainer.step(state, sharding.shard_batch(batch, mesh), step)
        logged.append({name: float(x) for name, x in scalars.items()})
    assert {n for n in logged[0] if "contrast" in n} == {"contrast/loss", "contrast/accuracy", "contrast/pairs"}
    of_targets = np.mean([x for name, x in logged[0].items() if name.startswith("loss/") and x == x])
    assert logged[0]["loss"] == pytest.approx(of_targets + 0.5 * logged[0]["contrast/loss"], rel=1e-5)
    assert logged[-1]["contrast/loss"] < logged[0]["contrast/loss"]


def test_what_cannot_be_asked_is_named(config):
    config.check()
    for contrast, message in (
        (Contrast(a=("rgb_pixel",), b=("caption",)), "unknown input modality 'rgb_pixel'.*Did you mean 'rgb_pixels'"),
        (Contrast(a=("rgb",), b=("caption",)), "unknown input modality 'rgb'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, objectives=(MaskedModeling(), contrast)).check()
    with pytest.raises(ValueError, match="which micro_batches=2 would cut; allowed: 1"):
        dataclasses.replace(config, micro_batches=2).check()
    for fields in ({"a": ()}, {"a": ("caption",)}, {"weight": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="contrast: "):
            dataclasses.replace(CONTRAST, **fields)
    assert from_json(json.loads(json.dumps(to_json(CONTRAST)))) == CONTRAST


# ---- Retrieval ------------------------------------------------------------------------------------------------------


def test_ranks_of_embeddings_made_by_hand():
    """On a circle: of samples at these angles, each a little turned, which partner is the nearest is plain to see."""
    degrees = np.array([0.0, 10, 100, 200, 300, 310, 320])
    at = lambda d: 3.0 * np.stack([np.cos(np.radians(d)), np.sin(np.radians(d))], axis=1)  # noqa: E731
    # Sample 0 finds 1 before itself; sample 4 finds 5 and 6 first.
    turned = degrees + np.array([8, 1, 1, 1, 18, 1, 1])
    rows, best = measure(at(turned), at(degrees), np.eye(7, dtype=bool))
    assert best[:, 0].tolist() == [1, 1, 2, 3, 6, 5, 6] and best[4, :3].tolist() == [6, 5, 4]
    found = {name: cell["mean"] for name, cell in rows["found"].items()}
    assert found["recall@1"] == pytest.approx(5 / 7) and found["recall@5"] == found["recall@10"] == 1
    assert found["MRR"] == pytest.approx((5 + 1 / 2 + 1 / 3) / 7)
    assert found["rank"] == pytest.approx((1 + 2) / 6 / 7)
    assert rows["found"]["recall@1"]["sem"] == pytest.approx(np.std([0, 1, 1, 1, 0, 1, 1], ddof=1) / 7**0.5)
    assert rows["shuffled"]["recall@1"]["mean"] < found["recall@1"]
    labels = np.array([0, 0, 1, 2, 3, 3, 3])
    rows, _ = measure(at(turned), at(degrees), labels[:, None] == labels[None])
    assert rows["found"]["recall@1"]["mean"] == 1


def test_chance_is_that_of_any_order():
    recalls = {"recall@1": 1 / 50, "recall@5": 5 / 50, "recall@10": 10 / 50}
    expected = {**recalls, "MRR": (1 / np.arange(1, 51)).mean(), "rank": 0.5}
    assert by_chance(np.eye(50, dtype=bool)) == pytest.approx(expected)
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(5), [1, 2, 3, 6, 8])
    right = labels[:, None] == labels[None]
    drawn = [measure(rng.normal(size=(20, 3)), rng.normal(size=(20, 3)), right)[0] for _ in range(400)]
    chance = drawn[0]["chance"]
    for name in ("found", "shuffled"):
        for figure in chance:
            mean = np.mean([rows[name][figure]["mean"] for rows in drawn])
            assert mean == pytest.approx(chance[figure]["mean"], abs=0.02), figure
    for count in (2, 3, 100):
        partners = shuffled_partners(count, rng)
        assert sorted(partners) == list(range(count)) and (partners != np.arange(count)).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that was not trained, with its tokenizers."""
    folder, scenes = tmp_path_factory.mktemp("run"), Scenes(num_train=8, num_validation=1, num_test=20, num_heldout=1)
    recipes, data_dir = (PixelPatchesRecipe(), TextRecipe()), folder / "data"
    scenes.prepare(data_dir)
    tokenizers = {r.modality.name: r.fit(scenes.split("test", data_dir), seed=0) for r in recipes}
    modalities = Modalities([r.modality for r in recipes])
    sizes = ModelConfig(width=16, num_heads=2, encoder_depth=1, decoder_depth=1, hidden=16)
    config = Config(
        name="run",
        datasets=(Dataset(source=scenes),),
        tokenizers=recipes,
        masking=Masking(strategies=(Strategy(inputs={"rgb_pixels": 1.0}, targets={"caption": 1.0}),)),
        model=sizes,
        evaluators=(Retrieval(b=("caption",), num_samples=12), Retrieval(b=("caption",), label="caption")),
    )
    write_run(TrainedModel(Model(sizes, modalities, rngs=nnx.Rngs(0)), tokenizers, config, 0), folder / "run")
    kept = read_json(folder / "run" / "config.json")
    write_json(folder / "run" / "config.json", {**kept, "data_dir": str(data_dir)})
    (folder / "run" / "digests.json").unlink()
    return folder / "run"


def test_an_evaluation_of_a_run(run):
    results = evaluate(run, "retrieval")
    assert {*results} == {
        "rgb -> caption", "caption -> rgb", "rgb -> caption, same caption", "caption -> rgb, same caption",
    }  # fmt: skip
    for direction, rows in results.items():
        assert [*rows] == ["found", "shuffled", "chance"]
        for cells in rows.values():
            assert [*cells] == ["recall@1", "recall@5", "recall@10", "MRR", "rank"]
            count = 20 if "same" in direction else 12
            assert all(cell["num_queries"] == count and 0 <= cell["mean"] <= 1 for cell in cells.values())
    assert results["rgb -> caption"]["chance"]["recall@5"]["mean"] == pytest.approx(5 / 12)
    assert json.loads((run / "retrieval.json").read_text()) == results
    assert (run / "retrieval.md").read_text().count("\n| ") == 4 * 3
    with Image.open(run / "retrieval.png") as picture:
        tiles = np.asarray(picture)
    assert tiles.shape[1] == 4 + 6 * 132 and tiles.shape[0] > 16 * 132  # 4 queries in each of 4 directions
    first, second = tiles[20:130], tiles[20 + 4 * 148 :][:110]  # a picture that finds texts, a text that finds pictures
    assert np.ptp(first[:, 4:132], axis=2).max() > 30 >= np.ptp(first[:, 136:], axis=2).max()
    assert np.ptp(second[:, 4:132], axis=2).max() == 0 and np.ptp(second[:, 136:], axis=2).max() > 30


def test_bad_retrievals_are_named(run):
    for asked, message in (
        (Retrieval(), "unknown modality 'audio'.*allowed: rgb"),
        (Retrieval(b=("caption",), split="tset"), "Did you mean 'test'"),
        (Retrieval(b=("caption",), label="captoin"), "unknown label 'captoin'.*Did you mean 'caption'"),
        ((Retrieval(b=("caption",)),) * 2, "asked twice"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(run, asked, run.parent / "out")
    for fields in ({"a": ("audio",)}, {"b": ()}, {"num_samples": 1}):
        with pytest.raises(ValueError, match="retrieval: "):
            Retrieval(**fields)
