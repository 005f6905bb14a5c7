"""One token drawn from its distribution: temperature, filters, random values.

B rows, V vocabulary, S steps
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m4.tokens.modality import Modality


def _smallest(is_enough: Any, shape: tuple[int, ...]) -> Float[Array, "*B"]:
    """The smallest float t in [0, 1] with is_enough(t), which is true from some t on: bisection over floats' bits."""
    low, high = jnp.zeros(shape, jnp.int32), jnp.full(shape, np.float32(1).view(np.int32))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        ok = is_enough(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(ok, low, middle + 1), jnp.where(ok, middle, high)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, (low, high))[1], jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """How one token is drawn from its distribution.

    The filters top_k, top_p and min_p, in this order, act on the probabilities at temperature 1, as in 4M.
    """

    temperature: float = 1.0
    """Divisor of the logits after the filters; 0 takes the most likely token."""
    top_k: float = 0
    """Keep the k most likely tokens; below 1, this share of the vocabulary (Fan et al. 2018). 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set that holds this much probability, in (0, 1] (Holtzman et al. 2020). 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest, in [0, 1) (Nguyen et al. 2024). 0 keeps all."""

    def check(self, modality: Modality) -> None:
        allowed = {
            "temperature": (lambda x: 0 <= x < math.inf, "at least 0"), "top_k": (lambda x: x >= 0, "at least 0"),
            "top_p": (lambda x: 0 < x <= 1, "within (0, 1]"), "min_p": (lambda x: 0 <= x < 1, "within [0, 1)"),
        }  # fmt: skip
        for name, (is_valid, allowed_range) in allowed.items():
            if not isinstance(value := getattr(self, name), int | float) or not is_valid(value):
                raise ValueError(f"{name}={value!r} of {type(self).__name__} must be {allowed_range}")

    def filtered(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """Logits; -inf where a token is filtered out. Equally likely tokens at a threshold all stay."""
        size, least = logits.shape[-1], jnp.finfo(jnp.float32).min
        for kind, value in (("top_k", self.top_k), ("top_p", self.top_p), ("min_p", self.min_p)):
            if value == (1 if kind == "top_p" else 0):
                continue
            p = jax.nn.softmax(logits)
            if kind == "top_k":
                k = min(max(int(value * size if value < 1 else value), 1), size)
                least = _smallest(lambda t, p=p, k=k: (p > t[..., None]).sum(-1) < k, p.shape[:-1])
            elif kind == "top_p":
                least = _smallest(lambda t, p=p, v=value: jnp.where(p > t[..., None], p, 0).sum(-1) <= v, p.shape[:-1])
            else:
                least = value * p.max(-1)
            logits = jnp.where(p >= least[..., None], logits, -jnp.inf)
        return logits

    def draw(
        self,
        logits: Float[Array, "*B V"],
        temperature: Float[Array, "..."] | float,
        random: Float[Array, "*B"] | Float[Array, "*B V"],
    ) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
        """Ids, and the log-probability with which each is drawn (at temperature 0: that of temperature 1).

        `random` is uniform in [0, 1), or Gumbel noise for all of the vocabulary.
        """
        if self.temperature == 0:
            log_probability = jax.nn.log_softmax(logits)
            ids = jnp.argmax(logits, -1)
        else:
            log_probability = jax.nn.log_softmax(self.filtered(logits) / temperature)
            if random.ndim == logits.ndim:
                ids = jnp.argmax(log_probability + random, -1)
            else:
                ids = _inverse_distribution(jnp.exp(log_probability), random)
        return ids, jnp.take_along_axis(log_probability, ids[..., None], axis=-1)[..., 0]


def _inverse_distribution(p: Float[Array, "*B V"], u: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """The first token up to which the probabilities add up to more than u: by blocks of 128, then within one."""
    blocks = jnp.pad(p, ((0, 0),) * (p.ndim - 1) + ((0, -p.shape[-1] % 128),)).reshape(*p.shape[:-1], -1, 128)

    def find(weights, u):
        total = jnp.cumsum(weights, -1)
        # Rounding must not lead past the last entry with any weight.
        return jnp.minimum((total <= u[..., None]).sum(-1), jnp.argmax(total >= total[..., -1:], -1)), total

    sums = blocks.sum(-1)
    u = u * sums.sum(-1)
    block, total = find(sums, u)
    # Nor may it lead before the block, to tokens that were filtered out.
    rest = jnp.maximum(u - jnp.take_along_axis(total - sums, block[..., None], axis=-1)[..., 0], 0)
    within, _ = find(jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :], rest)
    return block * 128 + within


def uniform(seeds: Int[np.ndarray, "B k"], num_steps: int, shape: tuple[int, ...]) -> Float[np.ndarray, "S B *shape"]:
    """Values in [0, 1), a function of a row's seeds, the step and the position, whatever else is in the batch.

    They are drawn on the host: they are few, and random bits take XLA longest to compile.
    """
    rows = [np.random.default_rng(row).random((num_steps, *shape), np.float32) for row in np.asarray(seeds).tolist()]
    return np.stack(rows, axis=1)
