"""Diffusion decoders: noise, and the tokens of a signal -> the signal, in a chosen number of denoising steps.

    training    x, noise, step t  ->  noised = sqrt(a_t) x + sqrt(1 - a_t) noise  ->  network(noised, t, codes) ~ target
    decoding    noise -> network -> DDIM step -> network -> ... -> x       deterministic given the first noise

a_t is the share of the signal's variance that is left at step t (0 = nearly clean, num_steps - 1 = pure noise).

B batch, H rows, W columns, C channels, h rows and w columns of tokens, D values of a latent, T steps
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m4_tokenizers.networks.patches import DecoderModule


def cumulative(x: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Cumulative products of float32 values, accumulated in float64 as torch does."""
    return np.cumprod(x, dtype=np.float64).astype(np.float32)


Prediction = Literal["sample", "epsilon", "v_prediction"]
Spacing = Literal["trailing", "leading", "linspace"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How much signal is left at each step, what the network predicts, and how that is bounded."""

    kind: str = "shifted_cosine:0.5"
    """Betas "linear" (Ho et al. 2020), "scaled_linear" (Rombach et al. 2022) or "squaredcos_cap_v2" (Nichol & Dhariwal
    2021). "shifted_cosine:S" moves the cosine schedule by log S in log-SNR (Hoogeboom et al. 2023, section 3.1): S < 1
    is less noise."""
    num_steps: int = 1000
    """Steps from the clean signal to pure noise."""
    prediction: Prediction = "v_prediction"
    """What the network predicts: the clean signal ("sample"), the noise ("epsilon"), or v = sqrt(a) noise - sqrt(1 - a)
    signal ("v_prediction", Salimans & Ho 2022)."""
    zero_terminal_snr: bool = True
    """The last step holds no signal (Lin et al. 2023, section 3.1)."""
    clip: bool = True
    """Clip predicted signals to [-1, 1] while decoding."""

    def __post_init__(self):
        kinds = ("linear", "scaled_linear", "squaredcos_cap_v2", "shifted_cosine:SHIFT")
        if self.kind not in kinds[:3] and not self.kind.startswith("shifted_cosine:"):
            raise ValueError(f"unknown schedule {self.kind!r}; allowed: {', '.join(kinds)}")

    @functools.cached_property
    def signal(self) -> Float[np.ndarray, " T"]:
        """a_t: the product of all (1 - beta) up to t, in float32 as ml-4m computes it."""
        steps = np.arange(self.num_steps)
        if self.kind.startswith("shifted_cosine:"):
            # The cosine schedule's SNR is tan(pi t / 2)^-2.
            t = np.linspace(0, 1, self.num_steps, dtype=np.float32).astype(np.float64)
            with np.errstate(divide="ignore"):
                log_snr = -2 * (np.log(np.tan(np.pi * t / 2)) + np.log(float(self.kind.split(":")[1])))
            signal = 1 / (1 + np.exp(-log_snr.clip(-15, 15).astype(np.float32)))
            signal[-1] = 0
            return signal
        if self.kind == "squaredcos_cap_v2":
            bar = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
            betas = np.minimum(1 - bar((steps + 1) / self.num_steps) / bar(steps / self.num_steps), 0.999)
            betas = betas.astype(np.float32)
        elif self.kind == "linear":
            betas = np.linspace(1e-4, 0.02, self.num_steps, dtype=np.float32)
        else:
            betas = np.linspace(1e-4**0.5, 0.02**0.5, self.num_steps, dtype=np.float32) ** 2
        if self.zero_terminal_snr:
            root = np.sqrt(cumulative(1 - betas))
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            bar = root**2
            betas = 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
        return cumulative(1 - betas)

    def _roots(self, t: Int[Array, " B"], like: Array) -> tuple[Array, Array]:
        """sqrt(a_t) and sqrt(1 - a_t), broadcast over `like`."""
        a = jnp.asarray(self.signal)[t].reshape((-1,) + (1,) * (like.ndim - 1))
        return jnp.sqrt(a), jnp.sqrt(1 - a)

    def add_noise(self, x: Array, noise: Array, t: Int[Array, " B"]) -> Array:
        a, b = self._roots(t, x)
        return a * x + b * noise

    def velocity(self, x: Array, noise: Array, t: Int[Array, " B"]) -> Array:
        a, b = self._roots(t, x)
        return a * noise - b * x

    def noise(self, x: Array, velocity: Array, t: Int[Array, " B"]) -> Array:
        """The noise of a noised x with this velocity."""
        a, b = self._roots(t, x)
        return a * velocity + b * x

    def target(self, x: Array, noise: Array, t: Int[Array, " B"]) -> Array:
        """The target of the network's prediction."""
        if self.prediction == "sample":
            return x
        return noise if self.prediction == "epsilon" else self.velocity(x, noise, t)

    def parts(self, output: Array, noised: Array, a: Array) -> tuple[Array, Array]:
        """(signal, noise) of a noised signal by the network's output, where share `a` of the signal is left."""
        root, rest = jnp.sqrt(a), jnp.sqrt(1 - a)
        if self.prediction == "sample":
            return output, (noised - root * output) / rest
        if self.prediction == "epsilon":
            return (noised - rest * output) / root, output
        return root * noised - rest * output, root * output + rest * noised

    def timesteps(self, count: int, spacing: Spacing = "trailing") -> Int[np.ndarray, " T"]:
        """The steps of a decode, from noise to signal (Lin et al. 2023, section 3.3).

        "trailing" may have more than `count` steps where `count` does not divide num_steps, as in ml-4m.
        """
        if not 1 <= count <= self.num_steps:
            raise ValueError(f"{count} denoising steps were asked for; allowed: 1 to {self.num_steps}")
        stride = self.num_steps // count
        if spacing == "trailing":
            return np.arange(self.num_steps, 0, -stride).astype(np.int32) - 1
        if spacing == "leading":
            return (np.arange(count) * stride)[::-1].astype(np.int32)
        return np.linspace(self.num_steps, 1, count).round().astype(np.int32) - 1

    def ddim_step(self, output: Array, t: Array, noised: Array, *, stride: int) -> Array:
        """The sample `stride` steps nearer to the signal, without new noise (Song et al. 2021, equation 12, eta 0)."""
        table = jnp.asarray(self.signal)
        a = table[t]
        before = jnp.where(t >= stride, table[jnp.maximum(t - stride, 0)], 1.0)
        signal, noise = self.parts(output, noised, a)
        return jnp.sqrt(before) * (jnp.clip(signal, -1, 1) if self.clip else signal) + jnp.sqrt(1 - before) * noise

    def ddpm_step(self, output: Array, t: Array, noised: Array, fresh_noise: Array, *, stride: int) -> Array:
        """The sample `stride` steps nearer, drawn from the posterior (Ho et al. 2020, equation 7)."""
        table = jnp.asarray(self.signal)
        a = table[t]
        before = jnp.where(t >= stride, table[jnp.maximum(t - stride, 0)], 1.0)
        step = a / before
        signal, _ = self.parts(output, noised, a)
        signal = jnp.clip(signal, -1, 1) if self.clip else signal
        mean = jnp.sqrt(before) * (1 - step) / (1 - a) * signal + jnp.sqrt(step) * (1 - before) / (1 - a) * noised
        variance = jnp.maximum((1 - before) / (1 - a) * (1 - step), 1e-20)
        return mean + jnp.where(t > 0, jnp.sqrt(variance), 0) * fresh_noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionDecoder:
    """A decoder that denoises, by DDIM."""

    network: Any
    """The denoising network: UNet or UViT of m4_tokenizers.networks.unet."""
    schedule: Schedule = Schedule()
    """Noise at each step, and what is predicted."""
    num_decode_steps: int = 25
    """Steps of decoding."""
    spacing: Spacing = "trailing"
    """Which of the schedule's steps decoding takes: from the last ("trailing"), from the first ("leading"), or both
    ends ("linspace")."""
    drop_tokens: float = 0.0
    """Share of training examples whose tokens are all masked out, so that decoding may be guided (Ho & Salimans 2022);
    0 is none."""

    def make(
        self, *, num_channels: int, latent_size: int, grid: tuple[int, int], rngs: nnx.Rngs
    ) -> "DiffusionDecoderModule":
        return DiffusionDecoderModule(self, num_channels, latent_size, rngs=rngs)


class DiffusionDecoderModule(DecoderModule):
    def __init__(self, c: DiffusionDecoder, num_channels: int, latent_size: int, *, rngs: nnx.Rngs):
        self.config, self.num_channels = c, num_channels
        self.network = c.network.make(num_channels=num_channels, latent_size=latent_size, rngs=rngs)

    def compare(self, codes: Array, x: Float[Array, "B H W C"], key: Array) -> tuple[Array, Array]:
        """(prediction, target) of one denoising step from a random amount of noise."""
        c, (draw_t, draw_noise, draw_drop) = self.config, jax.random.split(key, 3)
        t = jax.random.randint(draw_t, x.shape[:1], 0, c.schedule.num_steps)
        noise = jax.random.normal(draw_noise, x.shape)
        masked = None
        if c.drop_tokens:
            drop = jax.random.bernoulli(draw_drop, c.drop_tokens, (len(x), 1, 1))
            masked = jnp.broadcast_to(drop, codes.shape[:3])
        prediction = self.network(c.schedule.add_noise(x, noise, t), t, codes, masked)
        return prediction, c.schedule.target(x, noise, t)

    def __call__(self, codes: Float[Array, "B h w D"], *, noise: Array | None = None) -> Float[Array, "B H W C"]:
        """DDIM from `noise`, by default the same for every example: a batch decodes as its examples do."""
        c = self.config
        if noise is None:
            shape = self.network.output_shape(codes.shape[1:3])
            noise = jax.random.normal(jax.random.key(0), (*shape, self.num_channels))[None]
            noise = jnp.broadcast_to(noise, (len(codes), *noise.shape[1:]))
        return self.denoise(codes, noise, c.schedule.timesteps(c.num_decode_steps, c.spacing), c.num_decode_steps)

    def denoise(self, codes: Array, noise: Array, timesteps: Int[np.ndarray, " T"], num_steps: int) -> Array:
        """All DDIM steps in one loop."""
        stride = self.config.schedule.num_steps // num_steps

        def step(x, t):
            output = self.network(x, jnp.full(len(x), t), codes)
            return self.config.schedule.ddim_step(output, t, x, stride=stride), None

        return jax.lax.scan(step, noise, jnp.asarray(timesteps))[0]
