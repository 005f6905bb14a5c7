"""Sounds from files, at any rate.

Axes: T samples.
"""

from __future__ import annotations

import io
import math
import re
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

RATES = (100, 1_000_000)  # samples a second; resampling from others takes minutes and gigabytes
MAX_SAMPLES = 2**29  # of all channels of a file, by its header
LOUDEST = 2.0  # largest float, where 1 is full scale: integers stored as floats are beyond it
LOST = 64  # bytes by which a header may exceed the data
STREAMED = 2**31 - 2**16  # bytes: headers announce as many or more where the length was not known

# libsndfile's report on files that are shorter than their header says.
SHORTER = re.compile(r"(?i)\b(?:data|SSND|data size) *: (\d+) \(should be (\d+)\)")
INSTALL = 'pip install "m4-jax[audio]"'


class Sound(NamedTuple):
    """float32 [T] in [-1, 1], the mean of all channels, `rate` samples a second."""

    samples: Float32[np.ndarray, " T"]
    rate: int

    def at(self, rate: int) -> Float32[np.ndarray, " t"]:
        """The samples at another rate."""
        from scipy.signal import resample_poly  # here: most readers of files read no sounds

        common = math.gcd(rate, self.rate)
        resampled = resample_poly(self.samples, rate // common, self.rate // common)
        return resampled.astype(np.float32).clip(-1, 1)


def decode_sound(data: bytes) -> Sound:
    """wav, ogg, flac, mp3, ... ValueError if it is damaged, truncated (by its header), empty or no sound of usual
    rate and loudness, or if the package soundfile is missing."""
    soundfile = check_installed()
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, size = file.samplerate, file.frames * file.channels
            if not RATES[0] <= rate <= RATES[1]:
                raise ValueError(f"it has {rate:,} samples a second; allowed: {RATES[0]} to {RATES[1]:,}")
            if size > MAX_SAMPLES:
                raise ValueError(f"it has {size:,} samples; allowed: at most {MAX_SAMPLES:,}")
            for announced, stored in SHORTER.findall(file.extra_info):
                if int(stored) + LOST < int(announced) < STREAMED:
                    raise ValueError(f"it is cut: {stored} bytes of sound are there, {announced} were written")
            samples = file.read(dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"not a readable sound ({str(error).rpartition(': ')[2]})") from error
    if not len(samples):
        raise ValueError("it holds no sound: it is 0 samples long")
    if not np.isfinite(samples).all():
        raise ValueError("it has samples that are not finite")
    if np.abs(samples).max() > LOUDEST:
        raise ValueError(f"it reaches {np.abs(samples).max():.4g}, where 1 is full scale; allowed: floats from -1 to 1")
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
