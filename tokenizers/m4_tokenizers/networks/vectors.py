"""Bottleneck MLPs for single vectors (global features, poses): grids of 1 x 1."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from m4.model.layers import Linear
from m4_tokenizers.networks.patches import DecoderModule, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckMLP:
    """Blocks of width x 4 (Bachmann et al. 2023, "Scaling MLPs"), applied to each vector of a grid by itself."""

    width: int = 256
    """Values between the blocks."""
    depth: int = 2
    """Blocks."""

    patch_size = 1


class BottleneckModule(nnx.Module):
    def __init__(self, c: BottleneckMLP, num_in: int, num_out: int, *, rngs: nnx.Rngs):
        self.read = Linear(num_in, c.width, bias=True, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(c.width, epsilon=1e-5, rngs=rngs) for _ in range(c.depth)])
        self.up = nnx.List([Linear(c.width, 4 * c.width, bias=True, rngs=rngs) for _ in range(c.depth)])
        self.down = nnx.List([Linear(4 * c.width, c.width, bias=True, rngs=rngs) for _ in range(c.depth)])
        self.write = Linear(c.width, num_out, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        x = self.read(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(jax.nn.gelu(up(norm(x)), approximate=False))
        return self.write(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorEncoder(BottleneckMLP):
    """One vector (a grid of 1 x 1) to one latent."""

    def make(self, *, num_channels: int, latent_size: int, grid: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return VectorEncoderModule(self, num_channels, latent_size, rngs=rngs)


class VectorEncoderModule(nnx.Module):
    def __init__(self, c: VectorEncoder, num_channels: int, latent_size: int, *, rngs: nnx.Rngs):
        self.mlp = BottleneckModule(c, num_channels, c.width, rngs=rngs)
        self.project = Linear(c.width, latent_size, bias=True, rngs=rngs)

    def features(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w F"]:
        return self.mlp(x)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w D"]:
        return self.project(self.features(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorDecoder(BottleneckMLP):
    """One latent to one vector."""

    def make(self, *, num_channels: int, latent_size: int, grid: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return VectorDecoderModule(self, num_channels, latent_size, rngs=rngs)


class VectorDecoderModule(DecoderModule):
    def __init__(self, c: VectorDecoder, num_channels: int, latent_size: int, *, rngs: nnx.Rngs):
        self.project = Linear(latent_size, c.width, bias=True, rngs=rngs)
        self.mlp = BottleneckModule(c, c.width, num_channels, rngs=rngs)

    def __call__(self, codes: Float[Array, "B h w D"]) -> Float[Array, "B h w C"]:
        return self.mlp(self.project(codes))
