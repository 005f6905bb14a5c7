"""Configs of 4M's tokenizers, from their files' headers, and architectures by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m4.data.sources.contents import content
from m4.errors import closest
from m4.files import parse_json, shown
from m4.tensor_file import TensorFile, literal_like

# 4M's config, with the values of absent keys.
DEFAULTS = {
    "image_size": 224, "image_size_enc": None, "n_channels": 3, "n_labels": None, "enc_type": "vit_b_enc",
    "patch_proj": True, "post_mlp": False, "patch_size": 16, "quant_type": "lucid", "codebook_size": 16384,
    "num_codebooks": 1, "latent_dim": 32, "norm_codes": True, "norm_latents": False, "dec_type": "vit_b_dec",
    "out_conv": False, "image_size_dec": None, "patch_size_dec": None, "undo_std": False, "sync_codebook": False,
    "ema_decay": 0.99, "threshold_ema_dead_code": 0.25, "code_replacement_policy": "batch_random",
    "commitment_weight": 1.0, "kmeans_init": False, "ckpt_path": "", "ignore_keys": [], "freeze_enc": False,
    "num_train_timesteps": 1000, "cls_free_guidance_dropout": 0.0, "masked_cfg": False, "masked_cfg_low": 0,
    "masked_cfg_high": None, "scheduler": "ddpm", "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction", "clip_sample": False, "thresholding": True, "conditioning": "concat",
    "dec_transformer_dropout": 0.2, "zero_terminal_snr": True,
}  # fmt: skip

_SIZES = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16)}
_MIDDLES = {"b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}


def _uvit(size: str, factor: str, variant: str) -> dict[str, Any]:
    width, depth, heads = _MIDDLES[size]
    return {
        "patch_size": 4, "block_out_channels": (128, 256, 512) if variant == "extraconv" else (128, 256),
        "layers_per_block": 2, "downsample_before_mid": factor == "f16" and variant != "extraconv",
        "mid_layers": depth + (variant == "longskip"), "mid_num_heads": heads, "mid_dim": width,
        "mid_use_long_skip": variant == "longskip",
    }  # fmt: skip


# 4M's architectures by name.
PRESETS: dict[str, dict[str, Any]] = {
    **{
        f"vit_{name}_{side}": {"dim_tokens": width, "depth": depth, "num_heads": heads}
        for name, (width, depth, heads) in _SIZES.items()
        for side in ("enc", "dec")
    },
    "unet_patched": {
        "patch_size": 4, "model_channels": 256, "num_res_blocks": 3, "attention_resolutions": (4, 8),
        "channel_mult": (1, 2, 2, 2),
    },
    **{
        f"uvit_{size}_p4_{factor}{variant and '_' + variant}": _uvit(size, factor, variant)
        for size, factor, variant in [
            ("b", "f16", ""), ("l", "f16", ""), ("h", "f16", ""), ("b", "f16", "longskip"), ("l", "f16", "longskip"),
            ("b", "f8", ""), ("l", "f8", ""), ("b", "f16", "extraconv"), ("l", "f16", "extraconv"),
        ]
    },
}  # fmt: skip


def parse_config(file: TensorFile) -> dict[str, Any]:
    """4M's config from the metadata strings, one Python literal (or plain word) each."""
    config = dict(DEFAULTS)
    for key, text in file.metadata.items():
        if key == "format":
            continue
        if key not in DEFAULTS:
            raise ValueError(f"{file.path}: unknown config key {key!r}; {closest(key, list(DEFAULTS))}")
        config[key] = literal_like(text, DEFAULTS[key], f"{file.path}: config {key}")
    if "enc_type" not in file.metadata:
        raise ValueError(f"{file.path} holds no tokenizer's config: its metadata has {', '.join(file.metadata)}")
    return config


def preset(name: str, presets: Mapping[str, Any]) -> dict[str, Any]:
    if name not in presets:
        raise ValueError(f"unknown architecture {name!r}; {closest(name, list(presets))}")
    return presets[name]


def read_presets(file: Path) -> dict[str, dict[str, Any]]:
    """Further architectures from JSON: {"vit_xs_enc": {"dim_tokens": 64, "depth": 3, "num_heads": 4}, ...}.

    ValueError names the file, and what PRESETS of the same kind have that one of its architectures lacks.
    """
    try:
        presets = parse_json(content(file))
        if not isinstance(presets, dict) or not all(isinstance(x, dict) for x in presets.values()):
            raise ValueError("it must hold an object of architectures by name")
        for name, given in presets.items():
            is_unet = name.startswith("unet")
            like = "vit_b_enc" if "dim_tokens" in given else "unet_patched" if is_unet else "uvit_b_p4_f16"
            for key, value in PRESETS[like].items():
                is_optional = key == "mid_use_long_skip" and key not in given
                if not is_optional and not (key in given and _is_like(given[key], value)):
                    what = ascii(given[key])[:60] if key in given else "missing"
                    raise ValueError(f"{key} of {ascii(name)[:80]} is {what}; allowed: such as {value!r}")
    except ValueError as error:
        raise error if shown(file) in str(error) else ValueError(f"{shown(file)}: {error}") from error
    return presets


def _is_like(value: Any, like: Any) -> bool:
    """Whether a value has the type of `like`, integers from 1 to 2^16."""
    if isinstance(like, tuple):
        return isinstance(value, list | tuple) and len(value) > 0 and all(_is_like(x, like[0]) for x in value)
    if isinstance(like, bool) or not isinstance(like, int):
        return isinstance(value, type(like))
    return type(value) is int and 1 <= value <= 2**16
