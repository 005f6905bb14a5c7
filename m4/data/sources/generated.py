"""The results of `python -m m4 generate` as training examples: pseudo-labels.

OUT/photo_1/rgb.png   OUT/photo_1/depth.png   OUT/photo_1/caption.txt   ->  {"rgb": ..., "depth": ..., "caption": ...}
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from m4.data.sources.contents import content
from m4.data.sources.files import PICTURES, extension_of
from m4.data.sources.folders import Aligned, Stored, subfolders
from m4.errors import closest
from m4.files import check_name, shown

DRAWN = "_color"  # rgb_color.png is a drawing of the signal rgb


class SampleFile(Stored):
    """A file in the folder of its example."""

    @property
    def id(self) -> str:
        return os.path.dirname(self.name)


@dataclass(frozen=True, kw_only=True)
class Generated(Aligned):
    """Examples from folders of their own, root/<id>/<signal>.<ext>, in splits by a hash of the id.

    `generate --with-inputs` writes the inputs beside the predictions. Drawings are left out: an image beside another
    file of its name (boxes.png, normals.png), and <signal>_color.png. So are files beside the folders.
    """

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Checks that there are samples (ValueError otherwise); writes nothing."""
        self.layout(data_dir)

    def layout(self, data_dir: str | os.PathLike) -> dict[str, dict[str, Path]]:
        """The root, for every signal."""
        root = Path(self.root)
        if not root.is_dir():
            raise ValueError(f"{shown(root)} {'is not a folder' if root.exists() else 'does not exist'}")
        known = sorted({signal for sample in subfolders(root).values() for signal, _ in self._signals(sample)})
        if not known:
            raise ValueError(f"{shown(root)} has no folders of samples, such as {shown(root)}/0001/rgb.png")
        for name in self.signals or known:
            if name not in known:
                raise ValueError(f"{shown(root)} has no signal {name!r}; {closest(name, known)}")
            check_name(name, f"a signal in {shown(root)}")
        return {"": {name: root for name in self.signals or known}}

    def _signals(self, sample: Path) -> Iterator[tuple[str, str]]:
        """(signal, file's name) of all files in a sample's folder, without drawings."""
        names = sorted(p.name for p in sample.iterdir() if not p.name.startswith(".") and extension_of(p.name))
        stems = {name: os.path.splitext(name)[0] for name in names}
        data = {stem for name, stem in stems.items() if extension_of(name) not in PICTURES}
        for name, stem in stems.items():
            is_picture = extension_of(name) in PICTURES
            is_drawing = stem in data or (stem.endswith(DRAWN) and stem.removesuffix(DRAWN) in stems.values())
            if not (is_picture and is_drawing):
                yield stem, name

    def files(self, folder: Path) -> Iterator[str]:
        for sample, path in sorted(subfolders(folder).items()):
            for _, name in self._signals(path):
                yield f"{sample}/{name}"

    def stored(self, signal: str, folder: Path, data_dir: str | os.PathLike) -> Iterator[Stored]:
        for name in self.files(folder):
            if os.path.splitext(os.path.basename(name))[0] == signal:
                yield SampleFile(signal, os.fspath(folder), name)

    def read(self, stored: Stored) -> bytes:
        return content(stored.path)
