"""The released 4M: its modalities, model sizes and batches (Mizrahi et al. 2023; Bachmann et al. 2024).

B batch, L tokens of one modality, N input slots, M target slots, F values in one feature vector

Each modality of 4M-7, 4M-21 and their super-resolution models is one line below. A modality of your own is one more
`Grid`, `Sequence` or `Features`: a config lists any mixture of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, Literal

import numpy as np
from einops import rearrange
from flax import nnx

from m4.errors import closest
from m4.model.config import ModelConfig
from m4.model.encoder_decoder import Model
from m4.model.layers import BIASES
from m4.tokens.batch import MaskedBatch, Targets, Tokens
from m4.tokens.modality import Features, Grid, Modalities, Modality, Sequence

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _grid(name: str, signal: str, vocab_size: int, side: int) -> Grid:
    return Grid(name=name, signal=signal, vocab_size=vocab_size, shape=(side, side))


def _vector(name: str, signal: str) -> Grid:
    """One vector as 16 ids, predicted in any order; their positions are learned."""
    return Grid(name=name, signal=signal, vocab_size=8192, shape=(16,), learned_positions=True)


def _text(name: str, signal: str, max_length: int, **fields) -> Sequence:
    """Ids of 4M's WordPiece file: [EOS] = 3, sentinels from [S_1] = 5 to [S_199] = 203."""
    ids: dict[str, Any] = {"vocab_size": 30_000, "first_sentinel": 5, "num_sentinels": 199, "end_id": 3}
    return Sequence(name=name, signal=signal, max_length=max_length, **ids, **fields)


def _pixels(name: str, signal: str, side: int) -> Features:
    """16 x 16 patches, channels last, normalised by ImageNet's mean and deviation."""
    shape = (side, side)
    return Features(
        name=name, signal=signal, shape=shape, size=768, scale=255.0, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        dtype="uint8",
    )  # fmt: skip


MODALITIES: dict[str, Modality] = {
    m.name: m
    for m in (
        # 4M-7, at 224 x 224 pixels
        _pixels("rgb@224", "rgb", 14),
        _text("caption", "caption", 256),
        _text("det", "boxes", 256),
        _grid("tok_rgb@224", "rgb", 16_384, 14),
        _grid("tok_depth@224", "depth", 8192, 14),
        _grid("tok_normal@224", "normals", 8192, 14),
        _grid("tok_semseg@224", "semseg", 4096, 14),
        _grid("tok_clip@224", "clip", 8192, 14),
        # 4M-21
        Features(name="t5_caption", signal="t5_caption", shape=(77,), size=4096, bias=True),
        _text("metadata", "metadata", 40, chunk_ids=(1204, 2204)),  # a field, v1=*, and its value
        _text("human_poses", "poses", 275, num_target_positions=263),
        _text("color_palette", "palette", 23),
        _text("sam_instance", "instances", 290),
        _grid("tok_canny_edge@224", "edges", 8192, 14),
        _grid("tok_sam_edge@224", "sam_edges", 8192, 14),
        _grid("tok_dinov2@224", "dinov2", 8192, 16),
        _grid("tok_imagebind@224", "imagebind", 8192, 16),
        _vector("tok_dinov2_global", "dinov2_global"),
        _vector("tok_imagebind_global", "imagebind_global"),
        # Super-resolution, 448 x 448
        _pixels("rgb@448", "rgb@448", 28),
        _grid("tok_rgb@448", "rgb@448", 16_384, 28),
        _grid("tok_depth@448", "depth@448", 8192, 28),
        _grid("tok_normal@448", "normals@448", 8192, 28),
        _grid("tok_semseg@448", "semseg@448", 4096, 28),
        _grid("tok_clip@448", "clip@448", 8192, 28),
    )
}  # fmt: skip

MOD7 = ("rgb@224", "caption", "det", "tok_rgb@224", "tok_depth@224", "tok_normal@224", "tok_semseg@224", "tok_clip@224")

MOD21 = (
    *("caption", "t5_caption", "det", "metadata", "human_poses", "color_palette", "sam_instance"),
    *("rgb@224", "tok_rgb@224", "tok_normal@224", "tok_depth@224", "tok_semseg@224", "tok_clip@224"),
    *("tok_dinov2@224", "tok_dinov2_global", "tok_imagebind@224", "tok_imagebind_global"),
    *("tok_sam_edge@224", "tok_canny_edge@224"),
)

SIZES = {  # name: (width, heads, encoder blocks, decoder blocks)
    "tiny": (384, 6, 6, 6),
    "small": (512, 8, 8, 8),
    "base": (768, 12, 12, 12),
    "large": (1024, 16, 24, 24),
    "xlarge": (2048, 32, 24, 24),
}


def modality(name: str) -> Modality:
    """4M's modality of that name; ValueError with the closest match."""
    if name not in MODALITIES:
        raise ValueError(f"unknown modality {name!r} of the original; {closest(name, list(MODALITIES))}")
    return MODALITIES[name]


def is_released(modalities: Modalities) -> bool:
    """Whether all modalities are 4M's own, by name and vocabulary."""
    identity = lambda m: (type(m), m.signal, m.vocab_size, m.max_tokens)  # noqa: E731
    return all(m.name in MODALITIES and identity(MODALITIES[m.name]) == identity(m) for m in modalities)


def released(
    size: str,
    *,
    mlp: Literal["swiglu", "gelu"] = "swiglu",
    **changes: Any,
) -> ModelConfig:
    """A released model: `released("base")`, `released("large", qk_norm=True)`, `released("tiny", mlp="gelu")`.

    Its tables are those of 4M's training: one of the encoder, one of the decoder.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; {closest(size, list(SIZES))}")
    width, num_heads, encoder_depth, decoder_depth = SIZES[size]
    biases = BIASES if mlp == "gelu" else ()
    hidden = 4 * width if mlp == "gelu" else 8 * width // 3
    sizes = {"width": width, "num_heads": num_heads, "encoder_depth": encoder_depth, "decoder_depth": decoder_depth}
    fields: dict[str, Any] = {**sizes, "hidden": hidden, "mlp": mlp, "embeddings": "encoder_decoder", "biases": biases}
    return ModelConfig(**{**fields, **changes})


def num_parameters(config: ModelConfig, modalities: Modalities) -> int:
    """Parameters as ml-4m counts them: its decoder has two tables of all targets, one for inputs and one for logits,
    and no embeddings of items."""
    model = nnx.eval_shape(lambda: Model(config, modalities, rngs=nnx.Rngs(0)))
    counts = {path[0]: 0 for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        counts[path[0]] += math.prod(x.shape)
    rows = {side: sum(m.vocab_size for m in modalities if getattr(m, side)) for side in ("is_input", "is_target")}
    tables = (rows["is_input"] + 2 * rows["is_target"]) * config.width
    not_counted = ("token_embedding", "decoder_embedding", "output_embedding", "item_embedding")
    return tables + sum(count for name, count in counts.items() if name not in not_counted)


def masked_batch(
    batch: Mapping[str, Mapping[str, np.ndarray]],
    modalities: Modalities,
    *,
    num_inputs: int,
    num_targets: int,
    target_order: Seq[str] | None = None,
) -> MaskedBatch:
    """A batch of ml-4m's masking -> the same tokens at the same slots.

    `batch[name]` holds "tensor" (ids [B L] or [B h w], normalised images [B C H W], vectors [B L F]), "input_mask"
    and "target_mask" (bool [B L], True = masked out). Inputs are in the order of `batch`, targets in `target_order`, of
    which the first num_inputs and num_targets are kept.

    The visible tokens of a sequence have consecutive positions, on both sides. A sequence's target slot reads one
    visible token and predicts the next:

        tensor          a  S1 b  $  S1 c  d  S2        (S1 b $ ... as `m4.masking.dirichlet` draws it)
        visible target  .  .  .  .  x  x  x  x
        previous                    S1 c  d
        ids                         c  d  S2
        position                    0  1  2
    """
    inputs, targets, features = [], [], {}
    for name, d in batch.items():
        m = modalities.named(name)
        if not m.is_input:
            continue
        masked = np.asarray(d["input_mask"], bool)
        count = np.cumsum(~masked, axis=1) - 1
        ids = count
        if isinstance(m, Features):
            vectors = np.asarray(d["tensor"], np.float32)
            if vectors.ndim == 4:
                rows, columns = m.shape
                vectors = rearrange(vectors, "b c (h p) (w q) -> b (h w) (p q c)", h=rows, w=columns)
            kept = np.argsort(masked, axis=1, kind="stable")[:, : min(m.max_tokens, num_inputs)]
            features[name] = np.take_along_axis(vectors, kept[..., None], axis=1)
        else:
            ids = np.asarray(d["tensor"]).reshape(masked.shape)
        consecutive = isinstance(m, Sequence) or (isinstance(m, Features) and len(m.shape) == 1)
        position = count if consecutive else np.broadcast_to(np.arange(masked.shape[1]), masked.shape)
        inputs.append((ids, np.full_like(ids, modalities.index(name)), position, masked))
    for name in target_order or batch:
        m = modalities.named(name)
        if not m.is_target:
            continue
        masked = np.asarray(batch[name]["target_mask"], bool)
        ids = np.asarray(batch[name]["tensor"]).reshape(masked.shape)
        previous, position = np.full_like(ids, -1), np.broadcast_to(np.arange(masked.shape[1]), masked.shape)
        if isinstance(m, Sequence):
            position = (np.cumsum(~masked, axis=1) - 1)[:, :-1]
            previous, ids, masked = ids[:, :-1], ids[:, 1:], masked[:, 1:] | masked[:, :-1]
        targets.append((ids, previous, np.full_like(ids, modalities.index(name)), position, masked))
    ids, index, position, valid = _first(inputs, num_inputs)
    query = np.zeros_like(ids)
    packed = Tokens(ids, index, position, query, query, valid)
    ids, previous, index, position, valid = _first(targets, num_targets)
    query = np.zeros_like(ids)
    return MaskedBatch(packed, Targets(ids, previous, index, position, query, query, valid), features)


def _first(parts: list[tuple[np.ndarray, ...]], num_slots: int) -> list[np.ndarray]:
    """Joins parts (arrays [B L], the last = masked out), keeps the first unmasked: int32 [B num_slots], valid last."""
    *columns, masked = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    order = np.argsort(masked, axis=1, kind="stable")[:, :num_slots]
    order = np.pad(order, ((0, 0), (0, num_slots - order.shape[1])))
    valid = ~np.take_along_axis(masked, order, axis=1) & (np.arange(num_slots) < masked.shape[1])
    rows = [np.where(valid, np.take_along_axis(c, order, axis=1), 0).astype(np.int32) for c in columns]
    return [*rows, valid]
