"""Classes of whole samples: one token for each label, the classification head of a model that predicts tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from m4.errors import closest
from m4.tokens.modality import Grid
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.reading import Reader
from m4_tokenizers.modalities.text import draw_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassRecipe:
    """The label of an example; its token is its index in the classes."""

    signal: str = "category"
    """Signal that is read."""
    name: str = "category"
    """Name of the modality."""
    classes: tuple[str, ...]
    """Names of the classes, at least two."""

    kind = "class"

    def __post_init__(self):
        if len(set(self.classes)) < max(2, len(self.classes)):
            raise ValueError(f"classes must be different names, at least two; got {self.classes}")

    @property
    def modality(self) -> Grid:
        return Grid(name=self.name, signal=self.signal, vocab_size=len(self.classes), shape=(1,))

    def fit(self, source: Examples, *, seed: int) -> "ClassTokenizer":
        """Nothing is fitted."""
        return ClassTokenizer(recipe=self, card={"component": "classes", "num_classes": len(self.classes)})


class ClassTokenizer(Reader):
    """Labels (strings) to ids int32 [1] and back."""

    kind = "class"

    def __init__(self, *, recipe: ClassRecipe, card: dict[str, Any]):
        self.recipe, self.modality, self.card = recipe, recipe.modality, card

    def signal_of(self, example: Mapping[str, Any]) -> str | None:
        return example[self.modality.signal] if self.modality.signal in example else None

    def encode(self, signals: Seq[str]) -> list[np.ndarray]:
        """ValueError for a label that is none of the classes."""
        for signal in signals:
            if signal not in self.recipe.classes:
                raise ValueError(
                    f"{self.modality.name} has no class {signal!r}; {closest(signal, self.recipe.classes)}"
                )
        return [np.array([self.recipe.classes.index(signal)], np.int32) for signal in signals]

    def decode(self, ids: Seq[np.ndarray]) -> list[str]:
        return [self.recipe.classes[int(row[0])] for row in ids]

    def check(self, signal: Any) -> None:
        self.encode([signal])

    def write(self, signal: str, folder: Path, *, image: np.ndarray | None) -> None:
        (Path(folder) / f"{self.modality.signal}.txt").write_text(signal + "\n", encoding="utf-8")

    def draw(self, signal: str, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        return draw_text(signal)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return dataclasses.asdict(self.recipe) | {"classes": list(self.recipe.classes)}, {}

    @classmethod
    def from_state(
        cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]
    ) -> "ClassTokenizer":
        fields: dict[str, Any] = config | {"classes": tuple(config["classes"])}
        return cls(recipe=ClassRecipe(**fields), card=card)
