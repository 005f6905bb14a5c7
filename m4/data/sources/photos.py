"""Random crops of the real photographs inside the wheels of scikit-image and scikit-learn: nothing is downloaded.

Axes: H rows and W columns of an image or crop, C colours.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from m4.errors import check

VERSION = "1.0.0"  # of the examples: raise it whenever the same fields give others
SPLITS = ("train", "validation", "test")

# All colour photographs of scenes in the two wheels. Left out: grey images, textures, drawings, photographs through
# a microscope, a telescope or an eye's pupil, and motorcycle_right, which shows what motorcycle_left shows.
PICTURES = {
    "astronaut.png": "skimage/data",
    "chelsea.png": "skimage/data",  # a cat
    "coffee.png": "skimage/data",
    "motorcycle_left.png": "skimage/data",
    "rocket.jpg": "skimage/data",
    "china.jpg": "sklearn/datasets/images",
    "flower.jpg": "sklearn/datasets/images",
}

INSTALL = 'pip install "m4-jax[photos]"'


def bundled(file: str, folder: str) -> Path:
    """Path of a file within an installed package, which is not imported. ValueError names the command to install it."""
    package, _, rest = folder.partition("/")
    spec = find_spec(package)
    path = Path(spec.origin).parent / rest / file if spec and spec.origin else None
    if path is None or not path.exists():
        raise ValueError(f"{file} of the package {package} is not installed; {INSTALL}")
    return path


@functools.cache
def picture(file: str) -> UInt8[np.ndarray, "H W C"]:
    """A whole photograph, decoded once."""
    pixels = np.array(Image.open(bundled(file, PICTURES[file])).convert("RGB"))
    pixels.setflags(write=False)  # every caller gets the same array
    return pixels


@functools.cache
def motorcycle_depth() -> Float[np.ndarray, "H W"]:
    """Depth in metres along the optical axis, 0 where unknown, of motorcycle_left.png (2.1 to 5.0 m, 93% known).

    From the measured disparity (Middlebury 2014, Scharstein et al.) and the calibration in the docstring of
    skimage.data.stereo_motorcycle: depth = focal length * baseline / (disparity + offset of the principal points).
    """
    disparity = np.load(bundled("motorcycle_disp.npz", "skimage/data"))["arr_0"]  # pixels, inf where unknown
    depth = (994.978 * 0.193001 / (disparity + 31.086)).astype(np.float32)
    depth.setflags(write=False)
    return depth


def region(file: str, split: str) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of the part of an image that a split may see, drawn in `Photos`."""
    height, width, _ = picture(file).shape
    if split == "train":
        return 0, 0, height, width // 2
    upper = "validation" if list(PICTURES).index(file) % 2 == 0 else "test"
    return (0, width // 2, height // 2, width) if split == upper else (height // 2, width // 2, height, width)


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Square crops of seven photographs at random places and scales: a source of real images to test on.

    No pixel of an image is in two splits: each has its part of every image, and crops stay within it.

        +-----------+------------+
        |           | validation |   (every second image has validation and test exchanged,
        |   train   +------------+    so that neither is the one with the skies)
        |           |    test    |
        +-----------+------------+

    So validation and test show unseen parts of seen images; they say little about other images. Example i of a
    split depends on (seed, split, i) and these fields alone.
    """

    size: int = 64
    """Pixels of a side that crops are resized to, with antialiasing."""
    num_train: int = 20_000
    """Examples of the split train."""
    num_validation: int = 512
    """Examples of the split validation."""
    num_test: int = 1024
    """Examples of the split test."""
    seed: int = 0
    """Seed of places, scales and mirroring."""
    smallest: float = 0.2
    """Smallest side of a crop, as a share of its image's shorter side (300 to 512 pixels)."""
    largest: float = 0.5
    """Largest side of a crop, as such a share; at most 0.5, for crops of all splits to be alike."""
    flips: bool = True
    """Mirror half of the training crops."""

    splits = SPLITS

    def __post_init__(self):
        for name, lowest in {"seed": 0, "size": 1, **{f"num_{split}": 1 for split in SPLITS}}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {lowest}")
        if not 0 < self.smallest <= self.largest <= 0.5:
            given = f"smallest {self.smallest} and largest {self.largest}"
            raise ValueError(f"{given} are given, but 0 < smallest <= largest <= 0.5 must hold")

    def signature(self, data_dir: str | os.PathLike) -> str:
        """The version of the code that crops."""
        return VERSION

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Checks that the photographs are installed (ValueError otherwise); writes nothing."""
        for file, folder in PICTURES.items():
            bundled(file, folder)

    def split(self, name: str, data_dir: str | os.PathLike) -> "PhotoSplit":
        check("split", name, SPLITS)
        return PhotoSplit(photos=self, name=name)


@dataclass(frozen=True, kw_only=True)
class PhotoSplit:
    """A sequence of crops, computed when they are read.

    rgb: uint8 [size size 3]; file: name of the image; only crops of motorcycle_left.png have
    depth: float32 [size size], metres along the optical axis, 0 where unknown (nearest pixel: no invented surfaces).
    """

    photos: Photos
    name: str

    def __len__(self) -> int:
        return getattr(self.photos, f"num_{self.name}")

    def place(self, index: int) -> tuple[str, slice, slice, bool]:
        """Which image, rows and columns example `index` shows, and whether it is mirrored."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"photo {index} of {count} ({self.name})")
        photos = self.photos
        rng = np.random.default_rng([photos.seed, SPLITS.index(self.name), int(index) % count])
        file = list(PICTURES)[rng.integers(len(PICTURES))]
        top, left, bottom, right = region(file, self.name)
        side = max(1, int(rng.uniform(photos.smallest, photos.largest) * min(picture(file).shape[:2])))
        top, left = rng.integers(top, bottom - side + 1), rng.integers(left, right - side + 1)
        mirrored = photos.flips and self.name == "train" and rng.random() < 0.5
        return file, slice(top, top + side), slice(left, left + side), mirrored

    def __getitem__(self, index: int) -> dict:
        file, rows, columns, mirrored = self.place(index)
        size, step = self.photos.size, -1 if mirrored else 1
        # Crops before resizing, since the filter would read pixels beyond the crop; PIL's filters are antialiased.
        crop = Image.fromarray(picture(file)[rows, columns]).resize((size, size), Image.Resampling.BICUBIC)
        example = {"rgb": np.asarray(crop)[:, ::step].copy(), "file": file}
        if file == "motorcycle_left.png":
            depth = motorcycle_depth()[rows, columns]
            nearest = ((np.arange(size) + 0.5) * len(depth) / size).astype(int)
            example["depth"] = depth[np.ix_(nearest, nearest[::step])]
        return example
