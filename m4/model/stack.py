"""Blocks whose parameters are stacked, so that one compiled block serves all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from m4.model.config import ModelConfig
from m4.model.extensions import modules_of


def is_stack(name: Any) -> bool:
    """Whether the parameters of this name have the number of the block as their first axis: encoder, decoder, and
    stacks of extensions, whose names end in these."""
    return str(name).rpartition("_")[2] in ("encoder", "decoder")


Block = TypeVar("Block", bound=nnx.Module)


def survival(key: PRNGKeyArray | None, num_branches: int, depth: int, rate: float, batch: int):
    """Factors of stochastic depth: None, or float32 [depth branches B] of 0 and 1 / (1 - p)."""
    if key is None or not rate:
        return None
    stays = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    return jax.random.bernoulli(key, stays, (depth, num_branches, batch)) / stays


def stack(block: Callable[..., Block], c: ModelConfig, num_modalities: int, depth: int, rngs: nnx.Rngs) -> Block:
    """Blocks as one module whose parameters have a first axis of `depth`: compiled once, run by `jax.lax.scan`.

    Their random values are those of blocks created one after another, whatever extensions add.
    """
    key, first = rngs.params.key[...], rngs.params.count[...]

    def make(count):
        own = nnx.Rngs(params=key, extensions=jax.random.fold_in(key, count))
        own.params.count[...] = count
        one = block(c, rngs=own)
        for extension in c.extensions:
            for _, module in modules_of(one):
                extension.wrap(module, c, num_modalities, own)
        return nnx.split(one, nnx.Param)

    graph, params = nnx.eval_shape(lambda: make(first))
    # Kernels alone are drawn, each with one key.
    plain = nnx.eval_shape(lambda: nnx.state(block(c, rngs=nnx.Rngs(params=key)), nnx.Param))
    draws = sum("kernel" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain))
    rngs.params.count[...] = first + draws * depth
    return nnx.merge(
        graph, jax.vmap(lambda count: make(count)[1])(first + draws * jnp.arange(depth, dtype=first.dtype))
    )
