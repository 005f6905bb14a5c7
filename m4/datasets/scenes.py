"""A tfds data set of rendered scenes, and the source that reads it.

rendering.scene(variant, seed, split, index) --spawned processes--> tfds, ArrayRecord --Scenes.split--> raw examples
"""

import functools
import hashlib
import io
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from m4.datasets.rendering import NAMES, SHAPES, SPLITS, VARIANTS, VERSION, check, scene

IMAGES = ("rgb", "normals", "semseg", "instance")  # stored as PNG
CHUNK = 64  # scenes per task of the process pool


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=4)
    return buffer.getvalue()


def _encode(variant: str, seed: int, split: str, indices: range, size: int) -> list[dict]:
    """The stored form of some scenes: images as PNG bytes, depth in millimetres, normals with a step of 1/127."""
    encoded = []
    for index in indices:
        example = scene(variant, seed, split, index, size)
        example["rgb"] = _png(example["rgb"])
        example["depth"] = np.round(example["depth"] * 1000).astype(np.uint16)
        example["normals"] = _png(np.round(example["normals"] * 127 + 128).astype(np.uint8))
        for name in ("semseg", "instance"):
            example[name] = _png(example[name].astype(np.uint8))
        boxes = example["boxes"]
        example["boxes"] = [{"bbox": b, "label": n} for b, n in zip(boxes["bbox"], boxes["label"], strict=True)]
        encoded.append(example)
    return encoded


def _leave_with_parent() -> None:
    """Ends a worker whose parent was killed, which would otherwise wait for its next task for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encode_all(scenes: "Scenes", split: str) -> Iterator[dict]:
    """The stored scenes of a split in order, rendered by all cores; at most a few chunks wait in memory."""
    count = getattr(scenes, f"num_{split}")
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    tasks = [(scenes.variant, scenes.seed, split, chunk, scenes.size) for chunk in chunks]
    num_workers = min(len(tasks), os.cpu_count())
    if num_workers <= 1 or count <= 4 * CHUNK:  # starting processes would take longer than the work
        for task in tasks:
            yield from _encode(*task)
        return
    # Spawned, not forked: the caller may hold threads (jax, grain), which a fork would leave in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_leave_with_parent) as pool:
        pending = deque()
        for task in tasks:
            pending.append(pool.submit(_encode, *task))
            if len(pending) > 2 * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


@functools.cache
def _builder_class() -> type:
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
            yield from enumerate(_encode_all(self.builder_config.scenes, split))

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
    seed: int = 0
    num_train: int = 20_000
    num_validation: int = 512
    num_test: int = 1024
    num_heldout: int = 512
    size: int = 64

    splits = SPLITS

    def __post_init__(self):
        check("variant", self.variant, VARIANTS)
        for name, lowest in {"seed": 0, "size": 16, **{f"num_{split}": 1 for split in SPLITS}}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {lowest}")

    def folder(self, data_dir: str | os.PathLike) -> Path:
        """Where these scenes lie: another recipe, or another version of this code, has another folder."""
        key = hashlib.sha256(json.dumps([VERSION, asdict(self)], sort_keys=True).encode()).hexdigest()[:12]
        return Path(data_dir) / "scenes" / f"{self.variant}-{key}" / VERSION

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Builds all splits unless they are there. tfds builds beside the folder and renames: it is whole or absent."""
        folder = self.folder(data_dir)
        if folder.exists():
            return
        import tensorflow_datasets as tfds

        builder_class = _builder_class()
        config = builder_class.Config(name=folder.parent.name, scenes=self)
        builder = builder_class(config=config, data_dir=os.fspath(data_dir), file_format="array_record")
        try:
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(compute_stats="skip"))
        except OSError:
            if not folder.exists():  # else another process has built the same scenes meanwhile
                raise

    def split(self, name: str, data_dir: str | os.PathLike) -> "SceneSplit":
        check("split", name, SPLITS)
        return SceneSplit(folder=self.folder(data_dir), name=name)


@dataclass(frozen=True, kw_only=True)
class SceneSplit:
    """A sequence of raw examples as `scene` makes them; opened when first read, so that it can be sent to workers."""

    folder: Path
    name: str

    def __getstate__(self):
        return {"folder": self.folder, "name": self.name}

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        if not self.folder.exists():
            raise ValueError(f"no scenes in {self.folder}; call Scenes.prepare with the same fields and data_dir first")
        builder = tfds.builder_from_directory(self.folder)
        skip = {name: tfds.decode.SkipDecoding() for name in IMAGES}  # PIL decodes them, without TensorFlow
        return builder.as_data_source(self.name, decoders=skip)

    def _shard(self, index: int) -> str:
        """The file that holds an example."""
        for shard in self._records.dataset_info.splits[self.name].file_instructions:
            if index < shard.take:
                return shard.filename
            index -= shard.take
        raise AssertionError(f"{self.name} has too few examples")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"scene {index} of {count} ({self.name} of {self.folder})")
        index = int(index) % count
        try:
            stored = self._records[index]
        except RuntimeError as error:  # which tells the kind of damage, but rarely the file
            raise ValueError(
                f"cannot read scene {index} from {self._shard(index)} ({error}); "
                f"delete {self.folder} and call Scenes.prepare again"
            ) from error
        image = {name: np.array(Image.open(io.BytesIO(stored[name]))) for name in IMAGES}
        normals = image["normals"].astype(np.float32) - 128
        length = np.sqrt(np.einsum("hwk,hwk->hw", normals, normals))[..., None]
        words = {name: [NAMES[name][i] for i in stored["objects"][name]] for name in NAMES}
        return {
            "rgb": image["rgb"],
            "depth": stored["depth"].astype(np.float32) / np.float32(1000),
            "normals": normals / np.maximum(length, 1),
            "semseg": image["semseg"].astype(np.int32),
            "instance": image["instance"].astype(np.int32),
            "boxes": {"bbox": np.stack(stored["boxes"]["bbox"]), "label": words["shape"]},
            "objects": [dict(zip(words, values, strict=True)) for values in zip(*words.values(), strict=True)],
            "caption": stored["caption"].decode(),
        }
