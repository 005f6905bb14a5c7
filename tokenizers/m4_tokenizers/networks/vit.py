"""Vision transformers: patches -> latents, and codes -> patches, with optional convolutions over the output."""

from __future__ import annotations

import dataclasses

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m4.model.block_inputs import BlockInputs
from m4.model.blocks import EncoderBlock
from m4.model.layers import BIASES, BlockConfig, LayerNorm, Linear
from m4.model.visibility import Visible
from m4_tokenizers.networks.patches import DecoderModule, Shape, Table, resize_table, sine_cosine_grid, to_patches


class PostMLP(nnx.Module):
    """Norm and a tanh MLP, added to the input: 4M's layer next to the codebook (after ViT-VQGAN, Yu et al. 2022)."""

    def __init__(self, c: BlockConfig, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(c)
        self.up = Linear(c.width, c.hidden, bias=True, rngs=rngs)
        self.down = Linear(c.hidden, c.width, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        return x + self.down(jnp.tanh(self.up(self.norm(x))), "float32")


class ConvNeXtBlock(nnx.Module):
    """Depthwise 7 x 7 convolution, norm, MLP, added with a learned scale (Liu et al. 2022)."""

    def __init__(self, num_channels: int, *, rngs: nnx.Rngs):
        c = BlockConfig(width=4, num_heads=1, biases=("norm",))
        self.depthwise = nnx.Conv(
            num_channels, num_channels, (7, 7), padding=3, feature_group_count=num_channels, rngs=rngs
        )
        self.norm = LayerNorm(c, num_channels)
        self.up = Linear(num_channels, 4 * num_channels, bias=True, rngs=rngs)
        self.down = Linear(4 * num_channels, num_channels, bias=True, rngs=rngs)
        self.scale = nnx.Param(jnp.full(num_channels, 1e-6))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = self.down(jax.nn.gelu(self.up(self.norm(self.depthwise(x))), approximate=False))
        return x + self.scale[...][None, None, None] * y


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT:
    """Fields of the transformers of encoder and decoder. Sizes in 4M: S 512 x 8, B 768 x 12, L 1024 x 24."""

    patch_size: int = 8
    """Rows and columns of a patch, pixels: one token. 1 is for feature maps: one vector a token."""
    table_size: int = 0
    """Rows and columns of the stored position table, which other resolutions interpolate; 0 is the recipe's grid."""
    width: int = 256
    """Values in the vector of a token."""
    depth: int = 4
    """Blocks."""
    num_heads: int = 4
    """Attention heads of each block."""
    post_mlp: bool = True
    """A feed-forward layer behind the blocks."""

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(width=self.width, num_heads=self.num_heads, hidden=4 * self.width, mlp="gelu", biases=BIASES)


class Transformer(nnx.Module):
    """Blocks over a grid of tokens, after its position table is added."""

    def __init__(self, c: ViT, grid: Shape, *, rngs: nnx.Rngs):
        grid = (c.table_size, c.table_size) if c.table_size else grid
        self.positions = Table(jnp.asarray(sine_cosine_grid(*grid, c.width)))
        self.blocks = nnx.List([EncoderBlock(c.block, rngs=rngs) for _ in range(c.depth)])
        self.post_mlp = PostMLP(c.block, rngs=rngs) if c.post_mlp else None

    def __call__(self, x: Float[Array, "B h w F"]) -> Float[Array, "B h w F"]:
        h, w = x.shape[1:3]
        x = x + resize_table(self.positions[...], (h, w))[None]
        x = einops.rearrange(x, "b h w f -> b (h w) f")
        inputs = BlockInputs(Visible.keys(jnp.ones((1, h * w), bool)))
        for block in self.blocks:
            x, _ = block(x, inputs)
        x = x if self.post_mlp is None else self.post_mlp(x)
        return einops.rearrange(x, "b (h w) f -> b h w f", h=h)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTEncoder(ViT):
    """Patches, projected, through a transformer (Dosovitskiy et al. 2021)."""

    def make(self, *, num_channels: int, latent_size: int, grid: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return ViTEncoderModule(self, num_channels, latent_size, grid, rngs=rngs)


class ViTEncoderModule(nnx.Module):
    def __init__(self, c: ViTEncoder, num_channels: int, latent_size: int, grid: Shape, *, rngs: nnx.Rngs):
        self.patch_size = c.patch_size
        self.read = Linear(self.patch_size**2 * num_channels, c.width, bias=True, rngs=rngs)
        self.transformer = Transformer(c, grid, rngs=rngs)
        self.project = Linear(c.width, latent_size, bias=True, rngs=rngs)

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        return self.transformer(self.read(to_patches(x, self.patch_size)))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return self.project(self.features(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTDecoder(ViT):
    """A transformer over codes, then patches."""

    num_convolutions: int = 0
    """ConvNeXt blocks that smooth the borders of patches; 0 is none."""

    def make(self, *, num_channels: int, latent_size: int, grid: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return ViTDecoderModule(self, num_channels, latent_size, grid, rngs=rngs)


class ViTDecoderModule(DecoderModule):
    def __init__(self, c: ViTDecoder, num_channels: int, latent_size: int, grid: Shape, *, rngs: nnx.Rngs):
        self.patch_size = c.patch_size
        self.project = Linear(latent_size, c.width, bias=True, rngs=rngs)
        self.transformer = Transformer(c, grid, rngs=rngs)
        self.write = Linear(c.width, self.patch_size**2 * num_channels, bias=True, rngs=rngs)
        self.convolutions = nnx.List([ConvNeXtBlock(num_channels, rngs=rngs) for _ in range(c.num_convolutions)])

    def __call__(self, codes: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        x = self.write(self.transformer(self.project(codes)))
        x = einops.rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=self.patch_size, q=self.patch_size)
        for block in self.convolutions:
            x = block(x)
        return x
