"""Losses of reconstructions. A recipe names some of these; the training loss is their weighted sum.

`weights` are those of each value (or, for classes, each pixel): 0 leaves out unknown ones, such as invalid depth. All
losses are weighted means, so that a batch of mostly unknown pixels counts as much as any other.

B batch, H rows, W columns, C channels
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from m4_tokenizers.networks.perceptual import PerceptualLoss, hed_weights, vgg16


def weighted_mean(values: Float[Array, "B ..."], weights: Float[Array, "B ..."]) -> Float[Array, ""]:
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(jnp.broadcast_to(weights, values.shape)), 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """`network`, if a loss has one, is an argument of the jitted step, which passes it to each call."""

    weight: float = 1.0
    """Factor of this loss in the sum."""

    def network(self) -> Any:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredError(Loss):
    def __call__(
        self, prediction: Float[Array, "B H W C"], target: Array, weights: Array, network: Any = None
    ) -> Float[Array, ""]:
        return weighted_mean(jnp.square(prediction - target), weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsoluteError(Loss):
    def __call__(
        self, prediction: Float[Array, "B H W C"], target: Array, weights: Array, network: Any = None
    ) -> Float[Array, ""]:
        return weighted_mean(jnp.abs(prediction - target), weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Huber(Loss):
    """Squared for small errors, absolute for large ones (Huber 1964)."""

    delta: float = 0.1
    """Error at which it turns from squared to absolute."""

    def __call__(
        self, prediction: Float[Array, "B H W C"], target: Array, weights: Array, network: Any = None
    ) -> Float[Array, ""]:
        return weighted_mean(optax.huber_loss(prediction, target, delta=self.delta), weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineDistance(Loss):
    """1 - the cosine of the angle between predicted and true vectors (the last axis)."""

    def __call__(
        self, prediction: Float[Array, "B H W C"], target: Array, weights: Array, network: Any = None
    ) -> Float[Array, ""]:
        return weighted_mean(1 - optax.cosine_similarity(prediction, target, epsilon=1e-6), weights[..., 0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross-entropy of class logits (the last axis) against class indices."""

    def __call__(
        self,
        prediction: Float[Array, "B H W C"],
        target: Int[Array, "B H W"],
        weights: Float[Array, "B H W"],
        network: Any = None,
    ) -> Float[Array, ""]:
        return weighted_mean(optax.softmax_cross_entropy_with_integer_labels(prediction, target), weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptual(Loss):
    """Distance of images in the features of VGG16; a subclass with its own `network` takes any other.

    Pixels of weight 0 are replaced by those of the target, and so do not count.
    """

    weight: float = 0.1
    """Factor of this loss in the sum."""
    num_blocks: int = 2
    """Blocks of VGG16 whose features are compared, from the first."""

    def network(self) -> Callable[[Float[Array, "B H W 3"]], list[Array]]:
        return vgg16(hed_weights(), num_blocks=self.num_blocks)

    def __call__(
        self, prediction: Float[Array, "B H W C"], target: Array, weights: Array, network: Any = None
    ) -> Float[Array, ""]:
        visible = jnp.where(weights > 0, prediction, target)
        return jnp.mean(PerceptualLoss(features=network)(visible, target))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversarial(Loss):
    """A patch discriminator (Isola et al. 2017; hinge loss as in VQGAN, Esser et al. 2021)."""

    weight: float = 0.1
    """Factor of this loss in the sum."""
    first_step: int = 500
    """First step in which it counts."""
    width: int = 32
    """Channels of the discriminator's first layer."""
    depth: int = 3
    """Layers of the discriminator that halve the image."""
    learning_rate: float = 5e-4
    """Learning rate of the discriminator."""

    def make(self, *, num_channels: int, rngs: nnx.Rngs) -> "Discriminator":
        return Discriminator(self, num_channels, rngs=rngs)


class Discriminator(nnx.Module):
    """Images -> a score for each patch: high where it looks real."""

    def __init__(self, c: Adversarial, num_channels: int, *, rngs: nnx.Rngs):
        widths = [c.width * 2**i for i in range(c.depth)]
        pairs = zip([num_channels, *widths[:-1]], widths, strict=True)
        self.layers = nnx.List([nnx.Conv(a, b, (4, 4), strides=2, padding="SAME", rngs=rngs) for a, b in pairs])
        self.score = nnx.Conv(widths[-1], 1, (1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w 1"]:
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(x), 0.2)
        return self.score(x)

    def loss(self, real: Float[Array, "B H W C"], decoded: Float[Array, "B H W C"]) -> Float[Array, ""]:
        """The discriminator's loss (hinge); the decoder minimises `-self(decoded).mean()`."""
        return jnp.mean(jax.nn.relu(1 - self(real))) + jnp.mean(jax.nn.relu(1 + self(decoded)))
