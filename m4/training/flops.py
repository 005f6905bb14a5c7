"""What a training step computes and moves, counted; and what devices can do.

Model FLOPs (PaLM, Chowdhery et al. 2022, appendix B): matrix products of the forward pass times three, no
rematerialisation, no optimizer; 2 for a multiplication with its addition.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from m4.model.config import ModelConfig
from m4.tokens.modality import Features, Modalities

# Of one device as JAX counts them: bfloat16 FLOP/s, bytes of memory, bytes/s of it, bytes/s to others of slice or node.
# Makers' data sheets: dense products, both directions of links together.
DEVICES = {
    "TPU v4": (275e12, 32e9, 1.2e12, 300e9),
    "TPU v5 lite": (197e12, 16e9, 0.82e12, 200e9),
    "TPU v5": (459e12, 95e9, 2.77e12, 600e9),
    "TPU v6 lite": (918e12, 32e9, 1.64e12, 450e9),
    "TPU7x": (1155e12, 96e9, 3.7e12, 600e9),  # one of the two cores of a chip
    "NVIDIA A100": (312e12, 80e9, 2.0e12, 600e9),
    "NVIDIA H100": (989e12, 80e9, 3.35e12, 900e9),
    "NVIDIA H200": (989e12, 141e9, 4.8e12, 900e9),
    "NVIDIA B200": (2250e12, 192e9, 8.0e12, 1800e9),
}


def device_data(kind: str) -> tuple[float, float, float, float] | None:
    """Of the device kind that JAX names (`jax.devices()[0].device_kind`), by the longest name it begins with."""
    known = [name for name in DEVICES if kind.lower().startswith(name.lower())]
    return DEVICES[max(known, key=len)] if known else None


def peak_flops(device: jax.Device, dtype: str) -> tuple[float | None, str]:
    """FLOP/s of one device after its data sheet, None without one; and a remark that says so.

    The peak of a CPU is not measured: a product that runs beside other work is slower than a step can be, and the MFU
    would exceed 100%.
    """
    if (data := device_data(device.device_kind)) is None:
        return None, f"the peak of {device.device_kind} is not known: no MFU"
    # Float32 products take several passes: 1/2 of bfloat16 on GPUs as TF32, about 1/6 on TPUs.
    factor = 1.0 if dtype == "bfloat16" else 1 / 6 if device.platform == "tpu" else 1 / 2
    return data[0] * factor, f"data sheet of {device.device_kind}, {dtype}"


def mfu(flops_per_step: float, step_s: float, peak: float | None) -> float | None:
    """Model FLOPs utilization, the share of `peak` FLOP/s (of all devices) that a step of `step_s` seconds uses.

    None where the peak is not known, or evidently is not the devices' peak, because the step beats it.
    """
    share = None if peak is None else flops_per_step / step_s / peak
    return share if share is not None and share <= 1 else None


def model_flops(
    config: ModelConfig, modalities: Modalities, num_inputs: int, num_targets: int, targets: Mapping[str, float]
) -> float:
    """Of a training step, for each example. `targets`: how many target tokens of each modality it has, on average.

    Slots that stay empty count as slots: they are computed.
    """
    c, n, m = config, num_inputs + config.num_prefix_tokens, num_targets
    mlp = (3 if c.mlp == "swiglu" else 2) * c.width * c.hidden
    square = c.width**2
    encoder = n * (4 * square + mlp) + 2 * n * n * c.width
    decoder = m * (4 * square + 2 * square + mlp) + n * 2 * square + 2 * (m * m + m * n) * c.width
    features = sum(min(x.max_tokens, num_inputs) * x.size * c.width for x in modalities if isinstance(x, Features))
    output = sum(targets[x.name] * x.vocab_size * c.width for x in modalities if x.is_target and x.name in targets)
    return 3 * 2 * (c.encoder_depth * encoder + c.decoder_depth * decoder + n * square + features + output)
