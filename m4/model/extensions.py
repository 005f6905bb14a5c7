"""Changes of a model, each a frozen dataclass in a file of its own.

    ModelConfig(extensions=(Registers(num=8), ...))

An extension may add parts to the layers of each block (`wrap`), add parameters and modules of its own (`add`), change
what the encoder reads (`inputs`), what its first blocks see (`first_blocks`), and what the decoder attends to
(`observe` and `bias`). The model calls all of these and knows none by name. Parameters of an extension have random
streams of their own, or come last, so that those of the model keep their bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from m4.model.block_inputs import AttentionBias, TokenInfo
from m4.model.visibility import Visible
from m4.tokens.batch import Targets, Tokens
from m4.tokens.modality import Modalities


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extension:
    """A change of the model that does nothing yet: each method is a place to change something."""

    parameters: ClassVar[tuple[str, ...]] = ()
    """Patterns of its parameters, as OptimizerConfig.train takes them: what is trained beside a frozen model, and is
    saved alone."""

    @property
    def parameters_by_modality(self) -> tuple[str, ...]:
        """Patterns of those whose first axis, within a block, is the modality."""
        return ()

    @property
    def num_prefix_tokens(self) -> int:
        """Learned tokens before all inputs of the encoder (rows of the model's `registers`)."""
        return 0

    @property
    def can_merge(self) -> bool:
        """Whether what it adds is a change of kernels alone, which can be added to them for good."""
        return False

    def sizes(self) -> dict[str, int]:
        """Sizes of what it adds, by name: at least 1, and bounded by a model file before anything is allocated."""
        return {}

    def check(self, config: Any, modalities: Modalities | None) -> None:
        """ValueError for what does not fit a ModelConfig, or modalities (None: not known yet)."""

    def wrap(self, module: nnx.Module, config: Any, num_modalities: int, rngs: nnx.Rngs) -> None:
        """Adds parts to one module of a block, or to the block, which is the last of its modules: `module.add(name,
        part)`. `rngs.extensions()` gives keys."""

    def add(self, model: Any, rngs: nnx.Rngs) -> None:
        """Adds modules and parameters to the model, as attributes with names of its own."""

    def inputs(self, model: Any, x: Float[Array, "B N D"], inputs: Tokens) -> Float[Array, "B N D"]:
        """What the encoder reads instead of content + address."""
        return x

    def first_blocks(self, info: TokenInfo) -> tuple[int, Visible] | None:
        """How many blocks of the encoder come first, before `observe`, and what their tokens see."""
        return None

    def observe(self, model: Any, x: Float[Array, "B N D"], inputs: Tokens) -> Any:
        """What it keeps for the decoder of the inputs, as the first blocks hand them on."""

    def bias(self, observed: Any, targets: Targets) -> AttentionBias | None:
        """What is added to the logits with which targets attend to inputs (keys: of the inputs alone)."""
        return None


def modules_of(module: nnx.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], nnx.Module]]:
    """(path, module) of the modules within a module in the order in which they were created, then of itself."""
    for name, part in list(vars(module).items()):
        if isinstance(part, nnx.Module):
            yield from modules_of(part, (*path, name))
    yield path, module
