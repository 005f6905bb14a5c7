"""Protocols of tokenizers and recipes, and tokenizer files: one safetensors with arrays, class, config and card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.numpy

from m4.files import check_name, parse_json, shown, write_atomically
from m4.registry import _name_of, component_class, components
from m4.tensor_file import DTYPES, OTHERS, SEAL, TensorFile, sealed
from m4.tokens.modality import Modality

# Modules of version 0.1 by class. `tokenizer_hash` still hashes module:class for these, so that data and models of
# that version still match their tokenizers.
_MODULES_0_1 = {
    name: module
    for module, names in {
        "m4.modality": "Grid Sequence Features",
        "m4_tokenizers.answers": "AnswerRecipe",
        "m4_tokenizers.audio": "AudioRecipe",
        "m4_tokenizers.boxes": "BoxRecipe",
        "m4_tokenizers.classes": "ClassRecipe",
        "m4_tokenizers.depth": "DepthRecipe RelativeDepthRecipe",
        "m4_tokenizers.diffusion": "Schedule DiffusionDecoder",
        "m4_tokenizers.edges": "EdgesRecipe",
        "m4_tokenizers.features": "FeatureMapRecipe VectorRecipe PoseRecipe",
        "m4_tokenizers.image": "ImageRecipe PixelPatchesRecipe",
        "m4_tokenizers.instances": "MaskRecipe",
        "m4_tokenizers.losses": "SquaredError AbsoluteError Huber CosineDistance CrossEntropy Perceptual Adversarial",
        "m4_tokenizers.maps": "MapRecipe",
        "m4_tokenizers.metadata": "Whole Bins Steps MetadataRecipe",
        "m4_tokenizers.networks": "ViTEncoder ViTDecoder VectorEncoder VectorDecoder PatchEncoder PatchDecoder",
        "m4_tokenizers.normals": "NormalsRecipe",
        "m4_tokenizers.palette": "PaletteRecipe",
        "m4_tokenizers.quantizers": (
            "VectorQuantizer LearnedVectorQuantizer Memcodes FiniteScalarQuantizer LookupFreeQuantizer"
        ),
        "m4_tokenizers.semseg": "SemanticRecipe",
        "m4_tokenizers.stored": "TokenizerFile IdsRecipe",
        "m4_tokenizers.text": "Layout TextRecipe WordPieceRecipe",
        "m4_tokenizers.unet": "UNet UViT",
    }.items()
    for name in names.split()
}

# Fields since then, with the values that are not hashed.
_NEW_FIELDS: dict[str, dict[str, Any]] = {"Sequence": {"num_target_positions": 0}}


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes one safetensors: arrays, and class, config and card as JSON. A loaded tokenizer is saved byte-equal."""
    name = _name_of(type(tokenizer))
    if name not in components():
        raise ValueError(
            f"{name} is not registered under the entry-point group m4.components; install the package first"
        )
    config, arrays = tokenizer.state()
    about = {**SEAL, "component": name, "config": config, "card": tokenizer.card}
    data = safetensors.numpy.save(arrays, {"m4": json.dumps(about, sort_keys=True)})
    write_atomically(path, sealed(data))


def _named_as_in_0_1(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_named_as_in_0_1(v) for v in value]
    if not isinstance(value, dict):
        return value
    new = _NEW_FIELDS.get(value["component"], {}) if "component" in value else {}
    named = {k: _named_as_in_0_1(v) for k, v in value.items() if k not in new or v != new[k]}
    if "component" in named and named["component"] in _MODULES_0_1:
        named["component"] = f"{_MODULES_0_1[named['component']]}:{named['component']}"
    return named


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """12 hex digits of what a tokenizer computes: its class, config and arrays, without its card, which has timings."""
    config, arrays = tokenizer.state()
    digest = hashlib.sha256(json.dumps(_named_as_in_0_1([_name_of(type(tokenizer)), config]), sort_keys=True).encode())
    digest.update(safetensors.numpy.save({key: np.ascontiguousarray(array) for key, array in arrays.items()}))
    return digest.hexdigest()[:12]


def load_tokenizer(path: Path, *, is_checked: bool = False) -> Tokenizer:
    """The tokenizer in a file written by `save_tokenizer`. ValueError names a file that is damaged or no tokenizer.

    `is_checked`: the file's digest is known to be right.
    """
    file = TensorFile.read(path, dtypes={**DTYPES, **OTHERS}, is_checked=is_checked)
    try:
        about = parse_json(file.metadata["m4"]) if "m4" in file.metadata else None
        if not isinstance(about, dict) or not {"component", "config", "card"} <= {*about}:
            raise ValueError("its metadata names no component with config and card")
        cls = component_class(about["component"])
        make = getattr(cls, "from_state", None)
        if make is None:
            raise ValueError(f"{about['component']} is no tokenizer")
        arrays = {name: file.tensor(name) for name in file.entries}
        tokenizer = make(about["config"], arrays, about["card"])
        check_name(tokenizer.modality.name, "its modality")
        check_name(tokenizer.modality.signal, "its modality's signal")
        return tokenizer
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        what = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{shown(path)} is not a tokenizer file that can be used: {what}") from error


@runtime_checkable
class Examples(Protocol):
    """Raw examples, stored records, or lists of them, by index from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Tokenizer(Protocol):
    """Turns signals into the tokens of one modality and back. Everything about a modality lives in its tokenizer.

    `encode` takes a batch (a list of signals in the raw-example format) and returns one array per signal: int [n] for
    grids (n = prod(shape), raster order) and sequences (n <= max_length, ends in end_id), stored [n size] for features.

    With an attribute `kind` (m4.data.sources.files.KINDS: what its signals are), files are read by the common reader,
    in training too; then `from_text(text)` gives a signal that is written out, and `check(signal)`, if present, refuses
    what cannot be encoded. Without one, `read` is called.
    """

    modality: Modality
    card: dict[str, Any]

    def encode(self, signals: Seq[Any]) -> list[np.ndarray]: ...

    def decode(self, ids: Seq[np.ndarray]) -> list[Any]: ...

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        """The signal of a raw example: its own, or computed from others (edges, palettes); None if it has neither."""

    def read(self, value: str) -> Any:
        """One signal from a command-line value: a path, or the text itself."""

    def write(self, signal: Any, folder: Path, *, image: np.ndarray | None) -> None:
        """Files for one signal, e.g. depth.png and depth_color.png; `image` (uint8 [H W 3]) to draw on, if any."""

    def draw(self, signal: Any, *, image: np.ndarray | None) -> np.ndarray:
        """uint8 [H W 3] picture of one signal for galleries; `image` to draw on, if any."""

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(JSON-able config, arrays) such that `type(self).from_state(config, arrays, card)` equals self."""

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]) -> Tokenizer: ...


@runtime_checkable
class WritesOut(Protocol):
    """A tokenizer with a `kind`: its signals can be written out in a text."""

    def from_text(self, text: str) -> Any: ...


@runtime_checkable
class ChecksParts(Protocol):
    """A tokenizer of answers, which are lists of texts, points and boxes."""

    def checked(self, item: Any) -> Any:
        """One part of an answer; ValueError if it is none."""


@runtime_checkable
class CanAverage(Protocol):
    """A tokenizer whose signals have a mean, for ensembles."""

    def average(self, signals: Seq[Any]) -> Any: ...


def image_size(tokenizer: Tokenizer) -> int:
    """Pixels a side that a tokenizer of images or maps takes."""
    return tokenizer.recipe.image_size  # ty: ignore[missing-attribute]  those of images have a recipe


@runtime_checkable
class Recipe(Protocol):
    """How to get a tokenizer: a frozen dataclass in a config. `modality` is known before anything is fitted."""

    modality: Modality

    def fit(self, source: Examples, *, seed: int) -> Tokenizer:
        """Fits (and trains) on raw examples; the tokenizer's card reports the quality."""
