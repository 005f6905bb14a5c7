"""The sizes and options of the encoder-decoder."""

from __future__ import annotations

import dataclasses
from typing import Literal

from m4.model.layers import BlockConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(BlockConfig):
    """Sizes and variants; `m4.interchange.fourm.released` gives those of the original, Tiny to XL.

    embeddings: which tables of token embeddings there are.
        "shared"           one, read by encoder and decoder, and the output weights too
        "encoder_decoder"  one of the encoder; one of the decoder, its output weights too (4M's training script)
        "separate"         the encoder's, the decoder's, the output weights (4M's released checkpoints)
    share_modality_embeddings: one modality embedding for both sides (4M-7), or one for each (4M-21).
    embedding_scale multiplies token embeddings where they are read (sqrt(width) in Vaswani et al. 2017, section 3.4).
    position_base is the longest wavelength of the sine-cosine positions over 2 pi: for small grids a smaller one tells
    neighbours apart sooner.
    num_registers: learned tokens before all inputs of the encoder (Darcet et al. 2023).
    remat: what the backward pass computes again instead of keeping: whole "blocks" (a third more compute), or "none" of
        them but norms, the MLPs' gates and attention weights.
    unroll: blocks that are compiled as one piece: several are faster on CPU (fewer copies), and take more memory and
        longer to compile.
    separate_depth: of the encoder's blocks the first so many, in which the query and each in-context example (each
        image of it) see only themselves, as in pretraining; those behind see all.
    match_size: of the vectors by which examples are compared for the decoder to copy from those that are like the query
        (m4.model.similarity_prior; 0: none). match_words: the text modality by whose words they are compared too,
        "caption"; images with captions among the data teach them.
    shot_depth: blocks that read the in-context examples before the encoder does: a light module to train beside a
        frozen model (`OptimizerConfig.train`), after Chen et al. 2023 (M2IXT, section 3).
    encoder_drop_path, decoder_drop_path: stochastic depth in training, from 0 in the first block to this in the last.
    """

    encoder_depth: int = 4
    decoder_depth: int = 4
    embeddings: Literal["shared", "encoder_decoder", "separate"] = "shared"
    share_modality_embeddings: bool = True
    embedding_scale: float = 1.0
    position_base: float = 10_000.0
    num_registers: int = 0
    separate_depth: int = 0
    match_size: int = 0
    match_words: str = ""
    shot_depth: int = 0
    decoder_within_modality: bool = True
    decoder_causal: bool = False
    encoder_drop_path: float = 0.0
    decoder_drop_path: float = 0.0
    remat: Literal["none", "blocks"] = "none"
    unroll: int = 1

    def __post_init__(self):
        super().__post_init__()
        if min(self.width, self.num_heads, self.encoder_depth, self.decoder_depth, self.hidden, self.unroll) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        extras = ("shot_depth", "match_size", "num_registers", "adapter_size")
        if wrong := {name: value for name in extras if (value := getattr(self, name)) < 0}:
            raise ValueError(f"sizes must be at least 0: {wrong}")
        if self.match_words and not self.match_size:
            raise ValueError(f"match_words={self.match_words!r} needs a match_size, such as 32")
        if not 0 <= self.separate_depth < max(self.encoder_depth, 1):
            raise ValueError(
                f"separate_depth={self.separate_depth} must be at least 0 and less than encoder_depth="
                f"{self.encoder_depth}"
            )
        if not (0 <= self.encoder_drop_path < 1 and 0 <= self.decoder_drop_path < 1):
            raise ValueError(f"encoder_drop_path and decoder_drop_path must lie within [0, 1): {self}")
