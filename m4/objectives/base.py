"""What training minimises: a sum of objectives, each a frozen dataclass in a file of its own.

    Config(objectives=(MaskedModeling(weighting="token"), Contrast(a=("rgb_pixels",), b=("caption",))))

A new one edits no other file: configs name it, the step sums it, a saved config brings it back.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float

from m4.model.encoder_decoder import Model, Outputs
from m4.tokens.batch import MaskedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """One summand of the loss. Only `__call__` must be defined."""

    name: ClassVar[str]
    """In errors, and before the names of its scalars."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Trained models that it reads, whose tokenizers must be those of the run."""
        return ()

    def exported(self) -> Objective:
        """What the config of an exported model says, which knows no other files."""
        return self

    def check(self, config: Any) -> None:
        """ValueError for what cannot be trained so; `config` is an m4.config.Config."""

    def load(self, config: Any, model: Model, mesh: jax.sharding.Mesh) -> Any:
        """A pytree of what it reads besides the batch, such as a frozen model's parameters: an argument of the step.

        `model` is the one that is trained, without values.
        """

    def totals(self, batch: MaskedBatch, model: Model) -> Any:
        """What the loss is divided by, counted over the whole batch, for micro-batches to add up to it."""

    @abc.abstractmethod
    def __call__(
        self, outputs: Outputs, part: MaskedBatch, totals: Any, loaded: Any
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The loss of a part of the batch (a micro-batch, or all of it), and scalars by name that add up likewise."""
