"""m4's names of tokenizer parameters -> those of ml-4m."""

from __future__ import annotations

import re

from m4_tokenizers.networks.unet import UNet, UViT
from m4_tokenizers.quantizers.vector import Memcodes
from m4_tokenizers.vq import VQRecipe

_VIT = [
    (r"transformer\.positions", "pos_emb"),
    (r"transformer\.blocks\.(\d+)\.attention_norm", r"blocks.\1.norm1"),
    (r"transformer\.blocks\.(\d+)\.attention\.(query|key_value)", r"blocks.\1.attn.qkv"),
    (r"transformer\.blocks\.(\d+)\.attention\.out", r"blocks.\1.attn.proj"),
    (r"transformer\.blocks\.(\d+)\.mlp_norm", r"blocks.\1.norm2"),
    (r"transformer\.blocks\.(\d+)\.mlp\.up", r"blocks.\1.mlp.fc1"),
    (r"transformer\.blocks\.(\d+)\.mlp\.down", r"blocks.\1.mlp.fc2"),
    (r"transformer\.post_mlp\.norm", "norm_mlp"),
    (r"transformer\.post_mlp\.up", "post_mlp.fc1"),
    (r"transformer\.post_mlp\.down", "post_mlp.fc2"),
    (r"mlp\.(read|write)", lambda m: {"read": "linear_in", "write": "linear_out"}[m[1]]),
    (r"mlp\.norms\.(\d+)", r"layernorms.\1"),
    (r"mlp\.up\.(\d+)", r"blocks.\1.block.0"),
    (r"mlp\.down\.(\d+)", r"blocks.\1.block.2"),
]

_UNET = [
    (r"step\.up", "time_embed.0"),
    (r"step\.out", "time_embed.2"),
    (r"read", "input_blocks.0.0"),
    (r"norm_out", "out.0"),
    (r"write", "out.2"),
    (r"middle\.(\d+)\.", r"middle_block.\1."),
    (r"levels\.down\.(\d+)\.", lambda m: f"input_blocks.{int(m[1]) + 1}."),
    (r"levels\.up\.(\d+)\.", r"output_blocks.\1."),
]

_UNET_LAYERS = [
    (r"norm_1$", "in_layers.0"),
    (r"conv_1$", "in_layers.2"),
    (r"step$", "emb_layers.1"),
    (r"norm_2$", "out_layers.0"),
    (r"conv_2$", "out_layers.3"),
    (r"shortcut$", "skip_connection"),
    (r"attention\.(query|key_value)$", "qkv"),
    (r"attention\.out$", "proj_out"),
    (r"(input_blocks\.\d+\.\d+\.)conv$", r"\1op"),
]

_UVIT = [
    (r"step\.up", "time_embedding.linear_1"),
    (r"step\.out", "time_embedding.linear_2"),
    (r"middle\.blocks\.(\d+)\.", r"mid_block.mid_block.\1."),
    (r"middle\.positions", "mid_block.mid_pos_emb"),
    (r"middle\.mask_token", "mid_block.mask_token"),
    (r"middle\.read_codes", "mid_block.mid_cond_proj"),
    (r"middle\.read", "mid_block.mid_proj_in"),
    (r"middle\.write", "mid_block.mid_proj_out"),
    (r"read", "conv_in"),
    (r"norm_out", "conv_norm_out"),
    (r"write_bias", "conv_out.bias"),
    (r"write", "conv_out"),
    (r"down\.conv", "downsample_mid.conv"),
    (r"up\.conv", "upsample_mid.conv"),
]

_UVIT_LAYERS = [
    (r"(resnets\.\d+\.)norm_(\d)$", r"\1norm\2"),
    (r"(resnets\.\d+\.)conv_(\d)$", r"\1conv\2"),
    (r"(resnets\.\d+\.)step$", r"\1time_emb_proj"),
    (r"(resnets\.\d+\.)shortcut$", r"\1conv_shortcut"),
    (r"cross_attention\.query$", "cross_attn.q"),
    (r"cross_attention\.key_value$", "cross_attn.kv"),
    (r"cross_attention\.out$", "cross_attn.proj"),
    (r"mlp\.up$", "mlp.fc1"),
    (r"mlp\.down$", "mlp.fc2"),
    (r"modulation$", "adaLN_modulation"),
    (r"gate$", "adaLN_gate"),
    (r"\.skip$", ".skip_linear"),
]


def _first(rules: list, text: str) -> str:
    """`text` with the first rule that fits its beginning (or, with a $, its end) applied."""
    for pattern, replacement in rules:
        whole = pattern if pattern.endswith((r"\.", "$")) else rf"{pattern}(?![a-z_])"
        match = re.search(whole, text) if pattern.endswith("$") else re.match(whole, text)
        if match:
            new = replacement(match) if callable(replacement) else match.expand(replacement)
            return text[: match.start()] + new + text[match.end() :]
    return text


def _uvit_levels(c: UViT, module: str) -> str:
    """levels.down.I.J.rest and levels.up.I.J.rest -> ml-4m's blocks of residual blocks and samplers."""
    match = re.fullmatch(r"levels\.(down|up)\.(\d+)\.(\d+)\.(.*)", module)
    assert match is not None, f"{module} is in no level"
    side, entry, layer, rest = match.groups()
    per_level = c.num_blocks + 1  # down: the blocks, then a sampler; up: one block more
    level, i = divmod(int(entry), per_level)
    is_sampler = i == c.num_blocks if side == "down" else layer == "1"
    return f"{side}_blocks.{level}.{side}samplers.0.conv" if is_sampler else f"{side}_blocks.{level}.resnets.{i}.{rest}"


def fourm_name(recipe: VQRecipe, path: str) -> str:
    """ml-4m's name of one of m4's arrays."""
    simple = {
        "class_embedding": "cls_emb.weight",
        "quantizer.counts": "quantize._codebook.cluster_size",
        "quantizer.sums": "quantize._codebook.embed_avg",
        "quantizer.key_kernel": "quantize.to_k.weight",
        "quantizer.value_kernel": "quantize.to_v.weight",
        "quantizer.codes": "quantize.codes" if isinstance(recipe.quantizer, Memcodes) else "quantize._codebook.embed",
    }
    if path in simple:
        return simple[path]
    side, _, rest = path.partition(".")
    module, _, leaf = rest.rpartition(".")
    if leaf not in ("kernel", "scale", "bias") or re.fullmatch(
        r"convolutions\.\d+", module
    ):  # a bare array: positions, a mask token, the scale of a ConvNeXt block
        module, leaf = rest, ""
    suffix = {"kernel": ".weight", "scale": ".weight", "bias": ".bias", "": ""}[leaf]
    if module == "project":
        return ("quant_proj" if side == "encoder" else "post_quant_proj") + suffix
    if module.startswith("network."):
        module = module.removeprefix("network.")
        if isinstance(recipe.decoder.network, UNet):
            module = _first(_UNET_LAYERS, _first(_UNET, module))
        elif module.startswith("levels."):
            module = _first(_UVIT_LAYERS, _uvit_levels(recipe.decoder.network, module))
        else:
            module = _first(_UVIT_LAYERS, _first(_UVIT, module))
            attends = recipe.decoder.network.conditioning == "xattn"
            norms = ("norm1", "query_norm", "norm2") if attends else ("norm1", "norm2")
            module = re.sub(r"norms\.(\d)$", lambda m: norms[int(m[1])], module)
            own = "self_attn" if attends else "attn"
            module = re.sub(r"\.attention\.(query|key_value)$", f".{own}.qkv", module)
            module = re.sub(r"\.attention\.out$", f".{own}.proj", module)
    elif module.startswith("convolutions."):
        names = {"depthwise": "dwconv", "norm": "norm", "up": "pwconv1", "down": "pwconv2", "scale": "gamma"}
        _, i, part = module.split(".")
        module = f"out_conv.{i}.{names[part]}"
    elif module in ("read", "write"):
        module = {"read": "proj", "write": "out_proj"}[module]
    else:
        module = _first(_VIT, module)
    return f"{side}.{module}{suffix}"
