"""Networks of diffusion decoders: a noised signal, its step and the tokens' codes -> the schedule's target.

    noised -> patches -> level 0 -----------------------------> level 0 -> patches -> output
                           down, level 1 ------------> level 1, up                         each level: residual blocks,
                                    down, middle, up                                       added or concatenated

    UNet   convolutions and attention within a level; codes join the input (DiVAE, Shi et al. 2022; patched: Luhman &
           Luhman 2022)
    UViT   a transformer in the middle, where the codes are added or attended to (Hoogeboom et al. 2023; long skips:
           Bao et al. 2023; the step scales and shifts norms: Peebles & Xie 2023)

B batch, H rows, W columns, C channels, h rows and w columns of tokens, D values of a latent, F width, E step embedding
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from m4.model.attention import attend
from m4.model.layers import Linear
from m4.model.visibility import Visible
from m4_tokenizers.networks.patches import Table, resize_table, sine_cosine_grid, to_patches, to_pixels

NUM_GROUPS = 32  # of group normalisation


def step_features(t: Int[Array, " B"], size: int) -> Float[Array, "B E"]:
    """Cosines and sines of the step."""
    frequencies = np.exp(-np.log(10_000) * np.arange(size // 2, dtype=np.float32) / (size // 2)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def nearest(x: Shaped[Array, "B h w *D"], shape: tuple[int, int]) -> Shaped[Array, "B H W *D"]:
    """The nearest token of each position of a finer (or coarser) grid, by torch's rule."""
    rows, columns = (np.arange(n) * size // n for n, size in zip(shape, x.shape[1:3], strict=True))
    return x[:, rows][:, :, columns]


def group_norm(num_channels: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(num_channels, num_groups=NUM_GROUPS, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


def convolution(num_in: int, num_out: int, *, stride: int = 1, zero: bool = False, rngs: nnx.Rngs) -> nnx.Conv:
    initializer = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
    return nnx.Conv(num_in, num_out, (3, 3), strides=stride, padding=1, kernel_init=initializer, rngs=rngs)


class StepEmbedding(nnx.Module):
    def __init__(self, num_in: int, size: int, *, rngs: nnx.Rngs):
        self.num_in = num_in
        self.up = Linear(num_in, size, bias=True, rngs=rngs)
        self.out = Linear(size, size, bias=True, rngs=rngs)

    def __call__(self, t: Int[Array, " B"]) -> Float[Array, "B E"]:
        return self.out(jax.nn.silu(self.up(step_features(t, self.num_in))))


class ResBlock(nnx.Module):
    """Two convolutions, with the step added between them; starts as the identity (or as the shortcut)."""

    def __init__(self, num_in: int, num_out: int, step_size: int, *, rngs: nnx.Rngs):
        self.norm_1 = group_norm(num_in, rngs)
        self.conv_1 = convolution(num_in, num_out, rngs=rngs)
        self.step = Linear(step_size, num_out, bias=True, rngs=rngs)
        self.norm_2 = group_norm(num_out, rngs)
        self.conv_2 = convolution(num_out, num_out, zero=True, rngs=rngs)
        self.shortcut = Linear(num_in, num_out, bias=True, rngs=rngs) if num_in != num_out else None

    def __call__(self, x: Float[Array, "B H W C"], step: Float[Array, "B E"]) -> Float[Array, "B H W c"]:
        y = self.conv_1(jax.nn.silu(self.norm_1(x))) + self.step(jax.nn.silu(step))[:, None, None]
        y = self.conv_2(jax.nn.silu(self.norm_2(y)))
        return (x if self.shortcut is None else self.shortcut(x)) + y


class SpatialAttention(nnx.Module):
    """Attention with one head among all positions, added to the input."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = group_norm(width, rngs)
        self.attention = SelfAttention(width, 1, rngs=rngs)
        self.attention.out.kernel[...] = jnp.zeros((width, width))

    def __call__(self, x: Float[Array, "B H W C"], step: Float[Array, "B E"]) -> Float[Array, "B H W C"]:
        y = einops.rearrange(self.norm(x), "b h w c -> b (h w) c")
        return x + einops.rearrange(self.attention(y), "b (h w) c -> b h w c", h=x.shape[1])


class Down(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = convolution(width, width, stride=2, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], step: Float[Array, "B E"]) -> Float[Array, "B h w C"]:
        return self.conv(x)


class Up(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = convolution(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], step: Float[Array, "B E"]) -> Float[Array, "B h w C"]:
        return self.conv(einops.repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2))


class Levels(nnx.Module):
    """Down and up again: the output of each entry on the way down is concatenated to the input of one on the way up."""

    def __init__(
        self, num_in: int, widths: tuple[int, ...], num_blocks: int, step_size: int, attends: tuple[bool, ...], rngs
    ):
        res = lambda a, b: ResBlock(a, b, step_size, rngs=rngs)  # noqa: E731
        level = lambda i: [SpatialAttention(widths[i], rngs=rngs)] if attends[i] else []  # noqa: E731
        width, skips, down, up = num_in, [num_in], [], []
        for i, out in enumerate(widths):
            for _ in range(num_blocks):
                down.append(nnx.List([res(width, out), *level(i)]))
                width = out
                skips.append(width)
            if i < len(widths) - 1:
                down.append(nnx.List([Down(width, rngs=rngs)]))
                skips.append(width)
        for i, out in reversed(list(enumerate(widths))):
            for j in range(num_blocks + 1):
                last = [Up(out, rngs=rngs)] if i and j == num_blocks else []
                up.append(nnx.List([res(width + skips.pop(), out), *level(i), *last]))
                width = out
        self.down, self.up = nnx.List(down), nnx.List(up)

    def __call__(self, x: Float[Array, "B H W C"], step: Float[Array, "B E"], middle) -> Float[Array, "B H W C"]:
        skips = [x]
        for entry in self.down:
            for layer in entry:
                x = layer(x, step)
            skips.append(x)
        x = middle(x)
        for entry in self.up:
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            for layer in entry:
                x = layer(x, step)
        return x


class SelfAttention(nnx.Module):
    """Multi-head attention with biases, to itself or to a context of another width."""

    def __init__(self, width: int, num_heads: int, *, context_size: int = 0, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query = Linear(width, width, bias=True, rngs=rngs)
        self.key_value = Linear(context_size or width, 2 * width, fan_out=width, bias=True, rngs=rngs)
        self.out = Linear(width, width, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T F"], context=None, visible=None) -> Float[Array, "B T F"]:
        context = x if context is None else context
        q = einops.rearrange(self.query(x), "b t (n h) -> b t n h", n=self.num_heads)
        k, v = einops.rearrange(self.key_value(context), "b s (two n h) -> two b s n h", two=2, n=self.num_heads)
        visible = Visible.keys(jnp.ones((1, k.shape[1]), bool)) if visible is None else visible
        return self.out(einops.rearrange(attend(q, k, v, visible), "b t n h -> b t (n h)"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet:
    """Residual blocks on levels of width x multipliers, with attention on some of them.

    The patched 4M-7 decoders: patch_size 4, width 256, multipliers (1, 2, 2, 2), 3 blocks, attention levels (2, 3).
    """

    patch_size: int = 4
    """Rows and columns of a patch of the noised signal, pixels."""
    token_patch_size: int = 8
    """Rows and columns of pixels that a token stands for."""
    width: int = 64
    """Channels of the first level, before its multiplier."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each level, in units of `width`; each level halves the one before."""
    num_blocks: int = 2
    """Residual blocks of each level."""
    attention_levels: tuple[int, ...] = (1,)
    """Levels with attention, from 0."""

    def make(self, *, num_channels: int, latent_size: int, rngs: nnx.Rngs) -> "UNetModule":
        return UNetModule(self, num_channels, latent_size, rngs=rngs)


class UNetModule(nnx.Module):
    def __init__(self, c: UNet, num_channels: int, latent_size: int, *, rngs: nnx.Rngs):
        self.config = c
        step_size, widths = 4 * c.width, tuple(c.width * m for m in c.multipliers)
        size = c.patch_size**2 * num_channels
        self.step = StepEmbedding(c.width, step_size, rngs=rngs)
        self.read = convolution(size + latent_size, widths[0], rngs=rngs)
        attends = tuple(i in c.attention_levels for i in range(len(widths)))
        self.levels = Levels(widths[0], widths, c.num_blocks, step_size, attends, rngs)
        res = lambda: ResBlock(widths[-1], widths[-1], step_size, rngs=rngs)  # noqa: E731
        self.middle = nnx.List([res(), SpatialAttention(widths[-1], rngs=rngs), res()])
        self.norm_out = group_norm(widths[0], rngs)
        self.write = convolution(widths[0], size, zero=True, rngs=rngs)

    def output_shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] * self.config.token_patch_size, grid[1] * self.config.token_patch_size

    def __call__(
        self,
        noised: Float[Array, "B H W C"],
        t: Int[Array, " B"],
        codes: Float[Array, "B h w D"],
        masked: Bool[Array, "B h w"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """`masked` tokens (True) read as zeros."""
        step = self.step(t)
        p = self.config.patch_size
        x = einops.rearrange(noised, "b (h p) (w q) c -> b h w (c p q)", p=p, q=p)
        codes = codes if masked is None else jnp.where(masked[..., None], 0, codes)
        x = self.read(jnp.concatenate([x, nearest(codes, (x.shape[1], x.shape[2]))], axis=-1))

        def middle(x):
            for layer in self.middle:
                x = layer(x, step)
            return x

        x = self.levels(x, step, middle)
        x = self.write(jax.nn.silu(self.norm_out(x)))
        return einops.rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=p, q=p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UViT:
    """Residual blocks on levels, then a transformer of its own width.

    4M's B, f16: patch_size 4, widths (128, 256), 2 blocks, 12 x 768 in the middle, down_to_middle.
    """

    patch_size: int = 4
    """Rows and columns of a patch of the noised signal, pixels."""
    token_patch_size: int = 8
    """Rows and columns of pixels that a token stands for."""
    widths: tuple[int, ...] = (64,)
    """Channels of each level; each halves the one before."""
    num_blocks: int = 2
    """Residual blocks of each level."""
    down_to_middle: bool = False
    """Halve the last level once more before the transformer."""
    depth: int = 4
    """Blocks of the transformer."""
    width: int = 192
    """Values in its tokens."""
    num_heads: int = 3
    """Its attention heads."""
    long_skips: bool = False
    """Concatenate outputs of its early blocks to inputs of its late ones (Bao et al. 2023); needs an odd depth."""
    conditioning: Literal["concat", "xattn"] = "concat"
    """"concat" adds the codes to the transformer's tokens (4M's name for it); "xattn" lets these attend to them."""
    position_grid: int = 32
    """Rows and columns of the stored position table; other sizes interpolate it."""

    def __post_init__(self):
        if self.long_skips and self.depth % 2 == 0:
            raise ValueError(f"long skips need an odd depth, not {self.depth}")

    def make(self, *, num_channels: int, latent_size: int, rngs: nnx.Rngs) -> "UViTModule":
        return UViTModule(self, num_channels, latent_size, rngs=rngs)


class ModulatedMLP(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = Linear(width, 4 * width, bias=True, rngs=rngs)
        self.down = Linear(4 * width, width, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class UViTBlock(nnx.Module):
    """Self-attention, cross-attention if there is a context, and an MLP; the step scales, shifts and gates each."""

    def __init__(self, c: UViT, step_size: int, context_size: int, skip: bool, *, rngs: nnx.Rngs):
        norm = lambda size: nnx.LayerNorm(size, epsilon=1e-5, use_fast_variance=False, rngs=rngs)  # noqa: E731
        self.num_branches = 3 if context_size else 2
        self.norms = nnx.List([norm(c.width) for _ in range(self.num_branches)])
        self.attention = SelfAttention(c.width, c.num_heads, rngs=rngs)
        if context_size:
            self.context_norm = norm(context_size)
            self.cross_attention = SelfAttention(c.width, c.num_heads, context_size=context_size, rngs=rngs)
        self.mlp = ModulatedMLP(c.width, rngs=rngs)
        self.modulation = Linear(step_size, 2 * self.num_branches * c.width, bias=True, rngs=rngs)
        self.gate = Linear(step_size, self.num_branches * c.width, bias=True, rngs=rngs)
        self.gate.kernel[...] = jnp.zeros((step_size, self.num_branches * c.width))
        self.skip = Linear(2 * c.width, c.width, bias=True, rngs=rngs) if skip else None

    def __call__(self, x: Float[Array, "B T F"], step: Array, context=None, visible=None, skipped: Any = None):
        step = jax.nn.silu(step)[:, None]
        gates = jnp.split(self.gate(step), self.num_branches, axis=-1)
        moves = jnp.split(self.modulation(step), 2 * self.num_branches, axis=-1)  # shift, scale, shift, scale, ...
        if self.skip is not None:
            x = self.skip(jnp.concatenate([x, skipped], axis=-1))
        branches: list[Any] = [self.attention, self.mlp]
        if context is not None:
            context = self.context_norm(context)
            branches.insert(1, lambda y: self.cross_attention(y, context, visible))
        for i, branch in enumerate(branches):
            x = x + gates[i] * branch(self.norms[i](x) * (1 + moves[2 * i + 1]) + moves[2 * i])
        return x


class UViTMiddle(nnx.Module):
    def __init__(self, c: UViT, latent_size: int, step_size: int, *, rngs: nnx.Rngs):
        self.config = c
        attends = c.conditioning == "xattn"
        self.positions = Table(jnp.asarray(sine_cosine_grid(c.position_grid, c.position_grid, c.width)))
        has_skip = [c.long_skips and i > c.depth // 2 for i in range(c.depth)]
        self.blocks = nnx.List(
            [UViTBlock(c, step_size, latent_size if attends else 0, skip, rngs=rngs) for skip in has_skip]
        )
        self.read_codes = None if attends else Linear(latent_size, c.width, bias=True, rngs=rngs)
        self.mask_token = None if attends else nnx.Param(jnp.zeros(c.width))
        self.read = Linear(c.widths[-1], c.width, bias=True, rngs=rngs)
        self.write = Linear(c.width, c.widths[-1], bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], step: Array, codes: Array, masked: Array | None):
        shape = x.shape[1], x.shape[2]
        flat = lambda y: einops.rearrange(y, "b h w c -> b (h w) c")  # noqa: E731
        x = self.read(flat(x))
        context = visible = None
        if self.read_codes is not None:
            tokens = self.read_codes(nearest(codes, shape))
            if masked is not None and self.mask_token is not None:
                tokens = jnp.where(nearest(masked, shape)[..., None], self.mask_token[...][None, None, None], tokens)
            x = x + flat(tokens) + flat(resize_table(self.positions[...], shape)[None])
        else:
            x = x + flat(nearest(self.positions[...][None], shape))
            context = flat(codes)
            visible = None if masked is None else Visible.keys(~masked.reshape(len(masked), -1))
        half, skips = len(self.blocks) // 2, []
        for i, block in enumerate(self.blocks):
            late = self.config.long_skips and i > half
            x = block(x, step, context, visible, skips.pop() if late else None)
            if self.config.long_skips and i < half:
                skips.append(x)
        return einops.rearrange(self.write(x), "b (h w) c -> b h w c", h=shape[0])


class UViTModule(nnx.Module):
    def __init__(self, c: UViT, num_channels: int, latent_size: int, *, rngs: nnx.Rngs):
        self.config, first = c, c.widths[0]
        self.step = StepEmbedding(first, 4 * first, rngs=rngs)
        self.read = Linear(c.patch_size**2 * num_channels, first, bias=True, rngs=rngs)
        self.levels = Levels(first, c.widths, c.num_blocks, 4 * first, (False,) * len(c.widths), rngs)
        self.down = Down(c.widths[-1], rngs=rngs) if c.down_to_middle else None
        self.middle = UViTMiddle(c, latent_size, 4 * first, rngs=rngs)
        self.up = Up(c.widths[-1], rngs=rngs) if c.down_to_middle else None
        self.norm_out = group_norm(first, rngs)
        self.write = Linear(first, c.patch_size**2 * num_channels, rngs=rngs)
        self.write_bias = nnx.Param(jnp.zeros(num_channels))

    def output_shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] * self.config.token_patch_size, grid[1] * self.config.token_patch_size

    def __call__(
        self,
        noised: Float[Array, "B H W C"],
        t: Int[Array, " B"],
        codes: Float[Array, "B h w D"],
        masked: Bool[Array, "B h w"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """`masked` tokens (True) are replaced by a learned one, or not attended to."""
        step = self.step(t)

        def middle(x):
            x = x if self.down is None else self.down(x, step)
            x = self.middle(x, step, codes, masked)
            return x if self.up is None else self.up(x, step)

        x = self.levels(self.read(to_patches(noised, self.config.patch_size)), step, middle)
        x = to_pixels(self.write(jax.nn.silu(self.norm_out(x))), self.config.patch_size)
        return x + self.write_bias[...][None, None, None]
