"""The sizes and options of the encoder-decoder."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeVar

from m4.model.layers import BlockConfig

ExtensionClass = TypeVar("ExtensionClass")


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
    max_items: int = 17
    """Items of a prompt (images and texts of the query and of labelled examples) that have learned addresses. A prompt
    may hold more: the addresses of further ones are sines, of the same size."""
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
        sizes = self.width, self.num_heads, self.encoder_depth, self.decoder_depth, self.hidden, self.max_items
        if min(*sizes, self.unroll) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        kinds = [type(extension).__name__ for extension in self.extensions]
        if len({*kinds}) < len(kinds):
            raise ValueError(f"extensions={kinds} must be of different classes")
        for extension in self.extensions:
            if wrong := {name: value for name, value in extension.sizes().items() if value < 1}:
                raise ValueError(f"{extension}: sizes must be at least 1: {wrong}")
            extension.check(self, None)
        if not (0 <= self.encoder_drop_path < 1 and 0 <= self.decoder_drop_path < 1):
            raise ValueError(f"encoder_drop_path and decoder_drop_path must lie within [0, 1): {self}")

    @property
    def num_prefix_tokens(self) -> int:
        """Learned tokens before all inputs of the encoder."""
        return sum(extension.num_prefix_tokens for extension in self.extensions)

    def extension(self, cls: type[ExtensionClass]) -> ExtensionClass | None:
        """The extension of a class, if there is one."""
        return next((extension for extension in self.extensions if isinstance(extension, cls)), None)

    def without(self, cls: type) -> ModelConfig:
        """The same without an extension."""
        return dataclasses.replace(self, extensions=tuple(e for e in self.extensions if not isinstance(e, cls)))
