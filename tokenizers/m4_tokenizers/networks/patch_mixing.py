"""Small images: principal components of patches and a residual network, which starts as the k-means tokenizer."""

from __future__ import annotations

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m4_tokenizers.networks.patches import DecoderModule, Shape, to_patches, to_pixels

NUM_MOVES = 9  # shifts of a grid by at most one patch; a mixing block has as many groups of features


def normalize(x: Float[Array, "... F"]) -> Float[Array, "... F"]:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def shifts(shape: Shape) -> Float[np.ndarray, "S s t"]:
    """The nine shifts of a grid by at most one patch, as matrices over its raster; the border repeats."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    sources = [np.clip(y + dy, 0, shape[0] - 1) * shape[1] + np.clip(x + dx, 0, shape[1] - 1) for dy, dx in offsets]
    return np.stack([np.eye(y.size, dtype=np.float32)[:, source.ravel()] for source in sources])


class MixingBlock(nnx.Module):
    """Each ninth of the features is mixed over the grid, then an MLP; the result is added to the input.

    The mixing is a learned [grid, grid] matrix that starts as a shift to one neighbour: a depthwise convolution is as
    good, but takes more than twice as long on CPU.
    """

    def __init__(self, width: int, shape: Shape, *, rngs: nnx.Rngs):
        self.look = nnx.Param(jnp.asarray(shifts(shape)))
        self.widen = nnx.Linear(width, 2 * width, rngs=rngs)
        self.narrow = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B s F"]) -> Float[Array, "B s F"]:
        groups = einops.rearrange(normalize(x), "b s (g f) -> b s g f", g=NUM_MOVES)
        mixed = einops.rearrange(jnp.einsum("bsgf,gst->btgf", groups, self.look[...]), "b t g f -> b t (g f)")
        return x + self.narrow(jax.nn.gelu(self.widen(mixed)))


class Residual(nnx.Module):
    """A network that corrects a linear map of single patches, zero at first."""

    def __init__(self, *, num_in: int, num_out: int, width: int, num_blocks: int, shape: Shape, rngs: nnx.Rngs):
        self.read = nnx.Linear(num_in, width, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((shape[0] * shape[1], width)))
        self.blocks = nnx.List([MixingBlock(width, shape, rngs=rngs) for _ in range(num_blocks)])
        self.write = nnx.Linear(width, num_out, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w I"]) -> Float[Array, "B h w O"]:
        h, w = x.shape[1:3]
        y = self.read(einops.rearrange(x, "b h w i -> b (h w) i")) + self.position[...][None]
        for block in self.blocks:
            y = block(y)
        return einops.rearrange(self.write(normalize(y)), "b (h w) o -> b h w o", h=h, w=w)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patches:
    """Patches through a linear map that starts as their principal components, plus a residual that starts at zero.

    Before any training it is the k-means tokenizer of single patches; training teaches the residual what
    neighbouring patches add. For small images of one resolution.
    """

    patch_size: int = 8
    """Rows and columns of a patch, pixels: one token."""
    width: int = 144
    """Channels of the residual network."""
    num_blocks: int = 2
    """Blocks of the residual network; 0 is the linear map alone."""

    def __post_init__(self):
        if self.width % NUM_MOVES:
            raise ValueError(f"width={self.width} is not a multiple of {NUM_MOVES}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchEncoder(Patches):
    def make(self, *, num_channels: int, latent_size: int, grid: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return PatchEncoderModule(self, num_channels, latent_size, grid, rngs=rngs)


class PatchEncoderModule(nnx.Module):
    def __init__(self, c: PatchEncoder, num_channels: int, latent_size: int, grid: Shape, *, rngs: nnx.Rngs):
        size = c.patch_size**2 * num_channels
        self.patch_size = c.patch_size
        self.mean = nnx.Param(jnp.zeros(size))
        self.project = nnx.Param(jnp.zeros((size, latent_size)))
        self.residual = Residual(
            num_in=size, num_out=latent_size, width=c.width, num_blocks=c.num_blocks, shape=grid, rngs=rngs
        )

    def start_from(self, pixels: Float[np.ndarray, "N H W C"]) -> None:
        mean, basis, scale = principal_components(pixels, self.patch_size, self.project.shape[1])
        self.mean[...], self.project[...] = mean, basis / scale

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        patches = to_patches(x, self.patch_size)
        centred = patches - self.mean[...][None, None, None]
        return jnp.einsum("bhwp,pd->bhwd", centred, self.project[...]) + self.residual(patches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchDecoder(Patches):
    num_blocks: int = 4
    """Blocks of the residual network; 0 is the linear map alone."""

    def make(self, *, num_channels: int, latent_size: int, grid: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return PatchDecoderModule(self, num_channels, latent_size, grid, rngs=rngs)


class PatchDecoderModule(DecoderModule):
    def __init__(self, c: PatchDecoder, num_channels: int, latent_size: int, grid: Shape, *, rngs: nnx.Rngs):
        size = c.patch_size**2 * num_channels
        self.patch_size = c.patch_size
        self.mean = nnx.Param(jnp.zeros(size))
        self.unproject = nnx.Param(jnp.zeros((latent_size, size)))
        self.residual = Residual(
            num_in=latent_size, num_out=size, width=c.width, num_blocks=c.num_blocks, shape=grid, rngs=rngs
        )

    def start_from(self, pixels: Float[np.ndarray, "N H W C"]) -> None:
        mean, basis, scale = principal_components(pixels, self.patch_size, self.unproject.shape[0])
        self.mean[...], self.unproject[...] = mean, basis.T * scale

    def __call__(self, codes: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        linear = jnp.einsum("bhwd,dp->bhwp", codes, self.unproject[...]) + self.mean[...][None, None, None]
        return to_pixels(linear + self.residual(codes), self.patch_size)


def principal_components(
    pixels: Float[np.ndarray, "N H W C"], patch_size: int, num_components: int
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "P D"], np.float32]:
    """(mean, components, scale) of patches: `(patch - mean) @ components / scale` has values of order one."""
    patches = to_patches(pixels, patch_size).reshape(-1, patch_size**2 * pixels.shape[-1])
    mean = patches.mean(axis=0)
    covariance = np.einsum("np,nq->pq", patches - mean, patches - mean, optimize=True) / len(patches)
    _, vectors = np.linalg.eigh(covariance.astype(np.float64))
    basis = vectors[:, ::-1][:, :num_components].astype(np.float32)
    latent = (patches - mean) @ basis
    return mean, basis, np.sqrt(np.mean(latent * latent))
