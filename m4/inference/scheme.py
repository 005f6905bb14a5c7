"""Conditional generation of tokens: any subset of modalities in, one modality out, one compiled loop.

B rows, P passes of guidance, N context slots, n tokens of the target, K known ones, O open ones, S steps, V vocabulary

    MaskGIT         predicts all open tokens of a grid at once, keeps the most confident ones, and repeats
    ROAR            predicts the tokens of a grid in random order, several at once
    Autoregressive  predicts a sequence left to right

A scheme is a frozen dataclass; adding one edits nothing else. A stage generates one target, which later stages see.
Guidance runs its passes as further rows of the same batch. Random values are a function of (seed, row, stage, step,
position), so that a row's result depends neither on its batch nor on what else is generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from m4.inference.guidance import Guidance
from m4.model.encoder_decoder import Model
from m4.tokens.batch import Array as TokenArray
from m4.tokens.batch import Tokens
from m4.tokens.grammar import Grammar
from m4.tokens.modality import Modality


class Prompt(NamedTuple):
    """What a stage reads. Pass 0 of guidance lacks the dropped inputs; without guidance it is the only pass.

    `given`: the target's own tokens, -1 where one is to be generated (grids). `num_spans` to generate,
    `has_fixed_tokens` and `open_end` (whether the end is to be generated) are those of sequences.
    """

    inputs: Tokens  # [B P N]
    features: Mapping[str, Float[TokenArray, "B P K F"]]
    given: Int[TokenArray, "B n"]
    num_spans: Int[TokenArray, " B"]
    has_fixed_tokens: Bool[TokenArray, " B"]
    open_end: Bool[TokenArray, " B"]
    grammar: Grammar | None = None

    @property
    def num_passes(self) -> int:
        return self.inputs.ids.shape[1]

    def rows(self) -> tuple[Tokens, dict]:
        """Inputs [B*P N] and features, as the model reads them."""
        inputs = Tokens(*(x.reshape(-1, x.shape[-1]) for x in self.inputs))
        return inputs, {name: x.reshape(-1, *x.shape[2:]) for name, x in self.features.items()}


class GeneratedTokens(NamedTuple):
    """Ids, the log-probability with which each was drawn, and its step from 0, or -1 for a given token."""

    ids: Int[Array, "B n"]
    log_probability: Float[Array, "B n"]
    step: Int[Array, "B n"]


class Replay(NamedTuple):
    """Recorded randomness instead of seeds: an order of a grid's positions; Gumbel noise by step and position."""

    order: Int[Array, "B n"] | None = None
    noise: Float[Array, "S B *n V"] | None = None


# ---- Schemes --------------------------------------------------------------------------------------------------------


@runtime_checkable
class Scheme(Protocol):
    def check(self, modality: Modality) -> None:
        """ValueError if the scheme cannot generate this kind of modality, or a field is out of range."""

    def prepare(self, modality: Modality, prompt: Prompt, seeds: Int[np.ndarray, "B k"]) -> tuple[Any, Any]:
        """What is known before the model runs: static (hashable) sizes, and arrays. `seeds`: those of each row."""

    def generate(
        self, model: Model, modality: Modality, prompt: Prompt, guidance: Guidance | None,
        static: Any, arrays: Any, replay: Replay, on_step: Callable | None,
    ) -> GeneratedTokens: ...  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One target and how to generate it."""

    target: str
    """Signal or exact modality name."""
    scheme: Any
    """MaskGIT or ROAR for grids, Autoregressive for sequences."""
    guidance: Guidance | None = None
    """Classifier-free guidance; None leaves it out."""
    ensemble: int = 1
    """Samples of each row that the target's tokenizer averages (dense outputs: depth, images); 1 averages none."""
