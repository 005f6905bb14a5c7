"""A tfds data set of cut-outs at drawn distances: real photographs and drawings with captions in 78 languages.

The corpus is the Debian package tuxpaint-stamps-default (GPL-2), which the user installs; nothing of it comes with m4.

    PNG and TXT files --compose--> spawned processes --> tfds, ArrayRecord --Stamps.split--> raw examples

Cut-outs whose longer side is 1 m are upright before a backdrop and face the camera, whose focal length is as long as
its image is wide: at a distance of d metres they are size / d pixels long.

    camera  . - - - [apple] - - - - - - [lion] - - - - - - |  backdrop
    metres  0       NEAREST  <= d <=  FARTHEST          BACKDROP

Axes: H rows, W columns, C colours and, in a cut-out, alpha; n listed objects.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m4.data.sources.built import BuiltSplit, build, encode_all, png
from m4.data.sources.contents import content
from m4.data.sources.photos import Photos
from m4.errors import check
from m4.files import fingerprint

VERSION = "1.0.0"  # of the examples: raise it whenever the same arguments give others
SPLITS = ("train", "validation", "test")
SHARES = {"test": 0.1, "validation": 0.1}  # of the stamps; the rest is for training
INSTALL = "apt-get install tuxpaint-stamps-default"

# The folders that the corpus is sorted into: class i + 1 of `semseg`.
CATEGORIES = ("animals", "clothes", "food", "hobbies", "household", "medical", "military", "naturalforces")


CATEGORIES += ("people", "plants", "seasonal", "space", "sports", "symbols", "town", "vehicles")


BACKGROUNDS = ("plain", "photos")
NEAREST, FARTHEST, BACKDROP = 1.3, 4.0, 5.0  # metres
MIN_SHARE = 0.3  # of a cut-out's own pixels that must be visible
MIN_AREA = 1 / 256  # of the image: 16 pixels of 64 x 64
FULL_STOPS = ".!?:…|。．！？։।።។؟"


# ---- The corpus -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """An image of the corpus with its captions by language code."""

    file: Path
    category: str
    captions: dict[str, str]

    @property
    def split(self) -> str:
        """The split by hash of the file's name alone: files of one name in two folders, or alphabets, stay together,
        and a stamp stays in its split when others come or go."""
        draw = int(hashlib.sha256(self.file.stem.encode()).hexdigest()[:12], 16) / 16**12
        if draw < SHARES["test"]:
            return "test"
        return "validation" if draw < SHARES["test"] + SHARES["validation"] else "train"


def read_captions(file: Path) -> dict[str, str]:
    """Captions by language: the first line is English, each of the others is `code.utf8=caption`, if present."""
    try:
        text = content(file).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: byte {error.start} ({error.reason})") from error
    english, *lines = re.sub(r"[\x7f-\x9f]", "", text).split("\n")  # stray bytes of another encoding
    captions = {"en": english} | {code: caption for code, _, caption in (line.partition(".utf8=") for line in lines)}
    captions = {code: " ".join(caption.split()) for code, caption in captions.items()}
    return {code: caption for code, caption in captions.items() if caption}


@functools.cache
def corpus(path: str) -> tuple[Stamp, ...]:
    """All stamps below a folder: PNG files in one of CATEGORIES with a caption file beside them, by name.

    ValueError if there is none. Skips SVG files and images without a caption, such as mirrored variants.
    """
    files = [(f, c) for c in CATEGORIES for f in sorted(Path(path, c).rglob("*.png")) if f.with_suffix(".txt").exists()]
    if not files:
        raise ValueError(f"no stamps in {path}; {INSTALL}, or give the `path` of a folder with {CATEGORIES[0]}/ ...")
    return tuple(Stamp(file=f, category=c, captions=read_captions(f.with_suffix(".txt"))) for f, c in files)


@functools.cache
def cutout(file: Path, side: int) -> Image.Image:
    """A stamp without its empty rim, its longer side `side` pixels, with colours multiplied by alpha.

    Only such colours may be averaged: others would mix in what transparent pixels hold, which shows as halos.
    """
    try:
        picture = Image.open(file, formats=["PNG"]).convert("RGBA")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"{file} is wholly transparent")
    return _resize(picture.crop(box).convert("RGBa"), side)


def _resize(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    width, height = (max(1, round(scale * length)) for length in picture.size)
    # Neither filter has negative lobes, which would leave colours brighter than their alpha allows.
    filter = Image.Resampling.HAMMING if scale < 1 else Image.Resampling.BILINEAR
    return picture.resize((width, height), filter)


# ---- Examples -------------------------------------------------------------------------------------------------------


def gradient(size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [H W C] in 0..255: a plain backdrop, from one colour at the top to another at the bottom."""
    top, bottom = rng.uniform(30, 250, (2, 1, 3))
    height = np.linspace(1, 0, size)[:, None, None]
    return np.repeat((height * top + (1 - height) * bottom).astype(np.float32), size, axis=1)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A stamp in its place. pixels: float32 [H W 4], colours multiplied by alpha."""

    stamp: Stamp
    distance: float  # metres
    place: tuple[slice, slice]  # rows and columns of the image
    pixels: np.ndarray


def place(stamp: Stamp, distance: float, size: int, rng: np.random.Generator) -> Layer:
    """A stamp `distance` metres away, at a random place within an image of size x size pixels."""
    pixels = np.asarray(_resize(cutout(stamp.file, round(size / NEAREST)), round(size / distance)), np.float32)
    height, width, _ = pixels.shape
    top, left = rng.integers(0, [size - height + 1, size - width + 1])
    inside = slice(top, top + height), slice(left, left + width)
    return Layer(stamp=stamp, distance=distance, place=inside, pixels=pixels)


def paint(backdrop: np.ndarray, layers: Sequence[Layer]) -> np.ndarray:
    """uint8 [H W C]: layers, from near to far, before a backdrop (float32 in 0..255, which is painted over)."""
    for layer in reversed(layers):
        behind = backdrop[layer.place]
        backdrop[layer.place] = layer.pixels[..., :3] + behind * (1 - layer.pixels[..., 3:] / 255)
    return np.round(backdrop).astype(np.uint8)


def _arrange(stamps: "Stamps", split: str, rng: np.random.Generator) -> tuple[list[Layer], np.ndarray]:
    """Layers from near to far, at least one, and the int32 [H W] instance map."""
    size, choices = stamps.size, stamps.stamps(split)
    # From near to far: pixels that a nearer stamp covers are taken, and a stamp that is mostly hidden is dropped.
    for _ in range(100):  # few stamps have lines so thin that they never cover half a pixel
        layers, instance = [], np.zeros((size, size), np.int32)
        count = min(rng.integers(1, stamps.max_objects + 1), len(choices))
        picks = rng.choice(len(choices), count, replace=False)
        distances = np.round(np.sort(rng.uniform(NEAREST, FARTHEST, count)), 3)  # as stored
        for pick, distance in zip(picks, distances, strict=True):
            layer = place(choices[pick], distance, size, rng)
            solid = layer.pixels[..., 3] >= 127.5
            visible = solid & (instance[layer.place] == 0)
            if visible.sum() >= max(MIN_SHARE * solid.sum(), MIN_AREA * size**2):
                layers.append(layer)
                instance[layer.place][visible] = len(layers)
        if layers:
            return layers, instance
    raise ValueError(f"the stamps of split {split!r} in {stamps.path} are too thin or transparent to be seen")


def compose(stamps: "Stamps", split: str, index: int) -> dict:
    """One raw example, the same for the same arguments.

    rgb uint8 [H W C]; depth float32 [H W] metres; semseg int32 [H W], 0 backdrop, 1.. CATEGORIES; instance int32 [H W],
    0 backdrop, i + 1 the i-th object; boxes: bbox float32 [n 4], tight around visible pixels, label: n categories;
    caption; language: its code; category, of a single object. Objects are listed from near to far; one that would be
    nearly hidden is left out of the image too. A pixel belongs to the nearest cut-out that covers at least
    half of it.
    """
    rng = np.random.default_rng([stamps.seed, SPLITS.index(split), index])
    backdrop = gradient(stamps.size, rng)
    if stamps.backgrounds == "photos":
        backdrop = stamps.photos.split(split, "")[index]["rgb"].astype(np.float32)
    layers, instance = _arrange(stamps, split, rng)
    language = stamps.language
    if language == "any":
        common = set.intersection(*(set(layer.stamp.captions) for layer in layers))
        language = sorted(common)[rng.integers(len(common))]
    labels = [layer.stamp.category for layer in layers]
    return {
        "rgb": paint(backdrop, layers),
        "depth": np.array([BACKDROP, *(layer.distance for layer in layers)], np.float32)[instance],
        "semseg": np.array([0, *(1 + CATEGORIES.index(label) for label in labels)], np.int32)[instance],
        "instance": instance,
        "boxes": {"bbox": np.stack([_tight_box(instance == i + 1) for i in range(len(layers))]), "label": labels},
        "caption": " ".join(_sentence(layer.stamp.captions[language]) for layer in layers),
        "language": language,
        **({"category": labels[0]} if len(labels) == 1 else {}),
    }


def _tight_box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    corners = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
    return np.array(corners, np.float32) / np.float32(len(mask))


def _sentence(caption: str) -> str:
    return caption if caption[-1] in FULL_STOPS else f"{caption}."


def _encode(stamps: "Stamps", split: str, indices: range) -> list[dict]:
    """The stored form of some examples: images as PNG bytes, depth in millimetres."""
    encoded = []
    for index in indices:
        example = {name: x for name, x in compose(stamps, split, index).items() if name != "category"}
        for name in StampSplit.images:
            example[name] = png(example[name].astype(np.uint8))
        example["depth"] = np.round(example["depth"] * 1000).astype(np.uint16)
        boxes = example["boxes"]
        example["boxes"] = [{"bbox": b, "label": n} for b, n in zip(boxes["bbox"], boxes["label"], strict=True)]
        encoded.append(example)
    return encoded


# ---- The data set ---------------------------------------------------------------------------------------------------


@functools.cache
def _builder_class() -> Any:
    """Defines the tfds builder on first use, since importing tfds takes half a second that workers need not spend."""
    import tensorflow_datasets as tfds

    @dataclass(kw_only=True)
    class StampConfig(tfds.core.BuilderConfig):
        stamps: Stamps = field(default_factory=Stamps)

    class StampBuilder(tfds.core.GeneratorBasedBuilder):
        """Cut-outs of photographs and drawings with aligned depth, classes, boxes and captions in many languages."""

        name = "stamps"
        VERSION = tfds.core.Version(VERSION)
        url_infos = {}  # nothing is downloaded; looking for checksums would need a package that tfds does not declare
        BUILDER_CONFIGS = [StampConfig(name="default", stamps=Stamps())]

        def _info(self):
            size = self.builder_config.stamps.size
            features = tfds.features
            image = functools.partial(features.Image, encoding_format="png")
            label = features.ClassLabel(names=CATEGORIES)
            return self.dataset_info_from_configs(
                features=features.FeaturesDict(
                    {
                        "rgb": image(shape=(size, size, 3)),
                        "depth": features.Tensor(shape=(size, size), dtype=np.uint16, encoding="zlib"),
                        "semseg": image(shape=(size, size, 1)),
                        "instance": image(shape=(size, size, 1)),
                        "boxes": features.Sequence({"bbox": features.BBoxFeature(), "label": label}),
                        "caption": features.Text(),
                        "language": features.Text(),
                    }
                ),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split):
            stamps = self.builder_config.stamps
            yield from enumerate(encode_all(functools.partial(_encode, stamps, split), getattr(stamps, f"num_{split}")))

    StampBuilder.Config = StampConfig
    return StampBuilder


def __getattr__(name: str):
    if name == "StampBuilder":
        return _builder_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class Stamps:
    """The recipe of a set of compositions of 1 to `max_objects` stamps: what `prepare` builds once and `split` reads.

    Labels of boxes and classes of `semseg` are the 16 folders of the corpus rather than names: stamps, and with them
    most names, are in one split only, so that a detector could not have learned those of the test split.
    """

    path: str = "/usr/share/tuxpaint/stamps"
    """Folder of the corpus."""
    language: str = "en"
    """Code of the corpus ("en", "fr", "zh_TW", ...), or "any", drawn for each example. Stamps without it are left
    out."""
    seed: int = 0
    """Seed of the compositions."""
    num_train: int = 20_000
    """Examples of the split train."""
    num_validation: int = 512
    """Examples of the split validation."""
    num_test: int = 1024
    """Examples of the split test."""
    size: int = 64
    """Rows and columns of the images, pixels."""
    max_objects: int = 5
    """Stamps in an image, 1 to 255 at most."""
    backgrounds: str = "plain"
    """"plain" gradients, or crops of "photos" of the same split (m4.data.sources.photos says what they need)."""

    splits = SPLITS

    def __post_init__(self):
        check("backgrounds", self.backgrounds, BACKGROUNDS)
        counts = {f"num_{split}": 1 for split in SPLITS}
        for name, lowest in {"seed": 0, "size": 16, "max_objects": 1, **counts}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {lowest}")
        if self.max_objects > 255:
            raise ValueError(f"max_objects is {self.max_objects}, but must be at most 255")

    def stamps(self, split: str) -> tuple[Stamp, ...]:
        """The stamps that a split shows."""
        return _choices(self.path, self.language, split)

    @property
    def photos(self) -> Photos:
        counts = {f"num_{split}": getattr(self, f"num_{split}") for split in SPLITS}
        return Photos(size=self.size, seed=self.seed, **counts)

    def signature(self, data_dir: str | os.PathLike) -> str:
        """12 hex digits over the version of this code, and name and size of every file that is read of the corpus."""
        files = [f for stamp in corpus(self.path) for f in (stamp.file, stamp.file.with_suffix(".txt"))]
        return fingerprint([VERSION, *([f.relative_to(self.path).as_posix(), f.stat().st_size] for f in files)])

    def folder(self, data_dir: str | os.PathLike) -> Path:
        """The folder of these examples: another recipe, corpus or version of this code has another folder."""
        key = fingerprint([self.signature(data_dir), {**asdict(self), "path": ""}])
        return Path(data_dir) / "stamps" / f"{self.language}-{key}" / VERSION

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Builds all splits unless they exist. ValueError if the corpus, or a language within it, is missing."""
        for split in SPLITS:
            self.stamps(split)
        folder = self.folder(data_dir)
        if self.backgrounds == "photos":
            self.photos.prepare(data_dir)

        def make_builder():
            config = _builder_class().Config(name=folder.parent.name, stamps=self)
            return _builder_class()(config=config, data_dir=os.fspath(data_dir), file_format="array_record")

        build(folder, make_builder)

    def split(self, name: str, data_dir: str | os.PathLike) -> "StampSplit":
        check("split", name, SPLITS)
        return StampSplit(folder=self.folder(data_dir), name=name)


@functools.cache
def _choices(path: str, language: str, split: str) -> tuple[Stamp, ...]:
    """The stamps of a split that have a caption in a language."""
    check("language", language, ["any", *sorted({code for stamp in corpus(path) for code in stamp.captions})])
    wanted = "en" if language == "any" else language
    matches = tuple(stamp for stamp in corpus(path) if stamp.split == split and wanted in stamp.captions)
    if not matches:
        raise ValueError(f"no stamp of split {split!r} in {path} has a caption in {language!r}; take another language")
    return matches


class StampSplit(BuiltSplit):
    """A sequence of raw examples as `compose` computes them."""

    images = ("rgb", "semseg", "instance")
    source = "Stamps"

    def decode(self, stored: dict) -> dict:
        boxes = stored["boxes"]
        return {
            "rgb": stored["rgb"],
            "depth": stored["depth"].astype(np.float32) / np.float32(1000),
            "semseg": stored["semseg"].astype(np.int32),
            "instance": stored["instance"].astype(np.int32),
            "boxes": {"bbox": np.stack(boxes["bbox"]), "label": [CATEGORIES[i] for i in boxes["label"]]},
            "caption": stored["caption"].decode(),
            **({"category": CATEGORIES[boxes["label"][0]]} if len(boxes["label"]) == 1 else {}),
            "language": stored["language"].decode(),
        }
