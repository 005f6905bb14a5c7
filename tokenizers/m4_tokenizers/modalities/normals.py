"""Surface normals as a grid of learned tokens.

Axes: N images, H rows, W columns, C = x right, y down, z forward or as the data has them; float32 [H W 3] unit vectors,
zero where unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from m4_tokenizers.modalities.image import check_arrays, write_array, write_image
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.vq import VQRecipe, VQTokenizer

Normals = Float[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalsRecipe(VQRecipe):
    """Unit vectors; a decoded vector shorter than 1/2 reads as unknown."""

    signal: str = "normals"
    """Signal that is read."""
    name: str = "normals_tokens"
    """Name of the modality."""
    quantizer: Any = LearnedVectorQuantizer(num_codes=512)
    """Latents -> token ids (m4_tokenizers.quantizers)."""

    kind = "normals"
    num_channels = 3
    values = "unit vectors, zero = unknown"

    def to_arrays(self, signals: Seq[Any]) -> Float[np.ndarray, "N H W C"]:
        normals = check_arrays(signals, (self.image_size, self.image_size, 3), "a normal map").astype(np.float32)
        length = np.sqrt(np.einsum("nhwc,nhwc->nhw", normals, normals))
        if length.max(initial=0) > 1.05:
            raise ValueError(f"normals of length {length.max():.3g} were given; allowed: unit vectors, or zero")
        return normals

    def to_signals(self, arrays: Float[np.ndarray, "N H W C"]) -> list[Any]:
        length = np.sqrt(np.einsum("nhwc,nhwc->nhw", arrays, arrays))[..., None]
        return list(np.where(length > 0.5, arrays / np.maximum(length, 1e-6), 0).astype(np.float32))

    def mean_signal(self, arrays: np.ndarray) -> Any:
        mean = arrays.mean(axis=0)
        return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)

    def loss_weights(self, x: Array) -> Array:
        return jnp.ones_like(x)

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """Mean angle in degrees and share within 11.25 degrees, where normals are known (90 degrees if not decoded)."""
        a, b = np.stack(given), np.stack(decoded)
        known = np.einsum("nhwc,nhwc->nhw", a, a) > 0.5
        out, angle = {}, np.degrees(np.arccos(np.einsum("nhwc,nhwc->nhw", a, b).clip(-1, 1)))
        regions = {"": known}
        if all("instance" in example for example in examples):
            regions["_on_objects"] = known & (np.stack([example["instance"] for example in examples]) > 0)
        for name, where in regions.items():
            out[f"mean_angle{name}"] = float(angle[where].mean())
            out[f"within_11_degrees{name}"] = float((angle[where] < 11.25).mean())
        return out


class NormalsTokenizer(VQTokenizer):
    component = "normals"

    def write(self, signal: Normals, folder: Path, *, image: np.ndarray | None) -> None:
        write_image(self.draw(signal, image=image), folder, f"{self.modality.signal}.png")
        write_array(signal, folder, f"{self.modality.signal}.npy")

    def draw(self, signal: Normals, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        return np.round((signal + 1) * 127.5).clip(0, 255).astype(np.uint8)


NormalsRecipe.tokenizer_class = NormalsTokenizer
