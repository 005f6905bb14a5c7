"""What keeps XLA on CPU fast and small: each is the identity or a plain rearrangement, with the reason for it."""

from __future__ import annotations

import jax
from einops import rearrange
from jaxtyping import Array, Float


@jax.custom_vjp
def param_grads_first(x: Array, params):
    """Identity. Forces parameter gradients to be computed before dx.

    XLA on CPU would else put them off until the end of the step, and hold all that they are computed from.
    """
    return x, params


def _param_grads_first_backward(_, g):
    d_x, d_params = g
    return d_x + 0 * sum(d[(0,) * d.ndim] for d in jax.tree.leaves(d_params)), d_params


param_grads_first.defvjp(lambda *args: (args, None), _param_grads_first_backward)


def computed_after(x: Array, other: Array) -> Array:
    """Identity of x. What is computed from it cannot be computed, and held, before `other` is there."""
    return x + 0 * other[(0,) * other.ndim]


def heads_first(x: Float[Array, "B T N H"]) -> Float[Array, "B N T H"]:
    """In memory: XLA on CPU multiplies [.. T H] blocks twice as fast as strided ones, and undoes plain transposes."""
    return jax.lax.optimization_barrier(rearrange(x, "b t n h -> b n t h"))


def tokens_first(x: Float[Array, "B N T H"]) -> Float[Array, "B T N H"]:
    """The way back of `heads_first`."""
    return rearrange(jax.lax.optimization_barrier(x), "b n t h -> b t n h")


def flat_rows(x: Float[Array, "*B D"]) -> Float[Array, "R D"]:
    """Two axes: XLA's CPU weight gradients of [batch, tokens, width] operands are 1.7 times slower."""
    return x.reshape(-1, x.shape[-1])
