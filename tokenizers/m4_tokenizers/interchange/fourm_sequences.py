"""4M's people and SAM instances: texts of its tokenizer, in which poses and masks are codes of tokenizers of their own.

    human v0=.. v1=.. v2=.. v3=.. pose v0=.. (8) global v0=.. (9) camera v0=.. (3) shape v0=.. (10)     a person
    point v0=y v1=x polygon v0=.. v1=.. v2=.. v3=.. v0=.. (16)                                          an instance

Signals are these texts. What they say is written beside them: people as SMPL parameters and a drawn skeleton, instances
as boxes and masks (run lengths, as COCO's) and a picture. H rows and W columns of a picture, n people or instances.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from m4.registry import from_json, to_json
from m4.tokens.tokenizer import Examples, load_tokenizer
from m4_tokenizers.interchange import fourm_decoding as released
from m4_tokenizers.modalities.image import write_image
from m4_tokenizers.modalities.text import EOS, WordPieceRecipe, WordPieceTokenizer
from m4_tokenizers.vq import VQTokenizer

SIZE = released.IMAGE_SIZE
# SMPL's kinematic tree: the parent of each of its 24 joints, the pelvis first.
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
# Where each joint is from its parent in the rest pose of an average adult, metres: left, up, forward. SMPL's own body
# is licensed and not part of this.
_LEFT = {
    1: (0.07, -0.09, 0.0), 4: (0.03, -0.38, 0.0), 7: (-0.01, -0.41, -0.04), 10: (0.03, -0.06, 0.12),
    13: (0.08, 0.12, -0.02), 16: (0.09, 0.03, -0.01), 18: (0.26, -0.01, -0.02), 20: (0.25, 0.01, 0.0),
    22: (0.08, -0.01, -0.01),
}  # fmt: skip
_MIDDLE = {
    3: (0.0, 0.11, -0.02),
    6: (0.0, 0.13, 0.02),
    9: (0.0, 0.06, 0.0),
    12: (0.0, 0.21, -0.03),
    15: (0.0, 0.09, 0.05),
}
OFFSETS = np.zeros((24, 3))
for _joint, _place in _LEFT.items():
    OFFSETS[_joint] = _place
    OFFSETS[_joint + 1] = np.multiply(_place, (-1, 1, 1))
for _joint, _place in _MIDDLE.items():
    OFFSETS[_joint] = _place


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedSequenceRecipe(WordPieceRecipe):
    """A sequence with a tokenizer of its parts."""

    parts: str = ""
    """Path of the tokenizer of poses or masks (a converted file)."""

    tokenizer_class: ClassVar[Any]

    def fit(self, source: Examples, *, seed: int) -> Any:
        """Reads both files; nothing is fitted."""
        text = super().fit(source, seed=seed)
        parts = cast(VQTokenizer, load_tokenizer(Path(self.parts)))
        card = {**text.card, "component": self.tokenizer_class.component, "values": "text of 4M"}
        return self.tokenizer_class(recipe=self, file=text.file, parts=parts, card=card)


class ReleasedSequence(WordPieceTokenizer, abc.ABC):
    """Texts in, texts out; a subclass says what they mean."""

    component: ClassVar[str]

    def __init__(self, *, recipe: ReleasedSequenceRecipe, file: str, parts: VQTokenizer, card: dict[str, Any]):
        super().__init__(recipe=recipe, file=file, card=card)
        self.parts = parts

    def decode(self, ids: Seq[np.ndarray]) -> list[str]:
        """The text up to the first [EOS], coordinates by name."""
        texts = []
        for row in ids:
            row = np.asarray(row).ravel()
            ends = np.flatnonzero(row == EOS)
            texts.append(self.decode_verbatim(row[: ends[0]] if len(ends) else row))
        return texts

    @abc.abstractmethod
    def values(self, text: str) -> list[dict[str, Any]]:
        """What a text says, as JSON."""

    def write(self, signal: str, folder: Path, *, image: np.ndarray | None) -> None:
        """The text, its values and its picture."""
        super().write(signal, folder, image=image)
        (Path(folder) / f"{self.modality.signal}.json").write_text(json.dumps(self.values(signal)) + "\n")
        write_image(self.draw(signal, image=image), Path(folder), f"{self.modality.signal}.png")

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        config, arrays = self.parts.state()
        own = {"recipe": to_json(dataclasses.replace(self.recipe, parts="")), "file": self.file, "parts": config}
        return own, arrays

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]) -> Any:
        parts = VQTokenizer.from_state(config["parts"], arrays, {})
        return cls(recipe=from_json(config["recipe"]), file=config["file"], parts=parts, card=card)


# ---- People ---------------------------------------------------------------------------------------------------------


def joints(person: released.Person) -> Float[np.ndarray, "24 3"]:
    """Places of SMPL's joints by its rotations, for a body of average size, metres from the pelvis."""
    rotations = [person.global_orient[0, 0], *person.body_pose[0]]
    turned, places = [np.asarray(rotations[0], float)], [np.zeros(3)]
    for joint in range(1, len(PARENTS)):
        parent = PARENTS[joint]
        places.append(places[parent] + turned[parent] @ OFFSETS[joint])
        turned.append(turned[parent] @ np.asarray(rotations[joint], float))
    return np.stack(places)


def draw_people(people: Seq[released.Person], image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
    """Skeletons and boxes on the image (or on white), at 224 x 224 pixels; the camera is weakly perspective."""
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    if image is not None:
        picture = Image.fromarray(image).resize((SIZE, SIZE))
    draw = ImageDraw.Draw(picture)
    for number, person in enumerate(people):
        colour = tuple(np.random.default_rng(number).integers(0, 200, 3).tolist())
        scale, x, y = person.pred_cam[0]
        flat = scale * (joints(person)[:, :2] + np.array([x, y]))
        pixels = person.box_center[0] + float(person.box_size) / 2 * flat
        draw.rectangle(_corners(person.bbox_xyxy), outline=colour)
        for joint, parent in enumerate(PARENTS[1:], 1):
            draw.line([*pixels[parent].tolist(), *pixels[joint].tolist()], fill=colour, width=3)
    return np.asarray(picture)


def _corners(box: np.ndarray) -> list[float]:
    """A box as two corners in rising order, as PIL wants them."""
    return [*np.minimum(box[:2], box[2:]).tolist(), *np.maximum(box[:2], box[2:]).tolist()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedPeopleRecipe(ReleasedSequenceRecipe):
    """4M-21's human poses."""

    signal: str = "poses"
    """Signal that is read."""
    name: str = "human_poses"
    """Name of the modality."""
    max_length: int = 275
    """Tokens of a text, at most, the closing [EOS] included."""


class ReleasedPeople(ReleasedSequence):
    component = "released_people"

    def people(self, text: str) -> list[released.Person]:
        """All people that can be read from a text."""
        return released.people(text, self.parts)

    def values(self, text: str) -> list[dict[str, Any]]:
        return [{name: value.tolist() for name, value in p._asdict().items()} for p in self.people(text)]

    def draw(self, signal: str, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        return draw_people(self.people(signal), image)


# ---- Instances ------------------------------------------------------------------------------------------------------


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    """COCO's uncompressed form: lengths of the runs of False and True in turn, column by column."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [not mask.ravel(order="F")[-1]]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": [*mask.shape], "counts": np.diff(ends, prepend=0).tolist()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedInstancesRecipe(ReleasedSequenceRecipe):
    """4M-21's SAM instances."""

    signal: str = "instances"
    """Signal that is read."""
    name: str = "sam_instance"
    """Name of the modality."""
    max_length: int = 290
    """Tokens of a text, at most, the closing [EOS] included."""


class ReleasedInstances(ReleasedSequence):
    component = "released_instances"

    def masks(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (left, top, right, bottom), pixels, int [n 4], and masks, bool [n 224 224], large ones first."""
        boxes, codes = released.instance_tokens(text)
        return released.instance_masks(boxes, released.instance_logits(codes, self.parts))

    def values(self, text: str) -> list[dict[str, Any]]:
        pairs = zip(*self.masks(text), strict=True)
        return [{"bbox": box.tolist(), "segmentation": run_lengths(mask)} for box, mask in pairs]

    def draw(self, signal: str, *, image: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
        boxes, codes = released.instance_tokens(signal)
        return released.instance_picture(boxes, released.instance_logits(codes, self.parts))


ReleasedPeopleRecipe.tokenizer_class, ReleasedInstancesRecipe.tokenizer_class = ReleasedPeople, ReleasedInstances
