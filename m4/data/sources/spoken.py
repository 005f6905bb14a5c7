"""A tfds data set of spoken words: a cut-out before a plain backdrop, and a recording of somebody who names it.

The corpus is that of m4.data.sources.stamps, whose package has recordings of children and grown-ups beside its
images.

    NAME.png ------------place, paint----> rgb      NAME.txt --> words, in French
    NAME_desc_fr.ogg ----read_sound------> audio    its folder -> category

Axes: H rows, W columns, C colours, T samples of sound.
"""

from __future__ import annotations

import functools
import os
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from m4.data.sources.built import BuiltSplit, build, encode_all, png
from m4.data.sources.contents import content
from m4.data.sources.sounds import check_installed, decode_sound, of_length
from m4.data.sources.stamps import NEAREST, SPLITS, Stamp, Stamps, corpus, gradient, paint, place
from m4.errors import check
from m4.files import fingerprint

VERSION = "1.0.0"  # of the examples: raise it whenever the same arguments give others
RATE = 16_000  # samples a second
FARTHEST = 2.0  # metres: a stamp is at least half as long as its image
LOUDEST = np.float32(2**15 - 1)  # largest stored sample


# ---- Sounds from files ----------------------------------------------------------------------------------------------


def read_sound(path: str | os.PathLike, rate: int) -> Float32[np.ndarray, " T"]:
    """A sound file (wav, ogg, flac, mp3, ...) as `rate` samples a second in [-1, 1], the mean of its channels.

    ValueError if it cannot be read or is empty, or if the package soundfile is missing.
    """
    data = content(path)
    try:
        return decode_sound(data).at(rate)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ---- The corpus -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recording:
    stamp: Stamp
    language: str
    file: Path


@functools.cache
def recordings(path: str) -> dict[Path, dict[str, Path]]:
    """The recordings of the description of each image below a folder, by language code."""
    by_image: dict[Path, dict[str, Path]] = defaultdict(dict)
    for file in sorted(Path(path).rglob("*_desc*.ogg")):
        if match := re.fullmatch(r"(.+)_desc(?:_(\w+))?", file.stem):
            by_image[file.with_name(f"{match[1]}.png")][match[2] or "en"] = file
    return dict(by_image)


@functools.cache
def _in_turns(path: str, languages: tuple[str, ...], split: str) -> tuple[Recording, ...]:
    """Every recording of a split once: see `Spoken`."""
    stamps, spoken = corpus(path), recordings(path)
    for language in languages:
        check("language", language, sorted({code for takes in spoken.values() for code in takes}))
    stamps = [stamp for stamp in stamps if stamp.split == split and stamp.file in spoken]
    by_stamp = []
    for stamp in stamps:
        files = {code: spoken[stamp.file][code] for code in languages if code in spoken[stamp.file]}
        by_stamp.append([Recording(stamp=stamp, language=code, file=file) for code, file in files.items()])
    # In turn t, stamp i takes its recording (i + t) modulo their number: neighbours speak different languages.
    turns = [
        takes[(i + turn) % len(takes)]
        for turn in range(len(languages))
        for i, takes in enumerate(by_stamp)
        if turn < len(takes)
    ]
    if not turns:
        raise ValueError(f"no stamp of split {split!r} in {path} is spoken of in {', '.join(languages)}")
    return tuple(turns)


# ---- Examples -------------------------------------------------------------------------------------------------------


def compose(spoken: "Spoken", split: str, index: int) -> dict:
    """One raw example, the same for the same arguments.

    rgb uint8 [H W C]; audio float32 [T] in [-1, 1], RATE samples a second; words: the caption in the spoken language,
    or in English where there is none; language: the code of the spoken language; category: one of stamps.CATEGORIES.
    """
    rng = np.random.default_rng([spoken.seed, SPLITS.index(split), index])
    choices = spoken.recordings(split)
    chosen = choices[rng.integers(len(choices)) if split == "train" else index]
    backdrop = gradient(spoken.size, rng)
    layer = place(chosen.stamp, rng.uniform(NEAREST, FARTHEST), spoken.size, rng)
    captions = chosen.stamp.captions
    sound = of_length(read_sound(chosen.file, RATE), spoken.num_samples)
    return {
        "rgb": paint(backdrop, [layer]),
        "audio": np.round(sound * LOUDEST) / LOUDEST,  # as it is stored
        "words": captions[chosen.language if chosen.language in captions else "en"],
        "language": chosen.language,
        "category": chosen.stamp.category,
    }


def _encode(spoken: "Spoken", split: str, indices: range) -> list[dict]:
    """The stored form of some examples: the image as PNG bytes, samples as 16 bits."""
    examples = [compose(spoken, split, index) for index in indices]
    return [{**e, "rgb": png(e["rgb"]), "audio": np.round(e["audio"] * LOUDEST).astype(np.int16)} for e in examples]


# ---- The data set ---------------------------------------------------------------------------------------------------


@functools.cache
def _builder_class() -> Any:
    """Defines the tfds builder on first use, since importing tfds takes half a second that workers need not spend."""
    import tensorflow_datasets as tfds

    @dataclass(kw_only=True)
    class SpokenConfig(tfds.core.BuilderConfig):
        spoken: Spoken = field(default_factory=Spoken)

    class SpokenBuilder(tfds.core.GeneratorBasedBuilder):
        """Cut-outs of photographs and drawings with recordings of people who say what they show."""

        name = "spoken"
        VERSION = tfds.core.Version(VERSION)
        url_infos = {}  # nothing is downloaded; looking for checksums would need a package that tfds does not declare
        BUILDER_CONFIGS = [SpokenConfig(name="default", spoken=Spoken())]

        def _info(self):
            spoken, features = self.builder_config.spoken, tfds.features
            return self.dataset_info_from_configs(
                features=features.FeaturesDict(
                    {
                        "rgb": features.Image(shape=(spoken.size, spoken.size, 3), encoding_format="png"),
                        "audio": features.Tensor(shape=(spoken.num_samples,), dtype=np.int16, encoding="zlib"),
                        "words": features.Text(),
                        "language": features.Text(),
                        "category": features.Text(),
                    }
                ),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split):
            spoken = self.builder_config.spoken
            yield from enumerate(encode_all(functools.partial(_encode, spoken, split), spoken.count(split)))

    SpokenBuilder.Config = SpokenConfig
    return SpokenBuilder


def __getattr__(name: str):
    if name == "SpokenBuilder":
        return _builder_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """The recipe of a set of single stamps with spoken descriptions: `prepare` builds it once and `split` reads it.

    Stamps are split as `Stamps` splits them, and those without a recording in `languages` are not used.

    Training draws a recording for each example. Validation and test have every recording once, in turns: each turn
    shows different stamps alone, every one that still has a recording left, and neighbours speak different languages.
    So the first examples, as many as there are stamps, are fit for retrieval: each image has one recording.
    With one language there is but one turn.

        stamp     lion  pear  moon  lion  pear  moon        languages=("fr", "ru")
        language  fr    ru    fr    ru    fr    ru
    """

    path: str = "/usr/share/tuxpaint/stamps"
    """Folder of the corpus."""
    languages: tuple[str, ...] = ("bg", "ca", "es", "fr", "ro", "ru")
    """Codes of the corpus: "fr", "en", ..."""
    seed: int = 0
    """Seed of the examples."""
    num_train: int = 10_000
    """Examples of the split train."""
    size: int = 64
    """Rows and columns of the images, pixels."""
    seconds: float = 2.048
    """Length of sounds: longer ones are truncated, shorter ones followed by silence."""

    splits = SPLITS

    def __post_init__(self):
        if not self.languages or len(set(self.languages)) < len(self.languages):
            raise ValueError(f"languages are {self.languages}, but must be different codes, at least one")
        for name, lowest in {"seed": 0, "num_train": 1, "size": 16, "num_samples": 1}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {lowest}")

    @property
    def num_samples(self) -> int:
        return round(self.seconds * RATE)

    def recordings(self, split: str) -> tuple[Recording, ...]:
        """All recordings of a split, in turns."""
        return _in_turns(self.path, self.languages, split)

    def count(self, split: str) -> int:
        return self.num_train if split == "train" else len(self.recordings(split))

    def signature(self, data_dir: str | os.PathLike) -> str:
        """12 hex digits over the version of this code, and name and size of every file that is read of the corpus."""
        files = sorted(recording.file for split in SPLITS for recording in self.recordings(split))
        sizes = [[f.relative_to(self.path).as_posix(), f.stat().st_size] for f in files]
        return fingerprint([VERSION, Stamps(path=self.path).signature(data_dir), sizes])

    def folder(self, data_dir: str | os.PathLike) -> Path:
        """The folder of these examples: another recipe, corpus or version of this code has another folder."""
        key = fingerprint([self.signature(data_dir), {**asdict(self), "path": ""}])
        return Path(data_dir) / "spoken" / f"{'-'.join(self.languages)}-{key}" / VERSION

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Builds all splits unless they exist. ValueError if the corpus, a language or soundfile is missing."""
        folder = self.folder(data_dir)

        def make_builder():
            check_installed()  # before any work
            config = _builder_class().Config(name=folder.parent.name, spoken=self)
            return _builder_class()(config=config, data_dir=os.fspath(data_dir), file_format="array_record")

        build(folder, make_builder)

    def split(self, name: str, data_dir: str | os.PathLike) -> "SpokenSplit":
        check("split", name, SPLITS)
        return SpokenSplit(folder=self.folder(data_dir), name=name)


class SpokenSplit(BuiltSplit):
    """A sequence of raw examples as `compose` computes them."""

    images = ("rgb",)
    source = "Spoken"

    def decode(self, stored: dict) -> dict:
        texts = {name: stored[name].decode() for name in ("words", "language", "category")}
        return {"rgb": stored["rgb"], "audio": stored["audio"].astype(np.float32) / LOUDEST, **texts}
