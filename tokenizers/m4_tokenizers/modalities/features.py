"""Features of other networks as tokens: maps (CLIP, DINOv2, ImageBind), global vectors, and human poses.

Axes: N signals, h rows and w columns of a map, C values of a vector; signals are float32 [h w C] or [C].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from m4_tokenizers.losses import CosineDistance, SquaredError
from m4_tokenizers.modalities.image import check_arrays, write_array, write_image
from m4_tokenizers.networks.vectors import VectorDecoder, VectorEncoder
from m4_tokenizers.networks.vit import ViTDecoder, ViTEncoder
from m4_tokenizers.quantizers.vector import Memcodes, VectorQuantizer
from m4_tokenizers.vq import VQRecipe, VQTokenizer


def agreement(given: Float[np.ndarray, "N C"], decoded: Float[np.ndarray, "N C"]) -> dict[str, float]:
    """Mean cosine of vectors, and ||difference|| / ||given|| over all of them."""
    lengths = np.linalg.norm(given, axis=-1) * np.linalg.norm(decoded, axis=-1)
    cosine = np.einsum("nc,nc->n", given, decoded) / np.maximum(lengths, 1e-9)
    return {
        "cosine": float(cosine.mean()),
        "relative_error": float(np.linalg.norm(given - decoded) / max(np.linalg.norm(given), 1e-9)),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMapRecipe(VQRecipe):
    """Maps of image_size x image_size vectors: one token each."""

    signal: str = "clip"
    """Signal that is read."""
    name: str = "clip_tokens"
    """Name of the modality."""
    num_features: int = 512
    """Values of each vector."""
    image_size: int = 14
    """Rows and columns of vectors."""
    encoder: Any = ViTEncoder(patch_size=1)
    """Signal -> latents (m4_tokenizers.networks)."""
    quantizer: Any = VectorQuantizer()
    """Latents -> token ids (m4_tokenizers.quantizers)."""
    decoder: Any = ViTDecoder(patch_size=1)
    """Codes -> signal (m4_tokenizers.networks)."""
    losses: tuple[Any, ...] = (SquaredError(), CosineDistance())
    """Losses of the reconstruction (m4_tokenizers.losses); the weighted sum is minimised."""
    learning_rate: float = 5e-4
    """Peak learning rate of Adam."""

    kind = "features"

    @property
    def num_channels(self) -> int:
        return self.num_features

    @property
    def values(self) -> str:
        return f"vectors of {self.num_features} numbers"

    @property
    def signal_shape(self) -> tuple[int, ...]:
        return (self.image_size, self.image_size, self.num_features)

    def to_arrays(self, signals: Seq[Any]) -> Float[np.ndarray, "N h w C"]:
        arrays = check_arrays(signals, self.signal_shape, f"{self.signal} features")
        return arrays.reshape(-1, self.image_size, self.image_size, self.num_features).astype(np.float32)

    def to_signals(self, arrays: Float[np.ndarray, "N h w C"]) -> list[Any]:
        return list(arrays.reshape(-1, *self.signal_shape).astype(np.float32))

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        return agreement(*(np.stack(x).reshape(-1, self.num_features) for x in (given, decoded)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorRecipe(FeatureMapRecipe):
    """Single vectors: one token a codebook."""

    signal: str = "clip_global"
    """Signal that is read."""
    name: str = "clip_global_tokens"
    """Name of the modality."""
    image_size: int = 1
    """Rows and columns of vectors: 1."""
    encoder: Any = VectorEncoder()
    """Vector -> latent (m4_tokenizers.networks.vectors)."""
    quantizer: Any = Memcodes(num_codebooks=8, latent_size=128)
    """Latent -> token ids (m4_tokenizers.quantizers)."""
    decoder: Any = VectorDecoder()
    """Codes -> vector (m4_tokenizers.networks.vectors)."""

    @property
    def signal_shape(self) -> tuple[int, ...]:
        return (self.num_features,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoseRecipe(VectorRecipe):
    """A body's joints as rotation matrices: float32 [joints 3 3], 23 joints in SMPL (Loper et al. 2015)."""

    signal: str = "human_poses"
    """Signal that is read."""
    name: str = "human_poses_tokens"
    """Name of the modality."""
    num_features: int = 207
    """Values of a pose: 9 for each joint."""
    losses: tuple[Any, ...] = (SquaredError(),)
    """Losses of the reconstruction (m4_tokenizers.losses)."""

    @property
    def values(self) -> str:
        return f"{self.num_features // 9} rotation matrices"

    @property
    def signal_shape(self) -> tuple[int, ...]:
        return (self.num_features // 9, 3, 3)

    def to_signals(self, arrays: Float[np.ndarray, "N h w C"]) -> list[Any]:
        """The nearest rotations (Procrustes)."""
        u, _, v = np.linalg.svd(arrays.reshape(-1, *self.signal_shape))
        flip = np.ones((*u.shape[:2], 3))
        flip[..., 2] = np.linalg.det(u @ v)
        return list(((u * flip[..., None, :]) @ v).astype(np.float32))

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """Mean angle, in degrees, between true and decoded rotations of joints."""
        traces = np.einsum("njab,njab->nj", np.stack(given), np.stack(decoded))
        return {"mean_angle": float(np.degrees(np.arccos(((traces - 1) / 2).clip(-1, 1))).mean())}


class FeatureTokenizer(VQTokenizer):
    component = "features"

    def write(self, signal: np.ndarray, folder: Path, *, image: np.ndarray | None) -> None:
        write_array(signal, folder, f"{self.modality.signal}.npy")
        write_image(self.draw(signal, image=image), folder, f"{self.modality.signal}.png")

    def draw(self, signal: np.ndarray, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        """Maps in the colours of their first three principal components, vectors as grey bars."""
        if signal.ndim == 3 and signal.shape == self.recipe.signal_shape and self.recipe.image_size > 1:
            flat = signal.reshape(-1, signal.shape[-1]) - signal.reshape(-1, signal.shape[-1]).mean(axis=0)
            first = (flat @ np.linalg.svd(flat, full_matrices=False)[2][:3].T).reshape(*signal.shape[:2], -1)
            picture = np.pad(first, ((0, 0), (0, 0), (0, 3 - first.shape[-1])))
        else:
            picture = np.repeat(np.repeat(signal.reshape(1, -1, 1), 3, axis=2), 32, axis=0)
        low, high = picture.min(), picture.max()
        return ((picture - low) / max(high - low, 1e-9) * 255).astype(np.uint8)


for recipe in (FeatureMapRecipe, VectorRecipe, PoseRecipe):
    recipe.tokenizer_class = FeatureTokenizer
