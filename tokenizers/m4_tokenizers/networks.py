"""Encoders and decoders of tokenizers: signals as arrays -> latents, and codes -> signals.

    ViTEncoder       patches -> transformer -> latents                images, class maps (embedded), feature maps
    ViTDecoder       codes -> transformer -> patches                  the same; optional convolutions over the output
    VectorEncoder    one vector -> bottleneck MLP -> latent           global features, poses (grids of 1 x 1)
    PatchEncoder     patches -> principal components + residual       small images: starts as the k-means tokenizer

Each is a frozen dataclass; `make` builds its module, which maps [B H W C] to [B h w D] or back. `patch_size` pixels of
a side make one token.

B batch, H rows and W columns of pixels, C channels, h rows and w columns of tokens, D latent numbers, P numbers of a
patch (channels fastest), F width, s and t places of a grid in raster order
"""

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m4.model.blocks import EncoderBlock
from m4.model.layers import BlockConfig, LayerNorm, Linear
from m4.model.visibility import Visible

NUM_MOVES = 9  # of a grid by at most one patch: a mixing block's groups of features


Shape = tuple[int, int]


class Table(nnx.Variable):
    """Numbers that belong to a module and are not trained."""


class DecoderModule(nnx.Module):
    """Codes [B h w D] -> signals [B H W C]."""

    def compare(self, codes: Array, x: Array, key: Array) -> tuple[Array, Array]:
        """(prediction, target) for the training loss: here the reconstruction and the signal itself."""
        return self(codes), x


def to_patches(pixels: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B h w P"]:
    if pixels.shape[1] % patch_size or pixels.shape[2] % patch_size:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[2]} is no multiple of patch_size={patch_size}")
    return einops.rearrange(pixels, "n (h p) (w q) c -> n h w (p q c)", p=patch_size, q=patch_size)


def to_pixels(patches: Float[Array, "B h w P"], patch_size: int) -> Float[Array, "B H W C"]:
    return einops.rearrange(patches, "n h w (p q c) -> n (h p) (w q) c", p=patch_size, q=patch_size)


def sine_cosine_grid(height: int, width: int, size: int) -> Float[np.ndarray, "h w D"]:
    """The original's position table of a grid: sines and cosines of one axis, then of the other.

    Which axis comes first is an oddity that matters only for grids that are not square.
    """
    if size % 4:
        raise ValueError(f"position tables need a width that is a multiple of 4, not {size}")
    frequencies = np.float32(1) / np.power(np.float32(10_000), np.arange(size // 4, dtype=np.float32) / (size // 4))
    raster = np.arange(height * width)
    slow, fast = (x.astype(np.float32)[:, None] * frequencies for x in (raster // height, raster % height))
    table = np.concatenate([np.sin(slow), np.cos(slow), np.sin(fast), np.cos(fast)], axis=1)
    return table.astype(np.float32).reshape(height, width, size)


def cubic_weights(num_in: int, num_out: int) -> Float[np.ndarray, "O I"]:
    """Bicubic resampling of one axis as torch does it: a = -0.75, half-pixel centres, repeated border, no antialias."""
    a = -0.75
    source = (np.arange(num_out) + 0.5) * (num_in / num_out) - 0.5
    first = np.floor(source).astype(int)
    weights = np.zeros((num_out, num_in))
    for offset in (-1, 0, 1, 2):
        d = np.abs(source - (first + offset))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(weights, (np.arange(num_out), np.clip(first + offset, 0, num_in - 1)), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


def resize_table(table: Float[Array, "h w D"], shape: Shape) -> Float[Array, "H W D"]:
    """A position table at another resolution; unchanged at its own."""
    if table.shape[:2] == tuple(shape):
        return table
    rows, columns = cubic_weights(table.shape[0], shape[0]), cubic_weights(table.shape[1], shape[1])
    return jnp.einsum("Hh,hwd,Ww->HWd", rows, table, columns, precision="highest")


class PostMLP(nnx.Module):
    """Norm and a tanh MLP, added: what the original (after ViT-VQGAN, Yu et al. 2022) puts next to the codebook."""

    def __init__(self, c: BlockConfig, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(c)
        self.up = Linear(c.width, c.hidden, bias=True, rngs=rngs)
        self.down = Linear(c.hidden, c.width, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        return x + self.down(jnp.tanh(self.up(self.norm(x))), "float32")


class ConvNeXtBlock(nnx.Module):
    """Depthwise 7 x 7 convolution, norm, MLP, added with a learned scale (Liu et al. 2022)."""

    def __init__(self, num_channels: int, *, rngs: nnx.Rngs):
        c = BlockConfig(width=4, num_heads=1, norm_bias=True)
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
    """What the transformers of encoder and decoder share. Sizes in 4M: S 512 x 8, B 768 x 12, L 1024 x 24.

    Other resolutions interpolate the stored position table, of `table_size` x `table_size` (0: the recipe's grid).
    patch_size 1 is for feature maps: one vector a token.
    """

    patch_size: int = 8
    table_size: int = 0
    width: int = 256
    depth: int = 4
    num_heads: int = 4
    post_mlp: bool = True

    @property
    def block(self) -> BlockConfig:
        biases = dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias", "norm_bias"), True)
        return BlockConfig(width=self.width, num_heads=self.num_heads, hidden=4 * self.width, mlp="gelu", **biases)


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
        visible = Visible.keys(jnp.ones((1, h * w), bool))
        for block in self.blocks:
            x = block(x, visible)
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
    """A transformer over codes, then patches; `num_convolutions` ConvNeXt blocks smooth their borders."""

    num_convolutions: int = 0

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckMLP:
    """Blocks of width x 4 (Bachmann et al. 2023, "Scaling MLPs"), applied to each vector of a grid by itself."""

    width: int = 256
    depth: int = 2

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


def normalize(x: Float[Array, "... F"]) -> Float[Array, "... F"]:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def shifts(shape: Shape) -> Float[np.ndarray, "S s t"]:
    """The nine moves of a grid by at most one patch, as matrices over its raster; the border repeats."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    sources = [np.clip(y + dy, 0, shape[0] - 1) * shape[1] + np.clip(x + dx, 0, shape[1] - 1) for dy, dx in offsets]
    return np.stack([np.eye(y.size, dtype=np.float32)[:, source.ravel()] for source in sources])


class MixingBlock(nnx.Module):
    """Each ninth of the features looks at one neighbour, then an MLP, added to the input.

    The looking is a learned [grid, grid] matrix that starts as a shift: a depthwise convolution is as good a step,
    but takes more than twice as long on CPU.
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
    """What a linear map of single patches leaves out, zero at first."""

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

    Before any training it is the k-means tokenizer of single patches; training teaches the residual what neighbouring
    patches say. For small images of one resolution.
    """

    patch_size: int = 8
    width: int = 144
    num_blocks: int = 2

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
    """(mean, components, scale) of patches: `(patch - mean) @ components / scale` has numbers of order one."""
    patches = to_patches(pixels, patch_size).reshape(-1, patch_size**2 * pixels.shape[-1])
    mean = patches.mean(axis=0)
    covariance = np.einsum("np,nq->pq", patches - mean, patches - mean, optimize=True) / len(patches)
    _, vectors = np.linalg.eigh(covariance.astype(np.float64))
    basis = vectors[:, ::-1][:, :num_components].astype(np.float32)
    latent = (patches - mean) @ basis
    return mean, basis, np.sqrt(np.mean(latent * latent))


class VQ(nnx.Module):
    """Encoder, quantizer and decoder of a recipe (vq.VQRecipe). Class maps (integers) are embedded first."""

    def __init__(self, c: Any, *, rngs: nnx.Rngs):
        sizes = {"latent_size": c.quantizer.latent_size, "grid": c.grid}
        num_channels = c.embedding_size or c.num_classes or c.num_channels
        rows = jnp.eye(c.num_classes)
        if c.embedding_size:
            rows = jax.random.normal(rngs.params(), (c.num_classes, c.embedding_size))
        self.class_embedding = nnx.Param(rows) if c.num_classes else None
        self.encoder = c.encoder.make(num_channels=num_channels, rngs=rngs, **sizes)
        self.quantizer = c.quantizer.make(rngs=rngs)
        self.decoder = c.decoder.make(num_channels=c.num_classes or c.num_channels, rngs=rngs, **sizes)

    def embed(self, x: Array) -> Float[Array, "B H W C"]:
        return x if self.class_embedding is None else self.class_embedding[...][x]

    def start_from(self, x: np.ndarray, *, seed: int) -> None:
        """A first fit before training, of the parts that have one: principal components, then k-means of latents."""
        embedded = np.asarray(self.embed(x))
        for part in (self.encoder, self.decoder):
            if hasattr(part, "start_from"):
                part.start_from(embedded)
        graph, state = nnx.split(self)
        # As arguments: arrays that a jitted function closes over were seen to be read before they were written (CPU).
        encode = jax.jit(lambda state, x: nnx.merge(graph, state).latent(x))
        latents = np.concatenate([np.asarray(encode(state, x[i : i + 64])) for i in range(0, len(x), 64)])
        self.quantizer.start_from(latents.reshape(-1, latents.shape[-1]), seed=seed)

    def latent(self, x: Array) -> Float[Array, "B h w D"]:
        return self.encoder(self.embed(x))

    def encode(self, x: Array) -> Int[Array, "B h w *C"]:
        return self.quantizer(self.latent(x)).ids

    def decode(self, ids: Int[Array, "B h w *C"]) -> Float[Array, "B H W C"]:
        return self.decoder(self.quantizer.look_up(ids))


def check_finite(arrays: np.ndarray) -> None:
    """ValueError that says which signal has numbers that are not finite."""
    finite = np.isfinite(arrays).reshape(len(arrays), -1)
    if not finite.all():
        i = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise ValueError(f"signal {i} has {int((~finite[i]).sum())} values that are not finite")
