"""Kernels of other platforms against XLA's attention: values, gradients, and queries that see nothing."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m4.adaptation.registers import Registers
from m4.distributed.constraints import BATCH
from m4.distributed.mesh import MeshConfig
from m4.model import kernels
from m4.model.attention import attend
from m4.model.encoder_decoder import Model
from m4.model.kernels import cudnn, on_mesh, splash
from m4.model.visibility import Visible
from m4.objectives import cross_entropy as losses
from m4.tokens.batch import Targets

interpreted = functools.partial(splash, interpret=True)


@pytest.fixture(scope="module")
def visibility_of(small_model, modalities):
    """(targets, options of the model) -> the decoder's rule."""

    def of(targets, **options):
        config = dataclasses.replace(small_model, **options)
        return nnx.eval_shape(lambda: Model(config, modalities, rngs=nnx.Rngs(0))).decoder_visibility(targets)

    return of


@pytest.fixture(scope="module")
def targets(modalities):
    """Grids and sequences of two items, cut sequences, padding; [2 200]."""
    grid, other, words = (modalities.index(name) for name in ("rgb_tokens", "depth_tokens", "caption"))
    rng, rows = np.random.default_rng(0), []
    for parts in (
        [(grid, 0, 50), (other, 0, 30), (grid, 1, 20), (words, 0, 40), (words, 1, 30)],
        [(words, 1, 140), (grid, 1, 1), (words, 0, 9)],
    ):
        columns = [[], [], []]
        for modality, item, count in parts:
            is_words = modality == words
            position = 3 + np.arange(count) if is_words else rng.permutation(count)
            for column, part in zip(columns, (np.full(count, modality), position, np.full(count, item)), strict=True):
                column.extend(part)
        rows.append([np.pad(column, (0, 200 - len(column))) for column in columns] + [np.arange(200) < len(columns[0])])
    modality, position, item, valid = (jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True))
    return Targets(position, position, modality, position, item, item, valid)


def compare(attention, visible, num_queries, num_keys, heads=2):
    """With XLA on random queries, keys and values. Whether there are queries that see no key."""
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = (num_queries, num_keys, num_keys, num_queries)
    q, k, v, up = (jax.random.normal(key, (2, length, heads, 16)) for key, length in zip(keys, lengths, strict=True))

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention, q, k, v):
        out, back = jax.vjp(lambda *x: attention(*x, visible), q, k, v)
        return out, *back(up)

    for found, expected in zip(run(attention, q, k, v), run(attend, q, k, v), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)
    blind = ~np.broadcast_to(visible.mask().any(-1), (2, num_queries))
    out, d_q, *_ = run(attention, q, k, v)
    assert not out[blind].any() and not d_q[blind].any()
    return blind.any()


@pytest.mark.parametrize("options", [{}, {"decoder_within_modality": False}])
def test_splash_with_the_decoders_rule(targets, visibility_of, options):
    compare(interpreted, visibility_of(targets, **options), 200, 200)


@pytest.mark.parametrize("num_queries,num_keys", [(7, 128), (130, 640)])
def test_splash_with_padding(num_queries, num_keys):
    """Lengths that are no multiple of 128, several blocks of keys, keys in any places, an example without any."""
    valid = jnp.asarray(np.random.default_rng(0).random((2, num_keys)) < 0.5).at[1].set(False)
    assert compare(interpreted, Visible.keys(valid), num_queries, num_keys)


@pytest.mark.parametrize("heads", [2, 3])
def test_kernels_on_a_mesh(targets, visibility_of, heads):
    """Examples and heads are cut; three heads do not divide by two devices and stay whole."""
    with jax.set_mesh(MeshConfig(data=1, fsdp=2, tensor=2).make(jax.devices()[:4])):
        compare(on_mesh(interpreted, BATCH, "tensor"), visibility_of(targets), 200, 200, heads=heads)


@pytest.mark.slow
def test_a_model_with_splash(small_model, modalities, make_batch, monkeypatch):
    """Loss and gradients through scanned blocks that are computed again, with registers and padding."""
    batch = jax.tree.map(jnp.asarray, make_batch(3))
    config = dataclasses.replace(small_model, remat="blocks", extensions=(Registers(num=3),), qk_norm=True)
    graph, params = nnx.split(Model(config, modalities, rngs=nnx.Rngs(0)), nnx.Param)

    def run():
        def loss(params):
            model = nnx.merge(graph, params)
            return losses.cross_entropy(model, model(batch), batch.targets)[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    loss, grads = run()
    monkeypatch.setattr(kernels, "kernel_for", lambda q: jax.checkpoint(interpreted))
    splash_loss, splash_grads = run()
    np.testing.assert_allclose(splash_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), splash_grads, grads)


def test_ranks_of_a_segment_do_not_fall(make_batch, visibility_of):
    """What splash attention needs: a query sees its segment up to a slot. In batches that masking made."""
    targets = jax.tree.map(jnp.asarray, make_batch(64).targets)
    for options in ({}, {"decoder_causal": True}, {"decoder_within_modality": False}):
        visible = visibility_of(targets, **options)
        mask = np.asarray(visible.mask())
        last = np.where(mask, np.arange(mask.shape[2]), -1).max(-1, keepdims=True)
        same = np.asarray(visible.query_segment[:, :, None] == visible.key_segment[:, None])
        np.testing.assert_array_equal(mask, same & (np.arange(mask.shape[2]) <= last))


def test_what_cudnn_is_asked_for(monkeypatch):
    """The same call on XLA: bias, even lengths and queries that see nothing. The kernel itself needs a GPU."""
    asked = []

    def on_xla(q, k, v, mask, implementation):
        asked.append((q.shape[1] % 2, k.shape[1] % 2, mask.shape, implementation))
        return attention(q, k, v, mask=mask)

    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(kernels.jax.nn, "dot_product_attention", on_xla)
    segment = jnp.asarray([[0, 0, 1, 1, 2, 2, 1], [1, 1, 1, 0, 0, 0, 0]])
    rank = jnp.asarray([[0, 0, 0, 1, 0, 0, 2], [4, 3, 2, 1, 0, 0, 0]])  # falling: the mask holds in any order
    visible = Visible(segment[:, :5], rank[:, :5], jnp.where(segment == 2, -1, segment), rank)
    assert compare(cudnn, visible, 5, 7)
    assert {*asked} == {(0, 0, (2, 1, 6, 8), "cudnn")}


def lowered(platform, kind, length, mesh_shape=(2, 1, 2)):
    """Text of attention with its gradients, lowered for devices that are not there."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh(
        mesh_shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3, abstract_device=device
    )
    x = jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16)
    valid = jax.ShapeDtypeStruct((2, length), bool)

    def loss(q, k, v, valid):
        return attend(q, k, v, Visible.keys(valid)).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x, valid).lower(lowering_platforms=(platform,))


def test_a_program_for_tpus_has_the_kernel():
    """Chosen by the mesh, not by this machine; nothing of the size of all weights [B N T S] is left."""
    text = lowered("tpu", "TPU v5 lite", 384).as_text()
    assert text.count("tpu_custom_call") == 2
    assert not re.search(r"tensor<(\d+x)+384x384x", text)
    assert "tpu_custom_call" not in lowered("tpu", "TPU v5 lite", 64).as_text()
    assert "tpu_custom_call" not in lowered("cpu", "cpu", 384).as_text()
