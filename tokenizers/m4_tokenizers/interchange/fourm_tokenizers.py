"""4M's VQVAE and DiVAE checkpoints <-> tokenizer files: `python -m m4_tokenizers convert IN OUT`.

    4M                                       m4
    encoder.blocks.0.attn.qkv.weight         encoder.transformer.blocks.0.attention.query.kernel, .key_value.kernel
    quant_proj.weight [D F 1 1]              encoder.project.kernel [F D]
    quantize._codebook.embed [1 K D]         quantizer.codes
    decoder.input_blocks.4.0.in_layers.2     decoder.network.levels.down.3.0.conv_1

A converted file keeps 4M's header and spare tensors, so that the conversion back gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from m4.checkpoints.model_file import check_names
from m4.errors import closest
from m4.files import shown
from m4.tensor_file import DTYPES, TensorFile, parse_header, write
from m4.tokens.tokenizer import load_tokenizer, save_tokenizer
from m4_tokenizers.interchange.architectures import PRESETS, parse_config, preset
from m4_tokenizers.interchange.fourm_names import fourm_name
from m4_tokenizers.modalities.depth import RelativeDepthRecipe
from m4_tokenizers.modalities.edges import EdgesRecipe
from m4_tokenizers.modalities.features import FeatureMapRecipe, PoseRecipe, VectorRecipe
from m4_tokenizers.modalities.image import ImageRecipe
from m4_tokenizers.modalities.instances import MaskRecipe
from m4_tokenizers.modalities.maps import MapRecipe
from m4_tokenizers.modalities.normals import NormalsRecipe
from m4_tokenizers.modalities.semseg import SemanticRecipe
from m4_tokenizers.networks.autoencoder import VQ
from m4_tokenizers.networks.diffusion import DiffusionDecoder, Schedule
from m4_tokenizers.networks.unet import UNet, UViT
from m4_tokenizers.networks.vectors import VectorDecoder, VectorEncoder
from m4_tokenizers.networks.vit import ViTDecoder, ViTEncoder
from m4_tokenizers.quantizers.vector import Memcodes, VectorQuantizer
from m4_tokenizers.vq import VQRecipe

# Recipes by signal that a checkpoint may be converted to.
RECIPES: dict[str, type[VQRecipe]] = {
    "rgb": ImageRecipe, "normals": NormalsRecipe, "depth": RelativeDepthRecipe, "edges": EdgesRecipe,
    "sam_edges": EdgesRecipe, "semseg": SemanticRecipe, "mask": MaskRecipe, "clip": FeatureMapRecipe,
    "dinov2": FeatureMapRecipe, "imagebind": FeatureMapRecipe, "clip_global": VectorRecipe,
    "dinov2_global": VectorRecipe, "imagebind_global": VectorRecipe, "pose": PoseRecipe, "map": MapRecipe,
}  # fmt: skip


def _bottleneck(name: str) -> dict[str, int]:
    """Sizes in a name BottleneckMLP/B_<blocks>-Wi_<width>."""
    match = re.fullmatch(r"BottleneckMLP/B_(\d+)-Wi_(\d+)", name)
    if not match:
        raise ValueError(f"unknown architecture {name!r}; allowed: BottleneckMLP/B_<blocks>-Wi_<width>")
    return {"depth": int(match[1]), "width": int(match[2])}


def _vit(c: dict[str, Any], sizes: dict[str, Any], image_size: int, patch_size: int) -> dict[str, Any]:
    return {
        "patch_size": patch_size if c["patch_proj"] else 1,
        "table_size": image_size // patch_size,
        "width": sizes["dim_tokens"],
        "depth": sizes["depth"],
        "num_heads": sizes["num_heads"],
        "post_mlp": c["post_mlp"],
    }


def network(c: dict[str, Any], presets: Mapping[str, Any], token_patch_size: int) -> UNet | UViT:
    """The denoising network that a config names."""
    name, p = c["dec_type"], preset(c["dec_type"], presets)
    if name.startswith("unet"):
        levels = [r.bit_length() - 1 for r in p["attention_resolutions"]]
        return UNet(
            patch_size=p["patch_size"],
            token_patch_size=token_patch_size,
            width=p["model_channels"],
            multipliers=tuple(p["channel_mult"]),
            num_blocks=p["num_res_blocks"],
            attention_levels=tuple(i for i in levels if i < len(p["channel_mult"])),
        )
    return UViT(
        patch_size=p["patch_size"],
        token_patch_size=token_patch_size,
        widths=tuple(p["block_out_channels"]),
        num_blocks=p["layers_per_block"],
        down_to_middle=p["downsample_before_mid"],
        depth=p["mid_layers"],
        width=p["mid_dim"],
        num_heads=p["mid_num_heads"],
        long_skips=p.get("mid_use_long_skip", False),
        conditioning=c["conditioning"],
        position_grid=p.get("mid_hw_posemb", 32),
    )


def guess_signal(c: dict[str, Any], path: Path) -> str:
    """The signal of a checkpoint, by its config and the name of its file or folder."""
    allowed = [name for name, recipe in RECIPES.items() if fits(recipe, c)]
    text = f"{path.parent.name}/{path.stem}".lower()
    keywords = {"edges": ["canny"], "sam_edges": ["sam", "edge"], "normals": ["normal"], "mask": ["instance"]}
    fits_name = lambda name: all(w in text for w in (keywords[name] if name in keywords else name.split("_")))  # noqa: E731
    named = [name for name in allowed if fits_name(name)]
    if len(allowed) == 1 or named:
        return max(named or allowed, key=len)
    raise ValueError(f"{path}: which signal is this the tokenizer of? Say --signal, one of {', '.join(allowed)}")


def fits(recipe: type[VQRecipe], c: dict[str, Any]) -> bool:
    if "MLP" in c["enc_type"]:
        return issubclass(recipe, PoseRecipe if c["n_channels"] == 207 else VectorRecipe)
    if c["n_labels"] is not None:
        return recipe is SemanticRecipe
    if not c["patch_proj"]:
        return recipe is FeatureMapRecipe
    by_channels = {3: (ImageRecipe, NormalsRecipe), 1: (RelativeDepthRecipe, EdgesRecipe, MaskRecipe)}
    own = by_channels[c["n_channels"]] if c["n_channels"] in by_channels else ()
    return recipe in (*own, MapRecipe)  # a map has any number of channels


def recipe_of(c: dict[str, Any], *, signal: str, image_size: int = 0, presets: Mapping[str, Any] = {}) -> VQRecipe:
    """m4's recipe for 4M's config, at its image size or another."""
    presets = {**PRESETS, **presets}
    if signal not in RECIPES or not fits(RECIPES[signal], c):
        allowed = [name for name, recipe in RECIPES.items() if fits(recipe, c)]
        raise ValueError(f"signal {signal!r} does not fit the checkpoint's config; {closest(signal, allowed)}")
    is_vector = "MLP" in c["enc_type"]
    patch_size = c["patch_size"] if c["patch_proj"] else 1
    fields: dict[str, Any] = {"signal": signal}
    codes = {"num_codes": c["codebook_size"], "latent_size": c["latent_dim"], "num_codebooks": c["num_codebooks"]}
    if c["quant_type"] == "memcodes":
        fields["quantizer"] = Memcodes(**codes)
    elif c["quant_type"] == "lucid" and c["num_codebooks"] == 1:
        fields["quantizer"] = VectorQuantizer(
            **codes,
            cosine=c["norm_codes"],
            normalize_latents=c["norm_latents"],
            decay=c["ema_decay"],
            dead_below=c["threshold_ema_dead_code"],
            commitment=c["commitment_weight"],
        )
    else:
        raise ValueError(f"quant_type={c['quant_type']!r} with {c['num_codebooks']} codebooks is not supported")
    if is_vector:
        fields.update(image_size=1, encoder=VectorEncoder(**_bottleneck(c["enc_type"])))
        fields["decoder"] = VectorDecoder(**_bottleneck(c["dec_type"]))
        size = ""
    else:
        size_enc = c["image_size_enc"] or c["image_size"]
        fields["encoder"] = ViTEncoder(**_vit(c, preset(c["enc_type"], presets), size_enc, c["patch_size"]))
        base = image_size or c["image_size"]
        fields["image_size"] = base if c["patch_proj"] else base // c["patch_size"]
        size = f"@{base}"
        if c["dec_type"].startswith("vit"):
            patch_size_dec = c["patch_size_dec"] or c["patch_size"]
            vit = _vit(c, preset(c["dec_type"], presets), c["image_size_dec"] or c["image_size"], patch_size_dec)
            fields["decoder"] = ViTDecoder(**vit, num_convolutions=2 * c["out_conv"])
        else:
            schedule = Schedule(
                kind=c["beta_schedule"],
                num_steps=c["num_train_timesteps"],
                prediction=c["prediction_type"],
                zero_terminal_snr=c["zero_terminal_snr"],
                # 4M's dynamic threshold is at most 1, which makes it the same as clipping.
                clip=c["clip_sample"] or c["thresholding"],
            )
            fields["decoder"] = DiffusionDecoder(network=network(c, presets, patch_size), schedule=schedule)
    short = {"normals": "normal", "edges": "canny_edge", "sam_edges": "sam_edge"}
    fields["name"] = f"tok_{short[signal] if signal in short else signal}{size}"
    if signal == "semseg":
        fields.update(num_classes=c["n_labels"], embedding_size=c["n_channels"])
    elif is_vector or not c["patch_proj"]:
        fields["num_features"] = c["n_channels"]
    elif RECIPES[signal] is MapRecipe:  # of values in [-1, 1], as 4M's tokenizers read all of theirs
        fields.update(lowest=-1.0, highest=1.0, channels=c["n_channels"])
    return RECIPES[signal](**fields)


def _part(path: str) -> slice | None:
    """Which thirds of a fused qkv tensor one of m4's arrays holds."""
    if ".cross_attention." in path or ".attention." not in path:
        return None
    if ".query." in path:
        return slice(0, 1)
    return slice(1, 3) if ".key_value." in path else None


def _transposed(path: str) -> bool:
    """UViT's last map is a transposed convolution: [in out h w]."""
    return path.endswith("network.write.kernel")


def from_4m(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """m4's array (of `shape`) from 4M's tensor."""
    part = _part(path)
    if part is not None:
        tensor = tensor.reshape(3, -1, *tensor.shape[1:])[part].reshape(-1, *tensor.shape[1:])
    if path.endswith("positions"):
        return tensor[0].transpose(1, 2, 0)
    if not path.endswith(".kernel"):
        return tensor.reshape(shape)
    if tensor.ndim == 4 and len(shape) == 4:
        return tensor.transpose(2, 3, 1, 0)
    if tensor.ndim == 4:
        return (tensor.transpose(0, 2, 3, 1) if _transposed(path) else tensor.transpose(2, 3, 1, 0)).reshape(shape)
    return tensor.reshape(tensor.shape[:2]).T


def to_4m(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """4M's tensor (of `shape`, or the part of a fused one) from m4's array."""
    if path.endswith("positions"):
        return array.transpose(2, 0, 1)[None]
    if not path.endswith(".kernel"):
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if len(shape) == 4:
        if _transposed(path):
            return array.reshape(shape[0], shape[2], shape[3], shape[1]).transpose(0, 3, 1, 2)
        return array.reshape(shape[2], shape[3], shape[1], shape[0]).transpose(3, 2, 0, 1)
    return array.T


def _names(recipe: VQRecipe) -> Iterator[tuple[tuple, Any, str, str]]:
    """(path, leaf, dotted path, 4M's name) of every array."""
    state = nnx.state(nnx.eval_shape(lambda: VQ(recipe, rngs=nnx.Rngs(0))))
    for path, leaf in nnx.to_flat_state(state):
        dotted = ".".join(map(str, path))
        yield path, leaf, dotted, fourm_name(recipe, dotted)


def convert(source: Path, out: Path, *, signal: str = "", image_size: int = 0, presets: Mapping[str, Any] = {}) -> str:
    """Converts in either direction, by what `source` is. ValueError names unknown, missing and misshapen tensors."""
    file = TensorFile.read(source)
    if out.exists() and out.resolve() == file.path.resolve():
        raise ValueError(f"{out} is the input itself; give another name")
    if "m4" in file.metadata:
        return _back(file, out)
    config = parse_config(file)
    signal = signal or guess_signal(config, file.path)
    try:
        recipe = recipe_of(config, signal=signal, image_size=image_size, presets=presets)
    except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{shown(file.path)}: its config is of no tokenizer that m4 has: {error}") from error
    _check_depths(recipe, file)
    expected, loaded = {}, []
    # UViT's lowest sampler has two names for one convolution; a file may hold either, or both.
    alias = lambda name: name.replace("sample_mid.conv.", "sample_mid.Conv2d_0.")  # noqa: E731
    table = [
        (path, leaf, dotted, name if name in file.entries or alias(name) not in file.entries else alias(name))
        for path, leaf, dotted, name in _names(recipe)
    ]
    for _, leaf, dotted, name in table:
        given = file.entries[name].shape if name in file.entries else None
        expected[name] = _shape_in_4m(recipe, dotted, leaf.shape, given)
    copies = {alias(name): name for name in expected if alias(name) != name and alias(name) in file.entries}
    check_names(file, expected, ["quantize._codebook.initted", *copies])
    for copy, name in copies.items():
        if not np.array_equal(file.tensor(copy), file.tensor(name)):
            raise ValueError(f"{file.path}: {copy} and {name} are one tensor by the config, but differ")
    for path, leaf, dotted, name in table:
        array = np.ascontiguousarray(from_4m(dotted, file.tensor(name), leaf.shape))
        loaded.append((path, leaf.replace(jnp.asarray(array.astype(np.float32)))))
    spare = {f"original:{name}": file.tensor(name) for name in sorted(set(file.entries) - set(expected))}
    graph, _ = nnx.split(nnx.eval_shape(lambda: VQ(recipe, rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, nnx.from_flat_state(loaded))
    card = {"component": recipe.tokenizer_class.component, "signal": signal, "values": recipe.values}
    card.update(tokens_per_sample=recipe.modality.max_tokens, vocab_size=recipe.modality.vocab_size)
    kept = {"original_header": file.header, **spare}
    save_tokenizer(recipe.tokenizer_class(recipe=recipe, model=model, card=card, kept=kept), out)
    total = sum(int(np.prod(e.shape)) for e in file.entries.values())
    return f"{out}: tokenizer of {signal}, {len(file.entries)} tensors, {total:,} numbers"


def _check_depths(recipe: VQRecipe, file: TensorFile) -> None:
    """ValueError where a config claims more blocks than its file has tensors, before they are allocated."""
    for part in (recipe.encoder, recipe.decoder, getattr(recipe.decoder, "network", None)):
        for name in ("depth", "num_blocks"):
            if getattr(part, name, 0) > len(file.entries):
                raise ValueError(
                    f"{shown(file.path)}: its config says {name} = {getattr(part, name):,}, which no file of "
                    f"{len(file.entries):,} tensors can hold"
                )


def _shape_in_4m(recipe: VQRecipe, dotted: str, shape: tuple[int, ...], given: tuple[int, ...] | None):
    """The shape that 4M's tensor of one of m4's arrays must have."""
    if _part(dotted) is not None:
        whole = 3 * (shape[-1] if "query" in dotted else shape[-1] // 2)
        shape = (*shape[:-1], whole)
    if dotted.endswith("positions"):
        return (1, shape[2], *shape[:2])
    if dotted in ("quantizer.codes", "quantizer.counts", "quantizer.sums") and recipe.quantizer.num_codebooks == 1:
        return given if given and np.prod(given) == np.prod(shape) else shape[1:]
    if not dotted.endswith(".kernel"):
        return shape
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    if given is not None and len(given) in (3, 4):  # a convolution over patches, or over single positions
        inner = int(np.prod(given[1:])) if not _transposed(dotted) else given[0]
        outer = given[0] if not _transposed(dotted) else int(np.prod(given[1:]))
        if (inner, outer) == tuple(shape):
            return given
    return (shape[1], shape[0])


def _back(file: TensorFile, out: Path) -> str:
    tokenizer: Any = load_tokenizer(file.path)  # a VQTokenizer, else it has no `kept`
    if "original_header" not in tokenizer.kept:
        raise ValueError(f"{file.path} was not made from an original checkpoint, so there is no header to restore")
    header_text = tokenizer.kept["original_header"]
    try:
        _, header = parse_header(header_text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.path}: the original's header in it is corrupt: {error}") from error
    _, arrays = tokenizer.state()
    parts: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in header}
    for _, _, dotted, name in _names(tokenizer.recipe):
        name, part = name if name in parts else name.replace(".conv.", ".Conv2d_0."), _part(dotted)
        parts[name].append((part.start if part else 0, to_4m(dotted, arrays[dotted], header[name].shape)))

    def tensor(name: str) -> np.ndarray:
        if not parts[name]:
            return tokenizer.kept[f"original:{name}"]
        pieces = [piece for _, piece in sorted(parts[name], key=lambda item: item[0])]
        return np.concatenate([p.reshape(-1) for p in pieces]).astype(DTYPES[header[name].dtype])

    order = sorted(header, key=lambda name: header[name].begin)
    write(out, header_text, ([tensor(name)] for name in order))
    return f"{out}: {len(order)} tensors in the original's format"
