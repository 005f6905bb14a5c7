"""Position embeddings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m4.tokens.batch import Array as TokenArray
from m4.tokens.modality import Modalities, Modality, Sequence


def sine_cosine(position: np.ndarray, width: int, base: float) -> np.ndarray:
    """[P] positions -> float32 [P width]: sines then cosines at frequencies base^-(i / (width / 2))."""
    exponent = np.arange(width // 2, dtype=np.float32) / np.float32(width // 2)
    frequency = np.float32(1) / np.power(np.float32(base), exponent)
    # The product is rounded to float32, as in 4M: far positions turn by many radians.
    angle = (position.astype(np.float32)[:, None] * frequency).astype(np.float64)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def positions_of(modality: Modality, width: int, base: float) -> np.ndarray:
    """Fixed position embeddings of one modality, float32 [max_tokens width]."""
    if isinstance(modality, Sequence) or len(modality.shape) == 1:
        return sine_cosine(np.arange(modality.max_tokens), width, base)
    rows, columns = np.divmod(np.arange(modality.max_tokens), modality.shape[-1])
    return np.concatenate([sine_cosine(x, width // 2, base) for x in (rows, columns)], axis=1)


@functools.lru_cache(maxsize=8)
def position_table(modalities: Modalities, width: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """Fixed position embeddings of all modalities, float32 [P width], and the first row of each modality, int32."""
    tables = [positions_of(m, width, base) for m in modalities]
    first = np.cumsum([0, *(len(t) for t in tables)])[:-1]
    return np.concatenate(tables), first.astype(np.int32)


def item_address(learned: Float[Array, "I D"], item: Int[TokenArray, "*B L"], base: float) -> Float[Array, "*B L D"]:
    """Rows of a table for the items 0 to I - 1; beyond, sines and cosines with the root mean square of its values."""
    num_items, width = learned.shape
    frequency = np.float32(base) ** -(np.arange(width // 2, dtype=np.float32) / (width // 2))
    angle = jnp.asarray(item)[..., None] * frequency.reshape(*[1] * item.ndim, -1)
    size = jnp.sqrt(2 * jnp.mean(jax.lax.stop_gradient(learned) ** 2))
    sines = size * jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.where((item < num_items)[..., None], learned[jnp.minimum(item, num_items - 1)], sines)
