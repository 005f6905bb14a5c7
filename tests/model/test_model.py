"""The model: no information flows where none may, padding and order change nothing, caches change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m4.adaptation.registers import Registers
from m4.inference.autoregressive import Autoregressive
from m4.inference.parallel import ROAR, MaskGIT
from m4.inference.prompts import in_buckets
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage
from m4.model.attention import attend
from m4.model.blocks import DecoderBlock
from m4.model.encoder_decoder import Model
from m4.model.stack import stack, survival
from m4.model.visibility import Visible
from m4.objectives import cross_entropy as losses
from m4.tokens.batch import MaskedBatch, Targets, Tokens
from m4.tokens.packing import pack
from m4_tokenizers.modalities.stored import Ids

VARIANTS = {
    "default": {},
    "released": {"embeddings": "separate", "share_modality_embeddings": False, "qk_norm": True},
    "gelu": {
        "embeddings": "encoder_decoder", "mlp": "gelu", "extensions": (Registers(num=3),),
        "biases": ("qkv", "proj", "mlp", "norm"),
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["default", "released", pytest.param("gelu", marks=pytest.mark.slow)])
def model(small_model, modalities, request):
    """Every parameter random, so that biases and tables from zero matter too."""
    model = Model(dataclasses.replace(small_model, **VARIANTS[request.param]), modalities, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


@pytest.fixture(scope="module")
def batch(make_batch):
    return jax.tree.map(jnp.asarray, make_batch(3))


class Probed(Model):
    """The model with noise added to the content of each input and target token, to take gradients by token."""

    def input_content(self, inputs, features):
        return super().input_content(inputs, features) + self.input_noise

    def decoder_input(self, targets):
        return super().decoder_input(targets) + self.target_noise


def hidden_of_noise(model, batch):
    graph, params = nnx.split(model)

    def run(input_noise, target_noise):
        probed = nnx.merge(graph, params)
        probed.__class__ = Probed
        probed.input_noise, probed.target_noise = nnx.data(input_noise), nnx.data(target_noise)
        return probed(batch)

    return run


def flow(model, batch):
    """bool [B M M] and [B M N]: whether target slot i's output depends on target slot j, and on input slot j."""
    width = model.config.width
    at = jnp.zeros((*batch.inputs.ids.shape, width)), jnp.zeros((*batch.targets.ids.shape, width))
    run = hidden_of_noise(model, batch)
    probe = jax.random.normal(jax.random.key(0), (width,))
    by_input, by_target = jax.jacrev(lambda a, b: jnp.einsum("bmd,d->bm", run(a, b), probe), argnums=(0, 1))(*at)
    rows = jnp.arange(at[0].shape[0])
    return (by_target[rows, :, rows] != 0).any(-1), (by_input[rows, :, rows] != 0).any(-1)


def test_information_flow_is_exactly_the_rule(model, batch):
    """Gradients are zero, exactly, from other modalities' targets, later tokens of a sequence, and padding."""
    by_target, by_input = flow(model, batch)
    t = jax.device_get(batch.targets)
    ordered = t.modality == model.modalities.index("caption")
    allowed = (t.modality[:, :, None] == t.modality[:, None]) & t.valid[:, None]
    allowed &= ~ordered[:, :, None] | (t.position[:, None] <= t.position[:, :, None])
    valid = t.valid
    off = ~np.eye(valid.shape[1], dtype=bool)[None]
    assert (~by_target | allowed | ~off)[valid].all()
    assert by_target[allowed & off & valid[:, :, None]].mean() > 0.99  # and it does flow where it may
    given = batch.inputs.valid[:, None]
    assert (by_input == given)[valid].all()


def test_targets_never_see_their_own_ids(model, batch):
    """The ids to be predicted are not read at all."""
    other = batch._replace(targets=batch.targets._replace(ids=(batch.targets.ids + 1) % 7))
    np.testing.assert_array_equal(model(batch), model(other))


def test_padding_and_order_of_inputs_change_nothing(model, batch):
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 5))), batch.inputs)
    garbage = jnp.arange(wider.ids.shape[1]) >= batch.inputs.ids.shape[1]
    wider = wider._replace(
        ids=jnp.where(garbage[None], 2, wider.ids), modality=jnp.where(garbage[None], 1, wider.modality)
    )
    order = jax.random.permutation(jax.random.key(1), wider.ids.shape[1])
    shuffled = jax.tree.map(lambda x: x[:, order], wider)
    valid = batch.targets.valid
    expected = model(batch)[valid]
    for inputs in (wider, shuffled):
        np.testing.assert_allclose(model(batch._replace(inputs=inputs))[valid], expected, atol=2e-5)


def test_condition_may_be_empty(model, batch):
    """No input at all (the unconditional pass of guidance) gives finite outputs and gradients."""
    empty = batch._replace(inputs=batch.inputs._replace(valid=jnp.zeros_like(batch.inputs.valid)))
    graph, params = nnx.split(model, nnx.Param)

    def loss(params):
        m = nnx.merge(graph, params)
        return losses.cross_entropy(m, m(empty), empty.targets)[0]

    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss)(params)))


def plain_loss(model, hidden, targets, weighting):
    """The definition, with every logit."""
    total, means = 0.0, []
    for i, m in enumerate(model.modalities):
        if not m.vocab_size:
            continue
        log_p = jax.nn.log_softmax(model.logits(hidden, m.name))
        nll = -jnp.take_along_axis(log_p, jnp.clip(targets.ids, 0, m.vocab_size - 1)[..., None], -1)[..., 0]
        mine = targets.valid & (targets.modality == i)
        total += jnp.where(mine, nll, 0).sum()
        if mine.any():
            means.append(jnp.where(mine, nll, 0).sum() / mine.sum())
    return jnp.stack(means).mean() if weighting == "modality" else total / targets.valid.sum()


@pytest.mark.parametrize("weighting", ["modality", "token"])
@pytest.mark.parametrize("block", [3, 4, 512])
def test_loss_and_gradients_equal_the_definition(model, batch, weighting, block, monkeypatch):
    graph, params = nnx.split(model, nnx.Param)
    sums = losses.summed_cross_entropy
    monkeypatch.setattr(losses, "summed_cross_entropy", lambda *a: sums(*a, block=block))

    def ours(params):
        m = nnx.merge(graph, params)
        return losses.cross_entropy(m, m(batch), batch.targets, weighting=weighting)[0]

    def plain(params):
        m = nnx.merge(graph, params)
        return plain_loss(m, m(batch), batch.targets, weighting)

    (a, ga), (b, gb) = jax.value_and_grad(ours)(params), jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_cached_decoding_equals_uncached(model, modalities, make_example):
    """Teacher-forced hidden vectors of one full pass = those of single steps with caches."""
    records = [
        {"rgb_pixels": make_example(i)["rgb_pixels"], "depth_tokens": make_example(i)["depth_tokens"]} for i in range(3)
    ]
    inputs, features = jax.tree.map(jnp.asarray, in_buckets([pack([r], [0], modalities) for r in records], modalities))
    context = model.encode(inputs, features)
    length, caption = 6, modalities.index("caption")
    previous = jax.random.randint(jax.random.key(3), (3, length), 5, 30)
    position = jnp.broadcast_to(jnp.arange(length), (3, length))
    full = Targets(
        previous, previous, jnp.full_like(previous, caption), position, 0 * previous, 0 * previous, previous >= 0
    )
    expected = model.decode(full, context)
    apart = nnx.merge(*nnx.split(model))
    apart.unstack()
    decoding = apart.start_decoding(context, length)
    cache = decoding.cache
    for i in range(length):
        one = Targets(*(x[:, i : i + 1] for x in full))
        hidden, cache = apart.decode_step(one, decoding, cache, jnp.asarray(i))
        np.testing.assert_allclose(hidden[:, 0], expected[:, i], atol=1e-5)


@pytest.mark.parametrize(
    "scheme,target",
    [
        (MaskGIT(steps=3), "depth_tokens"),
        (ROAR(steps=4, top_p=0.9), "depth_tokens"),
        (Autoregressive(temperature=1.0), "caption"),
    ],
)
def test_a_sample_does_not_depend_on_its_batch(model, modalities, make_example, scheme, target):
    """Rows of a batch equal the same samples generated alone; another seed gives other samples."""

    records = [{"rgb_pixels": make_example(i)["rgb_pixels"]} for i in range(4)]
    sampler = Sampler(model, {m.name: Ids(modality=m, card={}) for m in modalities}, batch_size=4)
    stages = [Stage(target=target, scheme=scheme)]
    together = sampler.generate(records, stages, 7, range(4))[target]
    for i in range(4):
        alone = sampler.generate(records[i : i + 1], stages, 7, [i])[target]
        np.testing.assert_array_equal(alone[0], together[i])
    other = sampler.generate(records, stages, 8, range(4))[target]
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(together, other, strict=True))


def test_embedding_only_selected_tokens_needs_no_full_grid(model, batch):
    """An example's encoder length is its number of slots, whatever the modalities could hold."""
    length = model.config.num_prefix_tokens + batch.inputs.ids.shape[1]
    assert model.encode(batch.inputs, batch.features).tokens.shape[1] == length
    assert isinstance(batch, MaskedBatch) and isinstance(batch.inputs, Tokens)


def test_stacked_blocks_are_those_made_one_after_another(small_model):
    rngs, one_by_one = nnx.Rngs(0), nnx.Rngs(0)
    stacked = nnx.state(stack(DecoderBlock, small_model, 0, 3, rngs))
    for i in range(3):
        block = nnx.state(DecoderBlock(small_model, rngs=one_by_one))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), stacked, block)
    assert rngs.params.count[...] == one_by_one.params.count[...]


def test_attention_equals_its_definition():
    """Outputs and gradients; a query that sees nothing gets zeros and gives no gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, up = (jax.random.normal(key, (2, 5, 3, 4)) for key in keys)
    segment, rank = jnp.asarray([[0, 0, 1, 1, 2]] * 2), jnp.asarray([[0, 0, 0, 1, 0]] * 2)
    visible = Visible(segment, rank, jnp.where(segment == 2, -1, segment), rank)
    expected = np.zeros((5, 5), bool)
    expected[:2, :2] = expected[2, 2] = expected[3, 2:4] = True
    assert (np.asarray(visible.mask()) == expected).all()

    def definition(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 2
        exp = jnp.where(expected[None, None], jnp.exp(scores), 0)
        return jnp.einsum("bnts,bsnh->btnh", exp / jnp.maximum(exp.sum(-1, keepdims=True), 1e-9), v)

    def run(attention):
        return jax.value_and_grad(lambda *x: (attention(*x) * up).sum(), argnums=(0, 1, 2))(q, k, v)

    (out, grads), (out2, grads2) = run(lambda q, k, v: attend(q, k, v, visible)), run(definition)
    np.testing.assert_allclose(out, out2, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, grads2)
    assert not attend(q, k, v, visible)[:, 4].any()


@pytest.mark.parametrize("options", [{"remat": "blocks"}, {"unroll": 2}])
def test_what_is_kept_and_how_it_is_compiled_change_nothing(model, batch, options):
    graph, params = nnx.split(model, nnx.Param)

    def run(config):
        def loss(params):
            model = nnx.merge(graph, params)
            model.config = config
            return losses.cross_entropy(model, model(batch), batch.targets)[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    (loss, grads), (other, other_grads) = run(model.config), run(dataclasses.replace(model.config, **options))
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, other_grads)


@pytest.mark.parametrize("within,causal", [(True, True), (False, True), (False, False)])
def test_other_rules_of_visibility(small_model, modalities, batch, within, causal):
    config = dataclasses.replace(small_model, decoder_within_modality=within, decoder_causal=causal)
    t = jax.device_get(batch.targets)
    visible = np.asarray(Model(config, modalities, rngs=nnx.Rngs(0)).decoder_visibility(batch.targets).mask())
    caption = modalities.index("caption")
    for b, q, k in np.ndindex(visible.shape):
        same = t.modality[b, q] == t.modality[b, k]
        before = k <= q if causal or not same or t.modality[b, q] == caption else True
        assert visible[b, q, k] == (t.valid[b, k] and before and (same or not within))


def test_stochastic_depth(small_model, modalities, batch):
    """Without a key nothing is dropped; with one, whole branches of examples are; the mean stays."""
    config = dataclasses.replace(small_model, encoder_drop_path=0.5, decoder_drop_path=0.5)
    dropping, plain = (Model(c, modalities, rngs=nnx.Rngs(0)) for c in (config, small_model))
    np.testing.assert_array_equal(dropping(batch), plain(batch))
    keys = jax.random.split(jax.random.key(0), 2)
    outputs = [dropping(batch, k) for k in (keys[0], keys[0], keys[1])]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[2]).any()
    factors = np.stack(survival(keys[0], 3, 5, 0.8, 4000))
    assert (factors[0] == 1).all()
    np.testing.assert_allclose(factors.mean(-1), 1, atol=0.15)
    np.testing.assert_allclose((factors == 0).mean(-1).mean(-1), np.linspace(0, 0.8, 5), atol=0.03)


def test_bfloat16_is_near_and_nothing_is_float64(small_model, modalities, batch):
    half = Model(dataclasses.replace(small_model, dtype="bfloat16"), modalities, rngs=nnx.Rngs(0))
    full = Model(small_model, modalities, rngs=nnx.Rngs(0))
    a, b = half(batch), full(batch)
    assert a.dtype == jnp.bfloat16 and b.dtype == jnp.float32
    a, b = (np.asarray(x, np.float32)[batch.targets.valid] for x in (a, b))
    assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b)
    with jax.enable_x64(True):
        jaxpr = str(jax.make_jaxpr(full.__call__)(batch))
    assert "f64" not in jaxpr and "bf16" in str(jax.make_jaxpr(half.__call__)(batch))
