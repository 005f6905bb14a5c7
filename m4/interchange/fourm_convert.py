"""Released 4M weights <-> m4: `python -m m4 convert IN OUT`, bit for bit in both directions.

    4M                                          m4
    encoder.0.attn.qkv.weight [3D D]            encoder.0.attention.query.kernel [D D], .key_value.kernel [D 2D]
    encoder.0.mlp.fc1.weight, .fc3.weight       left and right half of encoder.0.mlp.up.kernel [D 2F]
    encoder_embeddings.MOD.token_emb.weight     rows of token_embedding
    decoder_embeddings.MOD.token_emb.weight     rows of decoder_embedding (sequences; a grid's are never read)
    decoder_embeddings.MOD.to_logits.weight     rows of output_embedding

Tensors that 4M stores but does not use (position tables, zero biases, the decoder's embeddings of grids) are checked
and stored as "original:NAME", and so is the header: the conversion back gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from m4.adaptation.registers import Registers
from m4.checkpoints.model_file import check_names, check_sizes, describe, read_description
from m4.checkpoints.renamed_parameters import named_as_today
from m4.errors import closest
from m4.files import remove_leftovers
from m4.interchange import fourm
from m4.model.config import ModelConfig
from m4.model.layers import BIASES
from m4.model.parameters import abstract, parameter_shapes
from m4.model.positions import positions_of, sine_cosine
from m4.tensor_file import DTYPES, TensorFile, literal_like, make_header, parse_header, write
from m4.tokens.modality import Features, Grid, Modalities, Modality, Sequence

KEPT = "original:"

# 4M's config, with the values of absent keys.
DEFAULTS = {
    "domains_in": [], "domains_out": [], "encoder_depth": 12, "decoder_depth": 12, "dim": 768, "num_heads": 12,
    "mlp_ratio": 4.0, "qkv_bias": True, "proj_bias": True, "mlp_bias": True, "norm_bias": True, "act_layer": "GELU",
    "gated_mlp": False, "qk_norm": False, "decoder_causal_mask": False, "decoder_sep_mask": True,
    "num_register_tokens": 0, "share_modality_embeddings": True, "drop_path_rate_encoder": 0.0,
    "drop_path_rate_decoder": 0.0, "shared_drop_path": False, "use_act_checkpoint": False, "image_size": 224,
    "patch_size": 16,
}  # fmt: skip


def parse_config(file: TensorFile) -> dict[str, Any]:
    """4M's config from the metadata strings, one Python literal each (act_layer: a plain word)."""
    if "enc_type" in file.metadata:
        raise ValueError(f"{file.path} is a tokenizer: `python -m m4_tokenizers convert` converts it")
    config = dict(DEFAULTS)
    for key, text in file.metadata.items():
        if key == "format" or key in file.entries or text in file.entries:
            continue  # torch's own note, and names of shared tensors that were stored once
        if key not in DEFAULTS:
            raise ValueError(f"{file.path}: unknown config key {key!r}; {closest(key, list(DEFAULTS))}")
        config[key] = literal_like(text, DEFAULTS[key], f"{file.path}: config {key}")
    if not config["domains_in"] or not config["domains_out"]:
        raise ValueError(
            f"{file.path} holds no config: its metadata has {', '.join(file.metadata) or 'no keys at all'}"
        )
    return config


def modalities_of(config: dict[str, Any], file: TensorFile, declared: Seq[Modality]) -> Modalities:
    """The checkpoint's modalities, each with the sides that it is used on."""
    known = {**fourm.MODALITIES, **{m.name: m for m in declared}}
    items = []
    for name in dict.fromkeys([*config["domains_in"], *config["domains_out"]]):
        if name not in known:
            raise ValueError(
                f"{file.path}: unknown modality {name!r}; {closest(name, list(known))} Or declare it in a Python file "
                f"(--declare FILE):\n\n{_declaration(name, file)}"
            )
        sides = {"is_input": name in config["domains_in"], "is_target": name in config["domains_out"]}
        items.append(known[name] if isinstance(known[name], Features) else dataclasses.replace(known[name], **sides))
    return Modalities(items)


def _declaration(name: str, file: TensorFile) -> str:
    """An example declaration of a modality, with what can be inferred from its tensors."""
    shapes = {n.rsplit(f".{name}.", 1)[-1]: e.shape for n, e in file.entries.items() if f"_embeddings.{name}." in n}
    rows = next((shape[0] for key, shape in shapes.items() if key in ("token_emb.weight", "to_logits.weight")), 8192)
    count = shapes["pos_emb"][1] if "pos_emb" in shapes else 196
    side = math.isqrt(count)
    names = f"name={name!r}, signal={name.split('@')[0].removeprefix('tok_')!r}"
    if "proj.weight" in shapes:
        line = f"Features({names}, shape=({side}, {side}), size={shapes['proj.weight'][1]})"
    elif side * side == count:
        line = f"Grid({names}, vocab_size={rows}, shape=({side}, {side}))"
    else:
        line = f"Sequence({names}, vocab_size={rows}, max_length=256, first_sentinel=5, num_sentinels=199, end_id=3)"
    return f"from m4.tokens.modality import {line.split('(')[0]}\n\nmodalities = ({line},)"


def model_config(config: dict[str, Any], *, tied: bool, path: Path) -> ModelConfig:
    """m4's config for that of 4M; `tied`: the decoder's input and output embeddings are one table."""
    kinds: dict[tuple[str, bool], Literal["swiglu", "gelu"]] = {("SiLU", True): "swiglu", ("GELU", False): "gelu"}
    mlp = (config["act_layer"], config["gated_mlp"])
    if mlp not in kinds:
        raise ValueError(f"{path}: act_layer={mlp[0]!r} with gated_mlp={mlp[1]}; allowed: SiLU gated, GELU not gated")
    if config["shared_drop_path"]:
        raise ValueError(f"{path}: shared_drop_path=True is not supported; allowed: False")
    try:
        return _model_config(config, kinds[mlp], tied)
    except ValueError as error:
        raise ValueError(f"{path}: its config cannot be used: {error}") from error


def _model_config(config: dict[str, Any], mlp: Literal["swiglu", "gelu"], tied: bool) -> ModelConfig:
    hidden = int(config["dim"] * config["mlp_ratio"])
    return ModelConfig(
        width=config["dim"],
        num_heads=config["num_heads"],
        encoder_depth=config["encoder_depth"],
        decoder_depth=config["decoder_depth"],
        hidden=2 * hidden // 3 if config["gated_mlp"] else hidden,
        mlp=mlp,
        embeddings="encoder_decoder" if tied else "separate",
        extensions=(Registers(num=num),) if (num := config["num_register_tokens"]) else (),
        decoder_causal=config["decoder_causal_mask"],
        decoder_within_modality=config["decoder_sep_mask"],
        encoder_drop_path=config["drop_path_rate_encoder"],
        decoder_drop_path=config["drop_path_rate_decoder"],
        biases=tuple(name for name in BIASES if config[f"{name}_bias"]),
        qk_norm=config["qk_norm"],
        share_modality_embeddings=config["share_modality_embeddings"],
    )


class Piece(NamedTuple):
    """Rows `source` of a 4M tensor (as a matrix, or a vector) are `rows` of m4's parameter, or all of it.

    A transposed piece is in the columns `rows`.
    """

    parameter: str
    source: tuple[int, int]
    rows: tuple[int, int] | None = None
    transposed: bool = False


def layout(c: ModelConfig, modalities: Modalities) -> dict[str, list[Piece]]:
    """Every tensor that 4M uses -> where its rows are in m4's parameters."""
    tensors = _Layout(c)
    tensors.embeddings(modalities)
    for i in range(c.encoder_depth):
        tensors.norm(f"encoder.{i}.norm1", f"encoder.{i}.attention_norm", c.width)
        tensors.attention(f"encoder.{i}.attn", f"encoder.{i}.attention", cross=False)
        tensors.norm(f"encoder.{i}.norm2", f"encoder.{i}.mlp_norm", c.width)
        tensors.mlp(f"encoder.{i}", f"encoder.{i}")
    tensors.norm("encoder_norm", "encoder_norm", c.width)
    tensors.linear("decoder_proj_context", {"context_projection": c.width}, bias=True)
    for i in range(c.decoder_depth):
        tensors.norm(f"decoder.{i}.norm1", f"decoder.{i}.self_norm", c.width)
        tensors.attention(f"decoder.{i}.self_attn", f"decoder.{i}.self_attention", cross=False)
        tensors.norm(f"decoder.{i}.query_norm", f"decoder.{i}.query_norm", c.width)
        tensors.norm(f"decoder.{i}.context_norm", f"decoder.{i}.context_norm", c.width)
        tensors.attention(f"decoder.{i}.cross_attn", f"decoder.{i}.cross_attention", cross=True)
        tensors.norm(f"decoder.{i}.norm2", f"decoder.{i}.mlp_norm", c.width)
        tensors.mlp(f"decoder.{i}", f"decoder.{i}")
    tensors.norm("decoder_norm", "decoder_norm", c.width)
    tensors.pieces["mask_token"] = [Piece("mask_token", (0, 1))]
    if c.num_prefix_tokens:
        tensors.pieces["register_tokens"] = [Piece("registers", (0, c.num_prefix_tokens))]
    return tensors.pieces


class _Layout:
    """Tensors of 4M (`name`) and their pieces in m4's parameters (`parameter`), by kind of layer."""

    def __init__(self, config: ModelConfig):
        self.config, self.pieces = config, {}

    def linear(self, name: str, parts: dict[str, int], bias: bool, columns: tuple[int, int] | None = None) -> None:
        for suffix, leaf in (("weight", "kernel"), *([("bias", "bias")] if bias else [])):
            begin, self.pieces[f"{name}.{suffix}"] = 0, []
            for part, size in parts.items():
                piece = Piece(f"{part}.{leaf}", (begin, begin + size), columns, transposed=leaf == "kernel")
                self.pieces[f"{name}.{suffix}"].append(piece)
                begin += size

    def norm(self, name: str, parameter: str, size: int) -> None:
        self.pieces[f"{name}.weight"] = [Piece(f"{parameter}.scale", (0, size))]
        if "norm" in self.config.biases:
            self.pieces[f"{name}.bias"] = [Piece(f"{parameter}.bias", (0, size))]

    def attention(self, name: str, parameter: str, cross: bool) -> None:
        c = self.config
        query, key_value = {f"{parameter}.query": c.width}, {f"{parameter}.key_value": 2 * c.width}
        for part, parts in {"q": query, "kv": key_value}.items() if cross else [("qkv", {**query, **key_value})]:
            self.linear(f"{name}.{part}", parts, "qkv" in c.biases)
        self.linear(f"{name}.proj", {f"{parameter}.out": c.width}, "proj" in c.biases)
        if c.qk_norm:
            self.norm(f"{name}.q_norm", f"{parameter}.query_norm", c.width // c.num_heads)
            self.norm(f"{name}.k_norm", f"{parameter}.key_norm", c.width // c.num_heads)

    def mlp(self, name: str, parameter: str) -> None:
        c = self.config
        for i, layer in enumerate(("fc1", "fc3") if c.mlp == "swiglu" else ("fc1",)):
            columns = (i * c.hidden, (i + 1) * c.hidden)
            self.linear(f"{name}.mlp.{layer}", {f"{parameter}.mlp.up": c.hidden}, "mlp" in c.biases, columns)
        self.linear(f"{name}.mlp.fc2", {f"{parameter}.mlp.down": c.width}, "mlp" in c.biases)

    def table(self, name: str, parameter: str, offsets: tuple[int, ...], i: int) -> None:
        rows = offsets[i], offsets[i + 1]
        self.pieces[name] = [Piece(parameter, (0, rows[1] - rows[0]), rows)]

    def embeddings(self, modalities: Modalities) -> None:
        c, model = self.config, abstract(self.config, modalities)
        decoder_modality = "modality_embedding" if c.share_modality_embeddings else "decoder_modality_embedding"
        tied = c.embeddings == "encoder_decoder"
        for i, m in enumerate(modalities):
            encoder, decoder = f"encoder_embeddings.{m.name}", f"decoder_embeddings.{m.name}"
            if m.is_input:
                self.table(f"{encoder}.mod_emb", "modality_embedding", model.modality_rows, i)
                if m.learned_positions:
                    self.table(f"{encoder}.pos_emb", "position_embedding", model.position_rows, i)
                if isinstance(m, Features):
                    projection = "emb_proj" if len(m.shape) == 1 else "proj"
                    self.linear(f"{encoder}.{projection}", {f"feature_projections.{m.name}": c.width}, m.bias)
                else:
                    self.table(f"{encoder}.token_emb.weight", "token_embedding", model.input_rows, i)
            if m.is_target:
                self.table(f"{decoder}.mod_emb", decoder_modality, model.decoder_modality_rows, i)
                if m.learned_positions:
                    self.table(f"{decoder}.pos_emb", "decoder_position_embedding", model.decoder_position_rows, i)
                if tied or isinstance(m, Sequence):
                    self.table(f"{decoder}.token_emb.weight", "decoder_embedding", model.previous_rows, i)
                output = "decoder_embedding" if tied else "output_embedding"
                self.table(f"{decoder}.to_logits.weight", output, model.output_rows, i)


def unread(c: ModelConfig, modalities: Modalities, pieces: dict[str, list[Piece]]) -> dict[str, Modality | None]:
    """Tensors that a 4M checkpoint may hold but 4M does not use -> the modality that they belong to, if any."""
    tensors: dict[str, Modality | None] = {}
    if "norm" not in c.biases:
        norms = (n.removesuffix(".weight") for n, (piece, *_) in pieces.items() if piece.parameter.endswith(".scale"))
        tensors.update({f"{norm}.bias": None for norm in norms})
    for m in modalities:
        for side, used in (("encoder", m.is_input), ("decoder", m.is_target)):
            if used and not m.learned_positions:
                tensors[f"{side}_embeddings.{m.name}.pos_emb"] = m
        if m.is_target and isinstance(m, Grid):
            tensors[f"decoder_embeddings.{m.name}.token_emb.weight"] = m
    return {name: m for name, m in tensors.items() if name not in pieces}


def _expected(
    file: TensorFile, pieces: dict[str, list[Piece]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a file must hold.

    Several names of the same rows are copies of one tensor: one of them is enough; ValueError if two differ.
    """
    names, expected = defaultdict(list), {}
    for name, parts in pieces.items():
        names[tuple((p.parameter, p.rows) for p in parts)].append(name)
    for copies in names.values():
        present = [name for name in copies if name in file.entries] or copies[:1]
        for name in present:
            expected[name] = _shape(name, pieces[name], shapes)
            if name != present[0] and not _same(file, name, present[0]):
                raise ValueError(f"{file.path}: {present[0]} and {name} are one tensor by the config, but differ")
    return expected


def check_unread(file: TensorFile, name: str, m: Modality | None, c: ModelConfig) -> None:
    """ValueError if a tensor that is not used would change the result."""
    shape = file.entries[name].shape
    if m is None:
        if file.tensor(name).any():
            raise ValueError(f"{file.path}: {name} is not zero, but the config says norm_bias=False")
    elif name.endswith(".pos_emb"):
        value = file.tensor(name)[0].astype(np.float32)
        fixed = positions_of(m, c.width, c.position_base)
        if isinstance(m, Sequence) or len(m.shape) == 1:
            fixed = sine_cosine(np.arange(len(value)), c.width, c.position_base)
        if value.shape != fixed.shape or np.abs(value - fixed).max() > 1e-2:  # bfloat16 files round them
            raise ValueError(f"{file.path}: {name} {list(shape)} is not the table of sines and cosines for {m}")
    elif shape != (m.vocab_size, c.width):
        raise ValueError(f"{file.path}: {name} {list(shape)} instead of {[m.vocab_size, c.width]}")


def _matrix(tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor


def _same(file: TensorFile, a: str, b: str) -> bool:
    x, y = file.tensor(a), file.tensor(b)
    return x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()


def to_m4(file: TensorFile, out: Path, declared: Seq[Modality] = ()) -> str:
    """A 4M checkpoint -> a model file; returns a summary. Everything is checked before `out` is written."""
    config = parse_config(file)
    modalities = modalities_of(config, file, declared)
    token, logits = ("decoder_embeddings.{}.token_emb.weight", "decoder_embeddings.{}.to_logits.weight")
    pairs = [(token.format(m.name), logits.format(m.name)) for m in modalities if m.is_target]
    tied = all(a not in file.entries or b not in file.entries or _same(file, a, b) for a, b in pairs)
    c = model_config(config, tied=tied, path=file.path)
    check_sizes(c, modalities, file)
    pieces = layout(c, modalities)
    m4_shapes = parameter_shapes(c, modalities)

    expected = _expected(file, pieces, m4_shapes)
    other = unread(c, modalities, pieces)
    check_names(file, expected, other)
    for name, m in other.items():
        if name in file.entries:
            check_unread(file, name, m, c)

    sources = defaultdict(dict)  # parameter -> {rows: (4M's name, 4M's rows, transposed)}
    for name in expected:
        for p in pieces[name]:
            sources[p.parameter].setdefault(p.rows, (name, p.source, p.transposed))
    shapes = {}
    for name, shape in m4_shapes.items():
        dtypes = {file.entries[source].dtype for source, _, _ in sources[name].values()}
        shapes[name] = (dtypes.pop() if len(dtypes) == 1 else "F32", shape)
    kept = {KEPT + n: (file.entries[n].dtype, file.entries[n].shape) for n in other if n in file.entries}

    def pieces_of(name: str) -> Iterator[np.ndarray]:
        if name.startswith(KEPT):
            yield file.tensor(name.removeprefix(KEPT))
        elif not sources[name]:
            yield np.zeros(shapes[name][1], np.float32)  # the embeddings of in-context examples, which 4M lacks
        dtype, columns = DTYPES[shapes[name][0]], []
        for source, rows, transposed in (sources[name][k] for k in sorted(sources[name], key=lambda r: r or (0, 0))):
            part = file.check_finite(source, _matrix(file.tensor(source))[slice(*rows)]).astype(dtype)
            if transposed:
                columns.append(part.T)
            else:
                yield part
        if columns:
            yield np.concatenate(columns, axis=1)

    shapes.update(kept)
    metadata = {**describe(c, modalities), "step": "0", "original_header": file.header}
    progress = tqdm(shapes, desc=f"writing {out.name}", unit="tensor", mininterval=1, disable=None)
    write(out, make_header(shapes, metadata), (pieces_of(name) for name in progress))
    unused = sum(math.prod(shape) for n, (_, shape) in kept.items() if n.endswith("token_emb.weight"))
    total = sum(math.prod(shape) for n, shape in m4_shapes.items() if n != "item_embedding") + unused
    return f"{out}: {total:,} parameters of the original, {len(modalities)} modalities, {len(file.entries)} tensors"


def original_rows(p: Piece, array: np.ndarray) -> np.ndarray:
    """The rows of a 4M tensor from m4's parameter (or, if not transposed, from its `rows` alone)."""
    return array[:, slice(*p.rows or (None,))].T if p.transposed else array


def _shape(name: str, parts: list[Piece], m4_shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a tensor in 4M."""
    rows, last = sum(p.source[1] - p.source[0] for p in parts), m4_shapes[parts[0].parameter]
    if len(last) == 1:
        return (rows,)
    matrix = (rows, last[0] if parts[0].transposed else last[1])
    return (1, *matrix) if name.endswith(("mod_emb", "pos_emb", "mask_token", "register_tokens")) else matrix


def to_4m(file: TensorFile, out: Path) -> str:
    """A converted model file -> 4M's format, with its original header."""
    c, modalities = read_description(file)
    if "original_header" not in file.metadata:
        raise ValueError(f"{file.path} was not made from an original checkpoint, so there is no header to restore")
    try:
        _, header = parse_header(file.metadata["original_header"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.path}: the original's header in it is corrupt: {error}") from error
    pieces = layout(c, modalities)
    if lost := [name for name in header if KEPT + name not in file.entries and name not in pieces]:
        raise ValueError(f"{file.path}: the original's header in it names unknown tensors: {', '.join(lost[:5])}")

    def pieces_of(name: str) -> Iterator[np.ndarray]:
        if KEPT + name in file.entries:
            yield file.tensor(KEPT + name)
            return
        for p in pieces[name]:
            rows = original_rows(p, file.tensor(p.parameter, None if p.transposed else p.rows))
            yield file.check_finite(p.parameter, rows).astype(DTYPES[header[name].dtype])

    order = sorted(header, key=lambda name: header[name].begin)
    progress = tqdm(order, desc=f"writing {out.name}", unit="tensor", mininterval=1, disable=None)
    write(out, file.metadata["original_header"], (pieces_of(name) for name in progress))
    return f"{out}: {len(order)} tensors in the original's format"


def convert(source: Path, out: Path, declared: Seq[Modality] = ()) -> str:
    """Converts in either direction, by what `source` is. ValueError for damage, and for values that are not finite."""
    file = named_as_today(TensorFile.read(source))
    if out.exists() and out.resolve() == file.path.resolve():
        raise ValueError(f"{out} is the input itself; give another name")
    remove_leftovers(out.parent)
    return to_4m(file, out) if "m4_model" in file.metadata else to_m4(file, out, declared)
