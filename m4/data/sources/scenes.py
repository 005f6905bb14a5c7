"""A tfds data set of rendered scenes, and the source that reads it.

rendering.scene(variant, seed, split, index) --spawned processes--> tfds, ArrayRecord --Scenes.split--> raw examples
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m4.data.sources.built import BuiltSplit, build, encode_all, png
from m4.data.sources.rendering import NAMES, SHAPES, SPLITS, VARIANTS, VERSION, scene
from m4.errors import check


def _encode(variant: str, seed: int, split: str, indices: range, size: int) -> list[dict]:
    """The stored form of some scenes: images as PNG bytes, depth in millimetres, normals with a step of 1/127."""
    encoded = []
    for index in indices:
        example = scene(variant, seed, split, index, size)
        example["rgb"] = png(example["rgb"])
        example["depth"] = np.round(example["depth"] * 1000).astype(np.uint16)
        example["normals"] = png(np.round(example["normals"] * 127 + 128).astype(np.uint8))
        for name in ("semseg", "instance"):
            example[name] = png(example[name].astype(np.uint8))
        boxes = example["boxes"]
        example["boxes"] = [{"bbox": b, "label": n} for b, n in zip(boxes["bbox"], boxes["label"], strict=True)]
        encoded.append(example)
    return encoded


@functools.cache
def _builder_class() -> Any:
    """Defines the tfds builder on first use, since importing tfds takes half a second that workers need not spend."""
    import tensorflow_datasets as tfds

    @dataclass(kw_only=True)
    class SceneConfig(tfds.core.BuilderConfig):
        scenes: Scenes = field(default_factory=Scenes)

    class SceneBuilder(tfds.core.GeneratorBasedBuilder):
        """Rendered scenes with aligned depth, normals, classes, boxes and captions."""

        name = "scenes"
        VERSION = tfds.core.Version(VERSION)
        url_infos = {}  # nothing is downloaded; looking for checksums would need a package that tfds does not declare
        BUILDER_CONFIGS = [SceneConfig(name=name, scenes=Scenes(variant=name)) for name in VARIANTS]

        def _info(self):
            size = self.builder_config.scenes.size
            features, label = tfds.features, tfds.features.ClassLabel
            image = functools.partial(features.Image, encoding_format="png")
            return self.dataset_info_from_configs(
                features=features.FeaturesDict(
                    {
                        "rgb": image(shape=(size, size, 3)),
                        "depth": features.Tensor(shape=(size, size), dtype=np.uint16, encoding="zlib"),
                        "normals": image(shape=(size, size, 3)),
                        "semseg": image(shape=(size, size, 1)),
                        "instance": image(shape=(size, size, 1)),
                        "boxes": features.Sequence({"bbox": features.BBoxFeature(), "label": label(names=SHAPES)}),
                        "objects": features.Sequence({name: label(names=names) for name, names in NAMES.items()}),
                        "caption": features.Text(),
                    }
                ),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split):
            scenes = self.builder_config.scenes
            encode = functools.partial(_encode, scenes.variant, scenes.seed, split, size=scenes.size)
            yield from enumerate(encode_all(encode, getattr(scenes, f"num_{split}")))

    SceneBuilder.Config = SceneConfig
    return SceneBuilder


def __getattr__(name: str):
    if name == "SceneBuilder":
        return _builder_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """The recipe of a set of scenes: what `prepare` builds once and `split` reads."""

    variant: str = "simple"
    """What scenes show: "simple", "full" or "kinds" (m4.data.sources.rendering.VARIANTS)."""
    seed: int = 0
    """Seed of the scenes."""
    num_train: int = 20_000
    """Examples of the split train."""
    num_validation: int = 512
    """Examples of the split validation."""
    num_test: int = 1024
    """Examples of the split test."""
    num_heldout: int = 512
    """Examples of the split heldout, with pairs of colour and shape that no other split has."""
    size: int = 64
    """Rows and columns of the images, pixels."""

    splits = SPLITS

    def __post_init__(self):
        check("variant", self.variant, VARIANTS)
        for name, lowest in {"seed": 0, "size": 16, **{f"num_{split}": 1 for split in SPLITS}}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {lowest}")

    def folder(self, data_dir: str | os.PathLike) -> Path:
        """The folder of these scenes: another recipe, or another version of this code, has another folder."""
        key = hashlib.sha256(json.dumps([VERSION, asdict(self)], sort_keys=True).encode()).hexdigest()[:12]
        return Path(data_dir) / "scenes" / f"{self.variant}-{key}" / VERSION

    def signature(self, data_dir: str | os.PathLike) -> str:
        """The version of the code that renders."""
        return VERSION

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Builds all splits unless they exist."""
        folder = self.folder(data_dir)

        def make_builder():
            config = _builder_class().Config(name=folder.parent.name, scenes=self)
            return _builder_class()(config=config, data_dir=os.fspath(data_dir), file_format="array_record")

        build(folder, make_builder)

    def split(self, name: str, data_dir: str | os.PathLike) -> "SceneSplit":
        check("split", name, SPLITS)
        return SceneSplit(folder=self.folder(data_dir), name=name)


class SceneSplit(BuiltSplit):
    """A sequence of raw examples as `scene` computes them."""

    images = ("rgb", "normals", "semseg", "instance")
    source = "Scenes"

    def decode(self, stored: dict) -> dict:
        normals = stored["normals"].astype(np.float32) - 128
        length = np.sqrt(np.einsum("hwk,hwk->hw", normals, normals))[..., None]
        attributes = {name: [NAMES[name][i] for i in stored["objects"][name]] for name in NAMES}
        return {
            "rgb": stored["rgb"],
            "depth": stored["depth"].astype(np.float32) / np.float32(1000),
            "normals": normals / np.maximum(length, 1),
            "semseg": stored["semseg"].astype(np.int32),
            "instance": stored["instance"].astype(np.int32),
            "boxes": {"bbox": np.stack(stored["boxes"]["bbox"]), "label": attributes["shape"]},
            "objects": [
                dict(zip(attributes, values, strict=True)) for values in zip(*attributes.values(), strict=True)
            ],
            "caption": stored["caption"].decode(),
        }
