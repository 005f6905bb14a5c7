"""Learned tokens before all inputs of the encoder: registers, or soft prompts where they alone are trained.

    ModelConfig(extensions=(Registers(num=8),))     and, for soft prompts,    OptimizerConfig(train=("registers",))

Darcet et al. 2024 (registers); Lester et al. 2021 (prompt tuning).
"""

from __future__ import annotations

import dataclasses

from m4.model.extensions import Extension


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registers(Extension):
    """Learned tokens that all inputs of the encoder see, and the decoder too."""

    num: int = 8
    """Number of tokens, at least 1."""

    parameters = ("registers",)

    @property
    def num_prefix_tokens(self) -> int:
        return self.num

    def sizes(self) -> dict[str, int]:
        return {"registers.num": self.num}
