"""Any data set of tensorflow-datasets (tfds) as a source: its name, and which of its features are which signals.

tfds's ArrayRecord files --parsed by tfds, decoded by PIL--> raw examples. Preparing a data set needs TensorFlow,
reading it does not.

Axes: H rows and W columns of an image, n boxes.
"""

from __future__ import annotations

import difflib
import functools
import io
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from m4.data.sources.pictures import MAX_PIXELS, to_rgb
from m4.errors import check
from m4.files import fingerprint

PIXELS = ("picture", "numbers")
WORDS = ("text", "class")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # that images of a data set may have

# The kinds of features that a signal may be read from; other signals take any of `PIXELS` and `WORDS`.
KINDS = {"rgb": PIXELS, "depth": PIXELS, "semseg": PIXELS, "instance": PIXELS, "caption": WORDS, "boxes": ("boxes",)}


@dataclass(frozen=True, kw_only=True)
class Tfds:
    """A data set that tfds has prepared as ArrayRecord.

        Tfds(
            name="coco_captions",  # or with a config and a version: "coco/2017:1.1.0"
            signals={"rgb": "image", "caption": "captions/text", "boxes": "objects"},
            splits={"validation": "val"},
        )

    rgb                 uint8 [H W 3] from images of any mode; not turned by their EXIF tag, nor are the other signals
    depth               float32 [H W] metres: the feature times `depth_unit`; not positive or not finite becomes 0
    semseg, instance    int32 [H W]
    boxes               {"bbox": float32 [n 4] (ymin, xmin, ymax, xmax) in [0, 1], "label": n strings}, n = 0 if there
                        are none. The path of a sequence that has boxes and a class for each, or the paths of the boxes
                        and of their labels: ("objects/bbox", "objects/refexp/raw")
    texts and classes   str: the text (captions), or the name of the class. Left out of an example that has none
    other images and values       arrays as stored
    file                the index of the example in tfds, unless it is mapped

    An example with several texts, such as the five captions of a COCO image, has that of index (draw + pass) modulo
    their count, where the draw depends on its index alone; and so has a box with several labels.
    """

    name: str
    """Name in tfds, perhaps with a config and a version."""
    signals: dict[str, str | tuple[str, str]]
    """Path of the feature that each signal is."""
    splits: dict[str, str] = field(default_factory=dict)
    """Name or slice in tfds ("train[90%:]") of each split; one that is not named here is called the same in tfds."""
    tfds_dir: str = ""
    """Folder in which tfds keeps its data; "" is its default."""
    names: dict[str, str] = field(default_factory=dict)
    """Replacements of labels and texts, since some data sets have codes for names: {"/m/0bt9lr": "dog"} in
    open_images_v4, {"18": "dog"} for the ids that ref_coco has as labels."""
    depth_unit: float = 1.0
    """Metres of one unit of stored depth: 0.001 where it is in millimetres."""
    num_passes: int = 1
    """Times that the sequence goes over the data, with the next text each time: 5 shows all captions of an image that
    has five."""

    def __post_init__(self):
        if not self.signals:
            raise ValueError('signals is empty; it maps signals to paths of features, such as {"rgb": "image"}')
        if self.num_passes < 1:
            raise ValueError(f"num_passes is {self.num_passes}, but must be at least 1")
        if not 0 < self.depth_unit < np.inf:
            raise ValueError(f"depth_unit is {self.depth_unit}, but must be above 0 and finite")

    def signature(self, data_dir: str | os.PathLike) -> str:
        """12 hex digits over the data set's name with config and version, and the sizes of its splits."""
        info = builder(self.name, self.tfds_dir).info
        return fingerprint([info.full_name, {n: [s.num_examples, s.num_bytes] for n, s in sorted(info.splits.items())}])

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Checks the mapping and that tfds has prepared the data; the ValueError explains how to. Writes nothing."""
        _open(self, self.splits)

    def split(self, name: str, data_dir: str | os.PathLike) -> "TfdsSplit":
        """The examples of a split; ValueError as of `prepare`, and for a split that the data set lacks."""
        split = TfdsSplit(source=self, name=self.splits[name] if name in self.splits else name)
        len(split)  # opens it, so that errors come here and not from a worker
        return split


@dataclass(frozen=True, kw_only=True)
class TfdsSplit:
    """A sequence of raw examples as described in `Tfds`; opened again in each worker."""

    source: Tfds
    name: str

    def __getstate__(self):
        return {"source": self.source, "name": self.name}

    @functools.cached_property
    def _opened(self):
        records, features = _open(self.source, self.name)
        # Only now: opened with decoders, tfds's mock data would be encoded first, by TensorFlow.
        records.decoders = _undecoded(records.dataset_info.features)
        return records, features

    def __len__(self) -> int:
        return len(self._opened[0]) * self.source.num_passes

    def __getitem__(self, index: int) -> dict:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"example {index} of {count} ({self.source.name} {self.name})")
        records, features = self._opened
        number, place = divmod(int(index) % count, len(records))
        turn = int(np.random.default_rng(place).integers(2**31)) + number
        file = f"{self.source.name} {self.name} {place}"
        try:
            record = records[place]
            values = {signal: self._value(signal, parts, record, turn) for signal, parts in features.items()}
        except Exception as error:  # damage raises errors of nearly every kind, which do not name the example
            raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
        return {"file": file} | {signal: value for signal, value in values.items() if value is not None}

    def _value(self, signal: str, parts: "tuple[_Feature, ...]", record: dict, turn: int) -> Any:
        feature = parts[0]
        if signal == "boxes":
            return _boxes(*parts, record, turn, self.source.names)
        if feature.kind in WORDS:
            return _word(feature, feature.of(record), feature.depth, turn, self.source.names) or None
        pixels = _pixels(feature, feature.of(record), signal == "rgb")
        if signal not in ("depth", "semseg", "instance"):
            return pixels
        if pixels.shape[2:] == (1,):
            pixels = pixels[..., 0]
        if pixels.ndim != 2 or (signal != "depth" and pixels.dtype.kind not in "biu"):
            wanted = "numbers" if signal == "depth" else "integers"
            raise ValueError(f"{signal} is {pixels.dtype} {list(pixels.shape)}, but must be {wanted} [H W]")
        if signal != "depth":
            return pixels.astype(np.int32)
        metres = pixels.astype(np.float32) * np.float32(self.source.depth_unit)
        return np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0))


# ---- Features of a data set -----------------------------------------------------------------------------------------


class _Feature(NamedTuple):
    """A feature of a data set: its keys within a record, how many sequences it is nested in, its kind and tfds type."""

    keys: tuple[str, ...]
    depth: int
    kind: str
    type: Any

    def of(self, record: dict) -> Any:
        return functools.reduce(lambda part, key: part[key], self.keys, record)

    def word(self, stored: Any) -> str:
        """A text, or the name of a class: "" for class -1, which tfds gives to what has no label."""
        if self.kind == "class":
            return self.type.int2str(int(stored)) if stored >= 0 else ""
        return (stored.decode() if isinstance(stored, bytes) else str(stored)).strip()


def _features(feature: Any, keys: tuple[str, ...] = (), depth: int = 0) -> dict[str, _Feature]:
    """All features by path: the keys of nested dicts, with "/" between. tfds turns a sequence of dicts into a dict."""
    import tensorflow_datasets as tfds

    match feature:
        case tfds.features.Sequence():
            return _features(feature.feature, keys, depth + 1)
        case tfds.features.FeaturesDict():
            kind = f"a group of {', '.join(feature)}"
        case tfds.features.Image():
            kind = "pictures in a sequence" if depth else "picture"
        case tfds.features.BBoxFeature():  # data prepared long ago have no layout, since there was only one
            layout = feature.bbox_format.value if feature.bbox_format else "REL_YXYX"
            kind = "boxes" if layout == "REL_YXYX" else f"boxes as {layout}"
        case tfds.features.ClassLabel():
            kind = "class"
        case _:
            kind = "text" if np.dtype(feature.np_dtype).kind in "OSU" else "numbers"
    by_path = {"/".join(keys): _Feature(keys, depth, kind, feature)} if keys else {}
    if isinstance(feature, tfds.features.FeaturesDict):
        for key, inner in feature.items():
            by_path |= _features(inner, (*keys, key), depth)
    return by_path


def _parts(signal: str, path: str | tuple[str, str], features: dict[str, _Feature], name: str) -> tuple[_Feature, ...]:
    """The features that a signal is read from; ValueError for unknown paths, and for kinds that it does not take."""
    paths: tuple[str, ...] = (path,) if isinstance(path, str) else tuple(path)
    for each in paths:
        check(f"feature of {name} for {signal}", each, features)
    if signal == "boxes" and len(paths) == 1:
        inside = {p: f for p, f in features.items() if p.startswith(f"{path}/")}
        boxes = [p for p, f in inside.items() if f.kind.startswith("boxes")]
        classes = [p for p, f in inside.items() if f.kind == "class"]
        labels = [p for p in classes if p == f"{path}/label"] or classes
        if (len(boxes), len(labels)) != (1, 1):
            given = f"{path} of {name} has {len(boxes)} features of boxes and {len(classes)} of classes"
            raise ValueError(f"boxes: {given}; give the paths of boxes and labels, out of: {', '.join(inside) or path}")
        paths = (boxes[0], labels[0])
    elif len(paths) != 1 + (signal == "boxes"):
        raise ValueError(f"{signal}: {len(paths)} paths are given ({', '.join(paths)}), but it takes one")
    parts = tuple(features[p] for p in paths)
    takes = (KINDS[signal] if signal in KINDS else PIXELS + WORDS, ("numbers", *WORDS))
    for each, part, kinds in zip(paths, parts, takes, strict=False):
        if part.kind not in kinds:
            raise ValueError(f"{signal}: {each} of {name} is {part.kind}, but must be one of: {', '.join(kinds)}")
    if signal == "boxes":
        box, label = parts
        if label.keys[: len(box.keys) - 1] != box.keys[:-1] or box.depth > 1 or label.depth - box.depth not in (0, 1):
            raise ValueError(
                f"boxes: {paths[-1]} of {name} does not have one label, or several, for each of {paths[0]}"
            )
    return parts


def builder(name: str, tfds_dir: str = "") -> Any:
    """tfds's builder of a data set: from its prepared files, else from tfds's code; ValueError where neither is."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    folder = os.path.expanduser(tfds_dir) or None
    try:
        return read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        dataset, _, config = name.partition(":")[0].partition("/")
        known = tfds.list_builders(with_community_datasets=False)
        if dataset not in known:
            similar = ", ".join(difflib.get_close_matches(dataset, known, n=5, cutoff=0.4)) or "(none)"
            where = folder or "tfds's default folder"
            raise ValueError(
                f"{name!r} is neither prepared in {where} nor one of tfds's {len(known)} data sets; similar: {similar}"
            ) from error
    if dataset.startswith("coco") and find_spec("tensorflow") is None:
        from tensorflow_datasets.object_detection import coco

        coco.tf = SimpleNamespace(int64=np.int64)  # all that its features need of TensorFlow
    try:
        if config:
            check(f"config of {dataset}", config, tfds.builder_cls(dataset).builder_configs)
        return tfds.builder(name, data_dir=folder)
    except ImportError as error:  # some need TensorFlow even to list their features
        raise ValueError(_advice(name, tfds_dir)) from error


def _advice(name: str, tfds_dir: str) -> str:
    folder = f" --data_dir={tfds_dir}" if tfds_dir else ""
    return (
        f"{name} is not prepared. Prepare it once (reading it needs no TensorFlow): "
        f"pip install tensorflow && tfds build {name} --file_format=array_record{folder}"
    )


def _open(source: Tfds, splits: str | dict[str, str]) -> tuple[Any, dict[str, tuple[_Feature, ...]]]:
    """tfds's data source of a split (a dict of sources for a dict), and the features of each signal."""
    built = builder(source.name, source.tfds_dir)
    features = _features(built.info.features)
    parts = {signal: _parts(signal, path, features, source.name) for signal, path in source.signals.items()}
    try:
        return built.as_data_source(splits), parts
    except (NotImplementedError, ValueError) as error:
        if not built.is_prepared():
            raise ValueError(_advice(source.name, source.tfds_dir)) from error
        if isinstance(error, NotImplementedError):
            command = f"tfds convert_format --dataset_version_dir={built.data_dir} --out_file_format=array_record"
            raise ValueError(
                f"{source.name} is prepared, but as {built.info.file_format.value}, which has no random access. "
                f"Convert it once: pip install tensorflow && {command}"
            ) from error
        raise ValueError(f"{source.name} has no split {splits!r}: {error}") from error


# ---- Values of a record ---------------------------------------------------------------------------------------------


class _Undecoded:
    """A decoder for tfds that keeps what is stored: most features are not used, and are not worth decoding."""

    def setup(self, *, feature):
        pass

    def decode_example_np(self, stored):
        return stored

    decode_batch_example_np = decode_ragged_example_np = decode_example_np


def _undecoded(feature: Any) -> Any:
    """An _Undecoded for every feature, in dicts as the features are."""
    import tensorflow_datasets as tfds

    match feature:
        case tfds.features.Sequence():
            return _undecoded(feature.feature)
        case tfds.features.FeaturesDict():
            return {key: _undecoded(inner) for key, inner in feature.items()}
    return _Undecoded()


def _word(feature: _Feature, stored: Any, depth: int, turn: int, names: dict[str, str]) -> str:
    """One of the texts or class names in `depth` nested sequences; "" if there is none."""
    for _ in range(depth - 1):
        stored = [item for items in stored for item in items]
    texts = [word for item in (stored if depth else [stored]) if (word := feature.word(item))]
    word = texts[turn % len(texts)] if texts else ""
    return names[word] if word in names else word


def _boxes(box: _Feature, label: _Feature, record: dict, turn: int, names: dict[str, str]) -> dict:
    bbox = np.asarray(box.of(record), np.float32).reshape(-1, 4)
    labels = label.of(record) if box.depth else [label.of(record)]
    labels = [_word(label, stored, label.depth - box.depth, turn, names) for stored in labels]
    count = min(len(bbox), len(labels))  # they differ in tfds's mock data alone
    return {"bbox": bbox[:count], "label": labels[:count]}


def _pixels(feature: _Feature, stored: Any, is_rgb: bool) -> np.ndarray:
    """Pixels as an array. Images are stored as bytes, tensors of unknown shape as dicts, tfds's mock data as arrays."""
    if feature.kind == "picture" and isinstance(stored, bytes) and feature.type.np_dtype != np.float32:
        picture = Image.open(io.BytesIO(stored), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            given = f"a picture of {picture.height} x {picture.width} pixels"
            raise ValueError(f"{given} was given; allowed: at most {MAX_PIXELS:,} pixels")
        picture.getexif().clear()  # boxes and maps of tfds belong to the pixels as stored
        return to_rgb(picture) if is_rgb else np.array(picture)
    array = np.asarray(feature.type.decode_example_np(stored) if isinstance(stored, bytes | dict) else stored)
    return to_rgb(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)) if is_rgb else array
