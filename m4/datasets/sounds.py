"""Sounds from files, at any rate.

Axes: T samples.
"""

import io
import math
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

INSTALL = 'pip install "m4-jax[audio]"'


class Sound(NamedTuple):
    """float32 [T] in [-1, 1], the mean of all channels, `rate` samples a second."""

    samples: Float32[np.ndarray, " T"]
    rate: int

    def at(self, rate: int) -> Float32[np.ndarray, " t"]:
        """The samples at another rate."""
        from scipy.signal import resample_poly  # here: most that reads files reads no sounds

        common = math.gcd(rate, self.rate)
        resampled = resample_poly(self.samples, rate // common, self.rate // common)
        return resampled.astype(np.float32).clip(-1, 1)


def decode_sound(data: bytes) -> Sound:
    """wav, ogg, flac, mp3, ... ValueError if it is damaged or empty, or if the package soundfile is missing."""
    soundfile = check_installed()
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"not a readable sound ({str(error).rpartition(': ')[2]})") from error
    if not len(samples):
        raise ValueError("it holds no sound: it is 0 samples long")
    if not np.isfinite(samples).all():
        raise ValueError("it has samples that are not finite")
    return Sound(samples.mean(axis=1), rate)


def of_length(sound: Float32[np.ndarray, " T"], num_samples: int) -> Float32[np.ndarray, " t"]:
    """The beginning of a sound, followed by silence if it is too short."""
    return np.pad(sound[:num_samples], (0, max(0, num_samples - len(sound))))


def check_installed() -> ModuleType:
    """The package soundfile. ValueError if it is missing."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # the package, or the library that it calls
        raise ValueError(f"reading sounds needs the package soundfile ({error}); {INSTALL}") from error
    return soundfile
