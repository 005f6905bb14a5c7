"""What a block receives besides its tokens' vectors."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from m4.model.visibility import Visible


class TokenInfo(NamedTuple):
    """What a layer may know of its tokens. Those before the inputs have modality -1."""

    modality: Int[Array, "*B T"]
    position: Int[Array, "*B T"]
    item: Int[Array, "*B T"]
    example: Int[Array, "*B T"]
    valid: Bool[Array, "*B T"]


class AttentionBias(NamedTuple):
    """What is added to the logits of head n for query t and key s: (weight_n x queries_t) . keys_s."""

    queries: Float[Array, "B T R"]
    keys: Float[Array, "B S R"]
    weight: Float[Array, "N R"]


class BlockInputs(NamedTuple):
    """What the blocks of a stack have in common, and each block's own `branch_scale`."""

    visible: Visible
    """Which tokens each token sees in self-attention."""
    info: TokenInfo | None = None
    """Of the tokens."""
    context: Float[Array, "B S D"] | None = None
    """What cross-attention reads; of decoders alone, as are the next three."""
    context_info: TokenInfo | None = None
    context_visible: Visible | None = None
    bias: AttentionBias | None = None
    """What is added to the logits of cross-attention."""
    branch_scale: Float[Array, "branches B"] | None = None
    """Factors of each residual branch, 0 or 1 / (1 - p) (stochastic depth, Huang et al. 2016); None: 1."""
