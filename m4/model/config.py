"""The sizes and options of the encoder-decoder."""

from __future__ import annotations

import dataclasses
from typing import Literal

from m4.model.layers import BlockConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(BlockConfig):
    """Sizes and variants of the encoder-decoder; `m4.interchange.fourm.released` gives those of 4M, Tiny to XL."""

    encoder_depth: int = 4
    """Blocks of the encoder."""
    decoder_depth: int = 4
    """Blocks of the decoder."""
    embeddings: Literal["shared", "encoder_decoder", "separate"] = "shared"
    """Tables of token embeddings. "shared": one for encoder, decoder and output weights. "encoder_decoder": one of the
    encoder, one of the decoder and its output weights (4M's training script). "separate": the encoder's, the decoder's,
    the output weights (4M's released checkpoints)."""
    share_modality_embeddings: bool = True
    """One embedding of each modality for both sides (4M-7), or one for each side (4M-21)."""
    embedding_scale: float = 1.0
    """Factor of token embeddings where they are read (sqrt(width) in Vaswani et al. 2017, section 3.4)."""
    position_base: float = 10_000.0
    """Longest wavelength of the sine-cosine positions over 2 pi. A smaller one tells neighbours in small grids apart
    sooner."""
    num_registers: int = 0
    """Learned tokens before all inputs of the encoder (Darcet et al. 2023); 0 is none."""
    num_independent_blocks: int = 0
    """First blocks of the encoder in which the query and each in-context example (each image of it) see only
    themselves, as in pretraining; later blocks see all. Less than encoder_depth."""
    match_size: int = 0
    """Values in the vectors by which in-context examples are compared, for the decoder to copy from those like the
    query (m4.model.similarity_prior); 0 is none."""
    match_words: str = ""
    """Text modality by whose words examples are compared too, such as "caption"; images with captions in the data teach
    them. "" is none."""
    shot_depth: int = 0
    """Blocks that read the in-context examples before the encoder does: a light module to train beside a frozen model
    (Chen et al. 2023, M2IXT, section 3); 0 is none."""
    decoder_within_modality: bool = True
    """Targets see only targets of their own modality; if false, those of earlier modalities too."""
    decoder_causal: bool = False
    """Targets see earlier slots only, in grids too."""
    encoder_drop_path: float = 0.0
    """Stochastic depth in training: rate of the encoder's last block, from 0 in the first; in [0, 1)."""
    decoder_drop_path: float = 0.0
    """The same in the decoder."""
    remat: Literal["none", "blocks"] = "none"
    """What the backward pass computes again to save memory: whole "blocks" (a third more compute), or with "none" only
    norms, the gates of MLPs and attention weights."""
    unroll: int = 1
    """Blocks that are compiled as one piece. More are faster on CPU, and take more memory and longer to compile."""

    def __post_init__(self):
        super().__post_init__()
        if min(self.width, self.num_heads, self.encoder_depth, self.decoder_depth, self.hidden, self.unroll) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        extras = ("shot_depth", "match_size", "num_registers", "adapter_size")
        if wrong := {name: value for name in extras if (value := getattr(self, name)) < 0}:
            raise ValueError(f"sizes must be at least 0: {wrong}")
        if self.match_words and not self.match_size:
            raise ValueError(f"match_words={self.match_words!r} needs a match_size, such as 32")
        if not 0 <= self.num_independent_blocks < max(self.encoder_depth, 1):
            raise ValueError(
                f"num_independent_blocks={self.num_independent_blocks} must be at least 0 and less than encoder_depth="
                f"{self.encoder_depth}"
            )
        if not (0 <= self.encoder_drop_path < 1 and 0 <= self.decoder_drop_path < 1):
            raise ValueError(f"encoder_drop_path and decoder_drop_path must lie within [0, 1): {self}")
