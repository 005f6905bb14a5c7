"""Linear maps and layer norms of the encoder-decoder, and the options of its blocks.

B batch, T tokens, D width of what comes in, F of what goes out
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m4.errors import closest
from m4.model.block_inputs import TokenInfo
from m4.model.xla import flat_rows

BIASES = ("qkv", "proj", "mlp", "norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What the blocks are made of. The defaults, with `hidden` = 2/3 x 4 x width, are the released 4M-7 and 4M-21.

    Parameters, norms, softmax and the sum that runs through the blocks are float32 always.
    """

    width: int = 192
    """Values in the vector of a token, a multiple of num_heads and of 4."""
    num_heads: int = 3
    """Attention heads in each layer."""
    hidden: int = 512
    """Inner width of the feed-forward layers."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward layer: "swiglu" (Shazeer 2020), or "gelu" (the exact one, not the tanh formula)."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head."""
    biases: tuple[Literal["qkv", "proj", "mlp", "norm"], ...] = ()
    """What has biases: the maps to queries, keys and values ("qkv"), the output maps of attention ("proj"), the
    feed-forward layers ("mlp"), the layer norms ("norm"); () is nothing."""
    mimetic_init: bool = False
    """Query and key kernels start equal, so that a token first attends to its own address (Trockman & Kolter 2023,
    section 3). If false they are drawn apart, as in 4M."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products."""
    extensions: tuple[Any, ...] = ()
    """Changes of the model, each of another class of m4.model.extensions.Extension, such as those of m4.adaptation."""

    def __post_init__(self):
        if self.num_heads < 1 or self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads} and of 4")
        for name in self.biases:
            if name not in BIASES:
                raise ValueError(f"biases={self.biases}: {closest(name, BIASES)}")


class Linear(nnx.Module):
    """x @ kernel, Glorot-uniform as in 4M, with an optional bias from zero."""

    def __init__(
        self, num_in: int, num_out: int, *, rngs: nnx.Rngs, fan_out: int = 0, bias: bool = False,
    ):  # fmt: skip
        # A fused map (q, k and v in one kernel) is initialised as its parts would be: fan_out of one part.
        limit = (6 / (num_in + (fan_out or num_out))) ** 0.5
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (num_in, num_out), minval=-limit, maxval=limit))
        self.bias = nnx.Param(jnp.zeros(num_out)) if bias else None
        self.added: tuple[str, ...] = ()

    def add(self, name: str, part: nnx.Module) -> None:
        """A part of an extension: with `per_token` false, change() is added to the kernel; else part(x [T D], info),
        with x and info in rows of tokens, is added to the result."""
        setattr(self, name, part)
        self.added += (name,)

    @property
    def weight(self) -> Float[Array, "D F"]:
        """The kernel, with what parts for all tokens add."""
        kernel = self.kernel[...]
        for part in (getattr(self, name) for name in self.added):
            kernel = kernel if part.per_token else kernel + part.change()
        return kernel

    @property
    def per_token(self) -> list[Any]:
        """Parts that change each token by what it is."""
        return [part for part in (getattr(self, name) for name in self.added) if part.per_token]

    def __call__(
        self, x: Float[Array, "*B D"], dtype: str | None = None, norm: LayerNorm | None = None,
        info: TokenInfo | None = None,
    ):  # fmt: skip
        """[*B F], multiplied in the dtype of x; summed, and given back, in `dtype`."""
        return project((self,), x, dtype, norm, info)[0]


def project(
    maps: tuple[Linear, ...], x: Float[Array, "*B D"], dtype: str | None = None, norm: LayerNorm | None = None,
    info: TokenInfo | None = None,
):  # fmt: skip
    """Each map's [*B F] of x, multiplied in the dtype of x; summed, and given back, in `dtype`.

    `norm` is applied to x first: the backward pass computes its result again, so that only x is kept. `info`: of the
    tokens, for parts of the maps that change each token by what it is.
    """

    def products(x, kernels):
        x = flat_rows(norm(x) if norm else x)
        if len(kernels) > 1 and not _cut_over_tensor():  # one product is a third faster on CPU
            ends = list(itertools.accumulate(k.shape[1] for k in kernels))[:-1]
            return jnp.split(product(x, jnp.concatenate(kernels, axis=1)), ends, axis=1)
        return [product(x, k) for k in kernels]

    def product(x, kernel):
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype or x.dtype)

    ys = (jax.checkpoint(products) if norm else products)(x, [m.weight for m in maps])
    if info is not None and any(m.per_token for m in maps):
        flat = (norm(x) if norm else x).reshape(-1, x.shape[-1])
        rows = TokenInfo(*(jnp.broadcast_to(part, x.shape[:-1]).reshape(-1) for part in info))
        ys = [sum((part(flat, rows).astype(y.dtype) for part in m.per_token), y) for m, y in zip(maps, ys, strict=True)]
    ys = [y if m.bias is None else y + m.bias[...].astype(y.dtype)[None] for m, y in zip(maps, ys, strict=True)]
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def _cut_over_tensor() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["tensor"] > 1


def _as_row(vector: Float[Array, " D"], like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


@jax.custom_vjp
def layer_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"]) -> Float[Array, "*B D"]:
    """Layer normalisation over the last axis in float32; the backward pass keeps mean and deviation only."""
    return _layer_norm_forward(x, scale)[0]


def _layer_norm_forward(x, scale):
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + 1e-6)
    return ((y - mean) * inverse * _as_row(scale, y)).astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(residuals, g):
    x, mean, inverse, scale = residuals
    normal = (x.astype(jnp.float32) - mean) * inverse
    g = g.astype(jnp.float32)
    d = g * _as_row(scale, g)
    d = inverse * (d - d.mean(-1, keepdims=True) - normal * (d * normal).mean(-1, keepdims=True))
    return d.astype(x.dtype), (g * normal).reshape(-1, x.shape[-1]).sum(0)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """Layer normalisation with a scale, and a bias if the config asks for one; the result in c.dtype."""

    def __init__(self, c: BlockConfig, width: int = 0):
        self.dtype = c.dtype
        self.scale = nnx.Param(jnp.ones(width or c.width))
        self.bias = nnx.Param(jnp.zeros(width or c.width)) if "norm" in c.biases else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = layer_norm(x, self.scale[...])
        return (y if self.bias is None else y + _as_row(self.bias[...], y)).astype(self.dtype)
