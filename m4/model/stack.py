"""Blocks whose parameters are stacked, so that one compiled block serves all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from m4.model.config import ModelConfig

STACKS = ("encoder", "decoder", "shot_encoder")  # parameters whose first axis is the number of the block

Block = TypeVar("Block", bound=nnx.Module)


def survival(key: PRNGKeyArray | None, num_branches: int, depth: int, rate: float, batch: int):
    """Factors of stochastic depth: None, or float32 [depth branches B] of 0 and 1 / (1 - p)."""
    if key is None or not rate:
        return None
    stays = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    return jax.random.bernoulli(key, stays, (depth, num_branches, batch)) / stays


def stack(block: Callable[..., Block], c: ModelConfig, num_routes: int, depth: int, rngs: nnx.Rngs) -> Block:
    """Blocks as one module whose parameters have a first axis of `depth`: compiled once, run by `jax.lax.scan`.

    Their random numbers are those of blocks made one after another, whatever is added for fine-tuning.
    """
    key, first = rngs.params.key[...], rngs.params.count[...]

    def make(count):
        own = nnx.Rngs(params=key, lora=jax.random.fold_in(key, count))
        own.params.count[...] = count
        return nnx.split(block(c, num_routes, rngs=own), nnx.Param)

    graph, params = nnx.eval_shape(lambda: make(first))
    # Kernels alone are drawn, each with one key.
    draws = sum("kernel" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    rngs.params.count[...] = first + draws * depth
    return nnx.merge(
        graph, jax.vmap(lambda count: make(count)[1])(first + draws * jnp.arange(depth, dtype=first.dtype))
    )
