"""Images: as a grid of learned tokens, and as plain pixel patches (input only).

Axes: H rows, W columns; images are uint8 [H W 3].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8, UInt16
from PIL import Image
from scipy import ndimage

from m4.tokens.modality import Features
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.reading import Reader
from m4_tokenizers.networks.patches import to_patches, to_pixels
from m4_tokenizers.networks.perceptual import perceptual_quality
from m4_tokenizers.vq import VQRecipe, VQTokenizer

Pixels = UInt8[np.ndarray, "H W 3"]


def check_images(signals: Seq[Any], size: int) -> UInt8[np.ndarray, "N H W 3"]:
    for image in signals:
        given = f"{getattr(image, 'dtype', type(image).__name__)} {list(np.shape(image))}"
        if given != f"uint8 [{size}, {size}, 3]":
            raise ValueError(f"an image of {given} was given; allowed: uint8 [{size}, {size}, 3]")
    return np.stack(signals)


def peak_ratio(error: np.ndarray) -> float:
    """PSNR in dB from squared errors of values in [0, 1]."""
    return round(float(-10 * np.log10(max(error.mean(), 1e-10))), 2)


def write_image(image: Pixels | UInt8[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"], folder: Path, name: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(Path(folder) / name)


def write_array(array: np.ndarray, folder: Path, name: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    np.save(Path(folder) / name, array)


def check_arrays(signals: Seq[Any], shape: tuple[int, ...], what: str, kinds: str = "iuf") -> np.ndarray:
    """Signals of one shape and of dtypes of these kinds, stacked; ValueError names any other."""
    for signal in signals:
        if np.shape(signal) != shape:
            raise ValueError(f"{what} of {list(np.shape(signal))} was given; allowed: {list(shape)}")
        if np.asarray(signal).dtype.kind not in kinds:
            raise ValueError(f"{what} of {np.asarray(signal).dtype} was given; allowed: {_named(kinds)}")
    return np.stack(signals)


def _named(kinds: str) -> str:
    return ", ".join({"i": "integers", "f": "floats", "b": "bool"}[kind] for kind in kinds if kind != "u")


def structural_similarity(a: Float[np.ndarray, "H W C"], b: Float[np.ndarray, "H W C"]) -> float:
    """SSIM of images in [0, 1] (Wang et al. 2004), Gaussian windows of sigma 1.5; 1 = equal."""
    blur = lambda x: ndimage.gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)  # noqa: E731
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return float((luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2)).mean())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRecipe(VQRecipe):
    """Images of image_size x image_size, uint8."""

    signal: str = "rgb"
    """Signal that is read."""
    name: str = "rgb_tokens"
    """Name of the modality."""

    kind = "image"
    num_channels = 3
    values = "uint8, 0 to 255"

    def to_arrays(self, signals: Seq[Any]) -> Float[np.ndarray, "N H W C"]:
        return check_images(signals, self.image_size).astype(np.float32) / np.float32(127.5) - np.float32(1)

    def to_signals(self, arrays: Float[np.ndarray, "N H W C"]) -> list[Any]:
        return list(np.round((arrays.clip(-1, 1) + 1) * 127.5).astype(np.uint8))

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """PSNR in dB over all examples (and over their objects, where instances are known), mean SSIM, and
        distances in VGG16's features where its weights are installed."""
        a, b = (np.stack(x) / np.float32(255) for x in (given, decoded))
        error = (a - b) ** 2
        pairs = list(zip(a, b, strict=True))[:128]
        out = {"psnr": peak_ratio(error), "ssim": float(np.mean([structural_similarity(x, y) for x, y in pairs]))}
        if all("instance" in example for example in examples):
            out["psnr_on_objects"] = peak_ratio(error[np.stack([example["instance"] for example in examples]) > 0])
        return {**out, **perceptual_quality(given, decoded)}


class ImageFiles:
    """`write` and `draw` of images."""

    modality: Any

    def write(self, signal: Pixels, folder: Path, *, image: np.ndarray | None) -> None:
        write_image(signal, folder, f"{self.modality.signal}.png")

    def draw(self, signal: Pixels, *, image: np.ndarray | None) -> Pixels:
        return signal


class ImageTokenizer(ImageFiles, VQTokenizer):
    component = "image"


ImageRecipe.tokenizer_class = ImageTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelPatchesRecipe:
    """Patches of unchanged pixels, channels fastest; the model normalises them."""

    signal: str = "rgb"
    """Signal that is read."""
    name: str = "rgb_pixels"
    """Name of the modality."""
    image_size: int = 64
    """Rows and columns of the images, pixels."""
    patch_size: int = 8
    """Rows and columns of a patch, pixels."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean of each channel, of values in [0, 1]."""
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    """Standard deviation of each channel."""

    kind = "image"

    @property
    def modality(self) -> Features:
        return Features(
            name=self.name,
            signal=self.signal,
            shape=(self.image_size // self.patch_size,) * 2,
            size=self.patch_size**2 * 3,
            scale=255.0,
            mean=self.mean,
            std=self.std,
            dtype="uint8",
        )

    def fit(self, source: Examples, *, seed: int) -> "PixelPatches":
        card = {
            "component": "pixels",
            "signal": self.signal,
            "values": "uint8, 0 to 255",
            "mean": list(self.mean),
            "std": list(self.std),
            "tokens_per_sample": self.modality.max_tokens,
        }
        return PixelPatches(recipe=self, card=card)


class PixelPatches(ImageFiles, Reader):
    kind = "image"

    def __init__(self, *, recipe: PixelPatchesRecipe, card: dict[str, Any]):
        self.recipe, self.card, self.modality = recipe, card, recipe.modality

    def check(self, signal: Any) -> None:
        check_images([signal], self.recipe.image_size)

    def encode(self, signals: Seq[Any]) -> list[np.ndarray]:
        images = [check_images([signal], self.recipe.image_size) for signal in signals]
        return [to_patches(image, self.recipe.patch_size).reshape(-1, self.modality.size) for image in images]

    def decode(self, ids: Seq[np.ndarray]) -> list[Pixels]:
        patches = np.stack(ids).reshape(len(ids), *self.modality.shape, self.modality.size)
        return list(to_pixels(patches, self.recipe.patch_size).astype(np.uint8))

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        return example[self.modality.signal] if self.modality.signal in example else None

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return dataclasses.asdict(self.recipe), {}

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]) -> "PixelPatches":
        config = {**config, "mean": tuple(config["mean"]), "std": tuple(config["std"])}
        return cls(recipe=PixelPatchesRecipe(**config), card=card)
