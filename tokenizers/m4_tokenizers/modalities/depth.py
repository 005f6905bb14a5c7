"""Depth maps as a grid of learned tokens.

Two channels: log-depth, scaled to [-1, 1] over [min_depth, max_depth], and validity, negative where unknown. Unknown
pixels read as the mean of the known ones in their patch (max_depth where there are none), so that codes are not spent
on edges of unknown regions; their depth is not part of the loss.

Axes: N images, H rows, W columns, C channels; depth is float32 [H W] in metres, 0 = unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from m4_tokenizers.modalities.image import write_array, write_image
from m4_tokenizers.networks.patches import to_patches, to_pixels
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.vq import VQRecipe, VQTokenizer

Depth = Float[np.ndarray, "H W"]
FINEST, FARTHEST = 0.1, 65.534  # metres that an image of 16 bits stores well
VALIDITY = 0.5  # of a known pixel: validity is a sign, and needs less precision than depth

# From near (light) to far (dark): lightness falls evenly, so that nearer looks nearer in grey, too.
COLOURS = np.array(
    [[252, 246, 196], [253, 202, 126], [245, 147, 93], [220, 90, 98], [172, 51, 115], [116, 32, 115], [60, 24, 86]]
)


def depth_quality(given: np.ndarray, predicted: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """delta1 (share within a factor of 1.25; unknown counts as wrong) and AbsRel (of known predictions) on `where`."""
    given, predicted = given[where], predicted[where]
    known = predicted > 0
    ratio = np.maximum(given, predicted) / np.maximum(np.minimum(given, predicted), 1e-6)
    relative = np.abs(predicted - given)[known] / given[known]
    return {
        "delta1": round(float(np.mean(known & (ratio < 1.25))), 4),
        "abs_rel": round(float(relative.mean()) if known.any() else float("inf"), 4),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthRecipe(VQRecipe):
    """Depths in metres."""

    signal: str = "depth"
    """Signal that is read."""
    name: str = "depth_tokens"
    """Name of the modality."""
    min_depth: float = 0.5
    """Smallest depth, metres; smaller ones are clipped."""
    max_depth: float = 30.0
    """Largest depth, metres; larger ones are clipped."""
    quantizer: Any = LearnedVectorQuantizer(num_codes=512)
    """Latents -> token ids (m4_tokenizers.quantizers)."""
    num_steps: int = 400
    """Training steps."""

    kind = "depth"
    num_channels = 2

    @property
    def values(self) -> str:
        return f"metres, {self.min_depth} to {self.max_depth}, 0 = unknown"

    def to_arrays(self, signals: Seq[Any]) -> Float[np.ndarray, "N H W C"]:
        size = self.image_size
        for depth in signals:
            given = f"{getattr(depth, 'dtype', type(depth).__name__)} {list(np.shape(depth))}"
            if given != f"float32 [{size}, {size}]":
                raise ValueError(f"a depth map of {given} was given; allowed: float32 [{size}, {size}] in metres")
        metres = np.stack(signals)
        if not np.isfinite(metres).all() or metres.min() < 0:
            raise ValueError("a depth map has numbers that are negative or not finite; unknown depth is 0")
        known = metres > 0
        for depth in metres:
            middle = np.median(depth[depth > 0]) if (depth > 0).any() else self.min_depth
            if not self.min_depth / 4 <= middle <= 4 * self.max_depth:
                raise ValueError(
                    f"a depth map has a median of {middle:,.4g}, but this tokenizer reads metres from {self.min_depth} "
                    f"to {self.max_depth}: are its units others (millimetres: divide by 1000)?"
                )
        clipped = np.where(known, metres, self.max_depth).clip(self.min_depth, self.max_depth)
        position = 2 * np.log(clipped / self.min_depth) / np.log(self.max_depth / self.min_depth) - 1
        patch_size = self.encoder.patch_size
        blocks, counted = (to_patches(x[..., None], patch_size) for x in (position, known))
        sums = np.sum(blocks * counted, axis=-1, keepdims=True)
        means = np.where(counted.any(axis=-1, keepdims=True), sums / np.maximum(counted.sum(-1, keepdims=True), 1), 1)
        position = to_pixels(np.where(counted, blocks, means), patch_size)[..., 0]
        return np.stack([position, np.where(known, VALIDITY, -VALIDITY)], axis=-1).astype(np.float32)

    def to_signals(self, arrays: Float[np.ndarray, "N H W C"]) -> list[Any]:
        position, known = (arrays[..., 0].clip(-1, 1) + 1) / 2, arrays[..., 1] > 0
        metres = self.min_depth * np.exp(position * np.log(self.max_depth / self.min_depth))
        return list(np.where(known, metres, 0).astype(np.float32))

    def loss_weights(self, x: Array) -> Array:
        return jnp.stack([x[..., 1] > 0, jnp.ones_like(x[..., 1], bool)], axis=-1).astype(x.dtype)

    def mean_signal(self, arrays: np.ndarray) -> Any:
        # The mean map has a depth even where most examples have none: it is compared on known pixels.
        position = arrays[..., 0].mean(axis=0)
        return self.to_signals(np.stack([position, np.ones_like(position)], axis=-1)[None])[0]

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """delta1 and AbsRel on known pixels (and on those of objects, where all examples have instances)."""
        true, predicted = np.stack(given), np.stack(decoded)
        out = {**depth_quality(true, predicted, true > 0), "known_agreement": np.mean((predicted > 0) == (true > 0))}
        if all("instance" in example for example in examples):
            on_object = (np.stack([example["instance"] for example in examples]) > 0) & (true > 0)
            out.update({f"{k}_on_objects": v for k, v in depth_quality(true, predicted, on_object).items()})
        return {k: float(v) for k, v in out.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeDepthRecipe(VQRecipe):
    """Depth without units, as the released 4M tokenizers read it: standardised by mean and deviation of the middle 80%.

    Signals are float32 [H W] of any scale; what comes back is standardised.
    """

    signal: str = "depth"
    """Signal that is read."""
    name: str = "depth_tokens"
    """Name of the modality."""

    kind = "relative_depth"
    num_channels = 1
    values = "relative depth, standardised"

    def to_arrays(self, signals: Seq[Any]) -> Float[np.ndarray, "N H W C"]:
        maps = np.stack([np.asarray(signal, np.float32) for signal in signals])
        if maps.shape[1:] != (self.image_size, self.image_size):
            raise ValueError(f"depth maps of {list(maps.shape[1:])} were given; allowed: [{self.image_size}] * 2")
        middle = np.sort(maps.reshape(len(maps), -1), axis=1)
        middle = middle[:, int(0.1 * middle.shape[1]) : int(0.9 * middle.shape[1])]
        scale = np.sqrt(middle.var(axis=1, ddof=1) + 1e-6)
        return ((maps - middle.mean(axis=1)[:, None, None]) / scale[:, None, None])[..., None].astype(np.float32)

    def to_signals(self, arrays: Float[np.ndarray, "N H W C"]) -> list[Any]:
        return list(arrays[..., 0])

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """Mean absolute difference of standardised maps."""
        return {"mean_error": float(np.abs(self.to_arrays(given)[..., 0] - np.stack(decoded)).mean())}


class DepthTokenizer(VQTokenizer):
    component = "depth"

    def write(self, signal: Depth, folder: Path, *, image: np.ndarray | None) -> None:
        """<signal>.png of millimetres and <signal>_color.png; where these are too coarse or too few, <signal>.npy."""
        name, known = self.modality.signal, signal[signal > 0]
        if known.size and not (known.min() >= FINEST and known.max() <= FARTHEST):
            write_array(signal, folder, f"{name}.npy")
        millimetres = np.round(signal * 1000).clip(0, round(FARTHEST * 1000)).astype(np.uint16)
        write_image(millimetres, folder, f"{name}.png")
        write_image(self.draw(signal, image=image), folder, f"{name}_color.png")

    def draw(self, signal: Depth, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        """Near light, far dark, unknown black."""
        position = (self.recipe.to_arrays([signal.astype(np.float32)])[0, ..., 0] + 1) / 2 * (len(COLOURS) - 1)
        channels = [np.interp(position, np.arange(len(COLOURS)), COLOURS[:, c]) for c in range(3)]
        return np.where(signal[..., None] > 0, np.stack(channels, axis=-1), 0).astype(np.uint8)


class RelativeDepthTokenizer(DepthTokenizer):
    component = "relative_depth"

    def write(self, signal: Depth, folder: Path, *, image: np.ndarray | None) -> None:
        name = self.modality.signal
        write_array(signal, folder, f"{name}.npy")
        write_image(self.draw(signal, image=image), folder, f"{name}_color.png")

    def draw(self, signal: Depth, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        position = (signal - signal.min()) / max(np.ptp(signal), 1e-6) * (len(COLOURS) - 1)
        channels = [np.interp(position, np.arange(len(COLOURS)), COLOURS[:, c]) for c in range(3)]
        return np.stack(channels, axis=-1).astype(np.uint8)


DepthRecipe.tokenizer_class = DepthTokenizer
RelativeDepthRecipe.tokenizer_class = RelativeDepthTokenizer
