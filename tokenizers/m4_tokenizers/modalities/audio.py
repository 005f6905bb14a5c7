"""Sounds as a grid of learned tokens of their mel spectrogram; Griffin-Lim recovers the sound.

    sound [T] --Fourier--> magnitudes [F K] --mel bands--> dB --> array [H W 1] --VQTokenizer--> ids
    sound [T] <--phases--- magnitudes [F K] <--spread------ dB <-- array [H W 1] <--------------- ids

Axes: N sounds, T samples, F frames (= W, columns), M mel bands (= H, rows, the highest on top), K frequencies
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Complex64, Float, Float32, UInt8
from scipy import fft
from scipy.io import wavfile
from scipy.signal import get_window

from m4.data.sources.sounds import Sound, of_length
from m4.data.sources.spoken import RATE
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.image import check_arrays, write_image
from m4_tokenizers.modalities.maps import shade
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.vq import VQRecipe, VQTokenizer

MOMENTUM = 0.99  # of Griffin-Lim
NUM_SPREADS = 30  # steps from mel bands to magnitudes
NUM_CEPSTRAL = 13  # coefficients that a cepstral distortion compares, loudness left out


# ---- Fourier transforms of overlapping frames -----------------------------------------------------------------------


@functools.cache
def _window(hop: int) -> Float32[np.ndarray, " W"]:
    """Hann, two hops long."""
    return get_window("hann", 2 * hop).astype(np.float32)


def stft(sounds: Float32[np.ndarray, "N T"], hop: int) -> Complex64[np.ndarray, "N F K"]:
    """A frame for each hop, around its middle; a sine of amplitude 1 has magnitude 1 at its frequency."""
    padded = np.pad(sounds, ((0, 0), (hop // 2, hop - hop // 2)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * hop, axis=1)[:, ::hop]
    return fft.rfft(frames * (_window(hop) / np.float32(hop / 2)), axis=-1)


def istft(spectra: Complex64[np.ndarray, "N F K"], hop: int) -> Float32[np.ndarray, "N T"]:
    """The sounds whose `stft` is nearest: Griffin & Lim 1984, equation 6."""
    window = _window(hop)
    frames = fft.irfft(spectra, axis=-1) * window
    num_sounds, num_frames, _ = frames.shape
    total, weight = np.zeros((num_sounds, num_frames + 1, hop), np.float32), np.zeros((num_frames + 1, hop), np.float32)
    for half in range(2):
        part = slice(half * hop, (half + 1) * hop)
        total[:, half : half + num_frames] += frames[..., part]
        weight[half : half + num_frames] += window[part] ** 2 / np.float32(hop / 2)
    sounds = (total / np.maximum(weight, 1e-8)).reshape(num_sounds, -1)
    return sounds[:, hop // 2 : hop // 2 + num_frames * hop]


def griffin_lim(magnitudes: Float32[np.ndarray, "N F K"], hop: int, *, num_steps: int) -> Float32[np.ndarray, "N T"]:
    """Sounds that have about these magnitudes, from random phases that are always the same.

    The fast variant of Perraudin et al. 2013, "A fast Griffin-Lim algorithm", section 3: each step extrapolates the
    change of the last one.
    """
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, magnitudes.shape[1:])
    spectra, before = magnitudes * np.exp(1j * phases).astype(np.complex64), np.complex64(0)
    for _ in range(num_steps):
        consistent = stft(istft(spectra, hop), hop)
        ahead = consistent + np.float32(MOMENTUM) * (consistent - before)
        spectra = magnitudes * (ahead / np.maximum(np.abs(ahead), np.float32(1e-9)))
        before = consistent
    return istft(spectra, hop)


# ---- Mel bands ------------------------------------------------------------------------------------------------------


@functools.cache
def mel_bands(num_bands: int, num_frequencies: int, rate: int) -> Float32[np.ndarray, "M K"]:
    """The weights of frequencies from 0 to rate / 2 in each band, from high to low: triangles of sum 1.

    Their tips are equally spaced in mel = 2595 log10(1 + Hz / 700); none is narrower than two frequencies.
    """
    frequencies = np.linspace(0, rate / 2, num_frequencies)
    tips = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + rate / 1400), num_bands + 2) / 2595) - 1)
    low, tip, high = tips[:-2, None], tips[1:-1, None], tips[2:, None]
    step = frequencies[1]
    rising, falling = (
        (frequencies - tip) / np.maximum(tip - low, step),
        (tip - frequencies) / np.maximum(high - tip, step),
    )
    weights = np.maximum(0, 1 + np.minimum(rising, falling))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)[::-1]


def spread(bands: Float32[np.ndarray, "N F M"], weights: Float32[np.ndarray, "M K"]) -> Float32[np.ndarray, "N F K"]:
    """Magnitudes, none negative, whose bands approximate the given: least squares by the multiplicative steps of Lee
    & Seung 2001, "Algorithms for non-negative matrix factorization", theorem 1."""
    target = bands @ weights
    magnitudes = target / np.maximum(weights.sum(axis=0), np.float32(1e-9))
    for _ in range(NUM_SPREADS):
        magnitudes = magnitudes * (target / np.maximum(magnitudes @ weights.T @ weights, np.float32(1e-12)))
    return magnitudes


# ---- The tokenizer --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioRecipe(VQRecipe):
    """Sounds as image_size mel bands of image_size frames."""

    signal: str = "audio"
    """Signal that is read."""
    name: str = "audio_tokens"
    """Name of the modality."""
    seconds: float = 2.048
    """Length of a sound; seconds * rate is a multiple of image_size."""
    rate: int = RATE
    """Samples a second."""
    lowest: float = -80.0
    """Level in dB below which a sound counts as silent; 0 is a sine of full scale."""
    num_phase_steps: int = 32
    """Steps of Griffin-Lim, which finds the phases."""
    quantizer: Any = LearnedVectorQuantizer(num_codes=512)
    """Latents -> token ids (m4_tokenizers.quantizers)."""

    kind = "audio"
    num_channels = 1

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples % self.image_size or self.hop < 1:
            near = max(1, round(self.seconds * self.rate / self.image_size)) * self.image_size / self.rate
            raise ValueError(
                f"seconds={self.seconds:g} at rate={self.rate} are {self.num_samples} samples; allowed: a multiple of "
                f"image_size={self.image_size}, as seconds={near:g}"
            )
        if not self.lowest < 0:
            raise ValueError(f"lowest={self.lowest} dB must be below 0, which is a sine of full scale")

    @property
    def num_samples(self) -> int:
        return round(self.seconds * self.rate)

    @property
    def hop(self) -> int:
        """Samples from frame to frame."""
        return self.num_samples // self.image_size

    @property
    def values(self) -> str:
        return f"float [{self.num_samples}] in [-1, 1], {self.rate} samples a second"

    @property
    def bands(self) -> Float32[np.ndarray, "M K"]:
        return mel_bands(self.image_size, self.hop + 1, self.rate)

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        """A raw example's sound; one from a file at the recipe's rate and length."""
        sound = super().signal_of(example)
        if not isinstance(sound, Sound):
            return sound
        samples = sound.at(self.rate)
        if len(samples) > self.num_samples:
            warnings.warn(
                f"a sound of {len(samples) / self.rate:.2f} s cut to the first {self.seconds:g}", stacklevel=2
            )
        return of_length(samples, self.num_samples)

    def levels(self, signals: Seq[Any]) -> Float32[np.ndarray, "N M F"]:
        """Loudness of each band in dB, from `lowest` to 0. ValueError for other signals than sounds of this length."""
        sounds = check_arrays(signals, (self.num_samples,), f"a sound ({self.signal})")
        if not np.issubdtype(sounds.dtype, np.floating):
            raise ValueError(f"a sound of {sounds.dtype} was given; allowed: {self.values} (16 bits: divide by 32768)")
        if not np.isfinite(sounds).all():
            raise ValueError("a sound has samples that are not finite")
        if np.abs(sounds).max() > 2:
            raise ValueError(f"a sound reaches {np.abs(sounds).max():.4g}, but this tokenizer reads {self.values}")
        magnitudes = np.abs(stft(sounds.astype(np.float32), self.hop))
        loudness = np.einsum("nfk,mk->nmf", magnitudes, self.bands, optimize=True)
        return (20 * np.log10(np.maximum(loudness, 1e-9))).clip(self.lowest, 0).astype(np.float32)

    def to_arrays(self, signals: Seq[Any]) -> Float[np.ndarray, "N H W C"]:
        return (1 - 2 * self.levels(signals) / np.float32(self.lowest))[..., None]

    def to_signals(self, arrays: Float[np.ndarray, "N H W C"]) -> list[Any]:
        levels = (1 - arrays[..., 0].clip(-1, 1)) / 2 * np.float32(self.lowest)
        loudness = np.where(levels > self.lowest, 10 ** (levels / 20), 0).astype(np.float32)
        magnitudes = spread(np.moveaxis(loudness, 1, 2), self.bands)
        return list(griffin_lim(magnitudes, self.hop, num_steps=self.num_phase_steps).clip(-1, 1))

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """Distances in dB between mel spectrograms in the frames that are not silent.

        spectral_distance: root mean square over bands, mean over frames. cepstral_distortion: the same over the shape
        of the spectrum alone, smoothed (Kubichek 1993, "Mel-cepstral distance measure").
        """
        levels, others = self.levels(given), self.levels(decoded)
        is_audible = (levels > self.lowest).any(axis=1)
        error = np.moveaxis(levels - others, 1, 2)[is_audible if is_audible.any() else ...]
        cepstra = fft.dct(error, norm="ortho", axis=-1)[..., 1 : 1 + NUM_CEPSTRAL]
        root_mean = lambda x: float(np.sqrt((x**2).sum(axis=-1) / self.image_size).mean())  # noqa: E731
        return {"spectral_distance": root_mean(error), "cepstral_distortion": root_mean(cepstra)}


class AudioTokenizer(VQTokenizer):
    component = "audio"

    def evaluate(self, examples: Examples, *, mean: Any) -> dict[str, Any]:
        """The card; measures `_of_spectrogram` are those of reconstructions without tokens, an upper bound."""
        given = [self.signal_of(example) for example in examples]
        back = [self.recipe.to_signals(self.recipe.to_arrays([sound]))[0] for sound in given]
        bound = self.recipe.measure(given, back, examples)
        card = super().evaluate(examples, mean=mean)
        return {**card, **{f"{k}_of_spectrogram": round(v, 4) for k, v in bound.items()}}

    def write(self, signal: np.ndarray, folder: Path, *, image: np.ndarray | None) -> None:
        """A sound (of floats, which are stored exactly), and its spectrogram."""
        name = self.modality.signal
        write_image(self.draw(signal, image=image), folder, f"{name}.png")
        wavfile.write(Path(folder) / f"{name}.wav", self.recipe.rate, signal.clip(-1, 1).astype(np.float32))

    def draw(self, signal: np.ndarray, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        """The spectrogram: time to the right, high bands on top, loud light."""
        return shade((self.recipe.to_arrays([signal])[0, ..., 0] + 1) / 2)


AudioRecipe.tokenizer_class = AudioTokenizer
