"""Modalities whose tokenizer is not trained here: one from a file, and ids from elsewhere.

TokenizerFile(path="tokenizers/rgb.safetensors")                       a converted or earlier tokenizer
tokenizers_of("runs/quickstart")                                       all those of a trained model
IdsRecipe(modality=Grid(name="tok_clip@224", signal="clip", ...))      ids under the modality's own name
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from m4.checkpoints.hub import packaged
from m4.checkpoints.runs import tokenizer_file
from m4.errors import closest
from m4.registry import config_in, from_json, to_json
from m4.tokens.modality import Features, Grid, Modality
from m4.tokens.records import encode
from m4.tokens.tokenizer import Examples, Tokenizer, load_tokenizer, tokenizer_hash
from m4_tokenizers.modalities.reading import Reader

TILE = 128  # pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """The tokenizer in a file, unchanged. ValueError if there is none.

    Its modality and hash are part of a run's config, which so can be used without the file, and no stage of preparation
    confuses it with another tokenizer of the same name.
    """

    path: str
    """Path of the tokenizer file."""
    modality: Modality | None = None
    """Its modality; None reads it from the file."""
    digest: str = ""
    """Hash of what it computes; "" reads it from the file."""

    def __post_init__(self):
        if self.modality is None:
            tokenizer = load_tokenizer(Path(self.path))
            object.__setattr__(self, "modality", tokenizer.modality)
            object.__setattr__(self, "digest", tokenizer_hash(tokenizer))

    @property
    def kind(self) -> str:
        """The kind of signal that the tokenizer reads; "" without the file."""
        return getattr(load_tokenizer(Path(self.path)), "kind", "") if Path(self.path).is_file() else ""

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        """The whole example: nothing is fitted."""
        return example

    def fit(self, source: Examples, *, seed: int) -> Tokenizer:
        tokenizer = load_tokenizer(Path(self.path))
        if (actual := tokenizer_hash(tokenizer)) != self.digest:
            raise ValueError(f"{self.path} holds another tokenizer ({actual}) than when it was chosen ({self.digest})")
        return tokenizer


def tokenizers_of(run: str) -> tuple[TokenizerFile, ...]:
    """The tokenizers of a trained model (a run's folder or a model of the package), unchanged, in its order."""
    folder = packaged()[run] if run in packaged() and not Path(run).exists() else Path(run)
    if not (folder / "config.json").is_file():
        near = [str(p.parent) for p in folder.parent.glob("*/config.json")]
        raise ValueError(f"no trained model {run!r}; {closest(run, [*near, *packaged()])}")
    recipes = config_in(folder).tokenizers
    return tuple(TokenizerFile(path=str(tokenizer_file(folder, r.modality))) for r in recipes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdsRecipe:
    """Ids (or vectors) without their tokenizer: examples hold them under the modality's name. What is generated stays
    ids."""

    modality: Modality
    """The modality, whose name examples hold the ids under."""

    kind = "ids"

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        return example[self.modality.name] if self.modality.name in example else None

    def fit(self, source: Examples, *, seed: int) -> "Ids":
        card = {"component": "ids", "signal": self.modality.signal, "vocab_size": self.modality.vocab_size}
        return Ids(modality=self.modality, card=card)


class Ids(Reader):
    """Ids in, ids out: int32 [n]; or vectors [n size]."""

    kind = "ids"

    def __init__(self, *, modality: Modality, card: dict[str, Any]):
        self.modality, self.card = modality, card

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        """Vectors under the modality's name; ids under it are used before this is called."""
        if isinstance(self.modality, Features) and self.modality.name in example:
            return example[self.modality.name]
        return None

    def encode(self, signals: Seq[np.ndarray]) -> list[np.ndarray]:
        """ValueError unless each is a 1-D array of integers, or vectors of the modality's size."""
        if isinstance(self.modality, Features):
            for signal in signals:
                if np.ndim(signal) != 2 or np.shape(signal)[1] != self.modality.size:
                    given = f"{list(np.shape(signal))} was given"
                    raise ValueError(f"{self.modality.name}: {given}; allowed: [n, {self.modality.size}]")
            return [np.asarray(signal, self.modality.dtype) for signal in signals]
        for signal in signals:
            if np.ndim(signal) != 1 or np.asarray(signal).dtype.kind not in "iu":
                raise ValueError(f"{self.modality.name} has no tokenizer here, only 1-D arrays of integers (its ids)")
        return [np.asarray(signal, np.int32) for signal in signals]

    def decode(self, ids: Seq[np.ndarray]) -> list[np.ndarray]:
        return [np.asarray(row, np.int32) for row in ids]

    def check(self, signal: Any) -> None:
        """ValueError for a signal that training refuses as ids (or vectors) of the modality."""
        encode([{self.modality.name: signal}], {self.modality.name: self})

    def write(self, signal: np.ndarray, folder: Path, *, image: np.ndarray | None) -> None:
        np.save(Path(folder) / f"{self.modality.name}.npy", signal)
        Image.fromarray(self.draw(signal, image=image)).save(Path(folder) / f"{self.modality.name}.png")

    def draw(self, signal: np.ndarray, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        """One colour for each id, drawn at random but always the same; vectors as rows of grey."""
        if isinstance(self.modality, Features):
            rows = np.asarray(signal, np.float32)
            grey = np.interp(rows, [rows.min(), max(rows.max(), rows.min() + 1e-6)], [0, 255]).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        shape = self.modality.shape if isinstance(self.modality, Grid) else (1, len(signal))
        rows, columns = shape if len(shape) == 2 else (1, len(signal))
        colours = np.random.default_rng(0).integers(40, 256, (self.modality.vocab_size, 3)).astype(np.uint8)
        scale = max(1, TILE // max(rows, columns))
        return colours[signal].reshape(rows, columns, 3).repeat(scale, axis=0).repeat(scale, axis=1)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"modality": to_json(self.modality)}, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]) -> "Ids":
        return cls(modality=from_json(config["modality"]), card=card)
