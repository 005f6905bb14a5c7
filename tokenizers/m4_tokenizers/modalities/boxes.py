"""Bounding boxes as tokens: four coordinates and a label each, in the order given.

    v0=12 v1=30 v2=25 v3=44 cube   v0=40 v1=28 v2=63 v3=51 sphere   [EOS]
    xmin  ymin  xmax  ymax  label

Coordinates are bins of [0, 1], decoded as bin centres: a decoded box is within half a bin. The tokenizer has its own
text tokenizer, fitted on the labels, so that each of them is one token and any other label still has bytes.
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from m4.tokens.modality import Sequence
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.reading import Reader
from m4_tokenizers.modalities.text import (
    ALPHABET,
    EOS,
    NUM_COORDINATES,
    Layout,
    TextRecipe,
    TextTokenizer,
    WordPieceRecipe,
    WordPieceTokenizer,
    check_text,
)

Colour = tuple[int, int, int]
Boxes = dict[str, Any]  # {"bbox": float32 [n 4] as (ymin, xmin, ymax, xmax) in [0, 1], "label": n strings}
AS_TOKENS = [1, 0, 3, 2]  # (ymin, xmin, ymax, xmax) <-> (xmin, ymin, xmax, ymax)
LABEL, OTHER, END = range(NUM_COORDINATES, NUM_COORDINATES + 3)  # classes of tokens beside the four coordinates
SMALLEST_PICTURE = 256  # pixels: labels on anything smaller cannot be read


def canvas(image: np.ndarray | None) -> Image.Image:
    """The image (or white), enlarged until labels on it can be read."""
    size = SMALLEST_PICTURE
    picture = Image.new("RGB", (size, size), "white") if image is None else Image.fromarray(image).convert("RGB")
    factor = -(-SMALLEST_PICTURE // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def hue(index: int) -> Colour:
    """The golden angle keeps the hues of neighbouring labels apart, in any order."""
    red, green, blue = colorsys.hsv_to_rgb(int(index) * 0.618 % 1, 0.85, 0.75)
    return int(255 * red), int(255 * green), int(255 * blue)


def draw_label(pen: ImageDraw.ImageDraw, place: tuple[float, float], label: str, colour: Colour) -> None:
    """A label in white on the colour; `place`: (x, y) of its upper left corner."""
    name = label.encode("latin-1", "replace").decode("latin-1")  # all that PIL's built-in font has
    left, top, right, bottom = pen.textbbox(place, name)
    pen.rectangle((left - 2, top - 1, right + 1, bottom + 1), fill=colour)
    pen.text(place, name, fill="white")


def draw_box(pen: ImageDraw.ImageDraw, size: tuple[int, int], box: np.ndarray, label: str, colour: Colour) -> None:
    """`size`: the image's (width, height); `box`: (ymin, xmin, ymax, xmax) in [0, 1]."""
    y0, x0, y1, x1 = (float(v) for v in box * np.tile(size[::-1], 2))
    pen.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=2)
    draw_label(pen, (x0 + 3, max(y0 - 12, 0)), label, colour)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxRecipe:
    """Boxes of one-token labels; fewer fit if labels need more tokens."""

    signal: str = "boxes"
    """Signal that is read."""
    name: str = "boxes"
    """Name of the modality."""
    num_bins: int = 64
    """Bins of a coordinate in [0, 1]."""
    max_objects: int = 4
    """Boxes of an example, at most."""
    vocab_size: int = 640
    """Different token ids."""
    num_sentinels: int = 16
    """Masked spans of an example, at most."""
    num_examples: int = 4000
    """Examples from which labels are learned, at most."""
    wordpiece: str = ""
    """Path of 4M's WordPiece file, for the ids of its modality "det": 1000 bins, rounded to the nearest of i / 999, and
    its class names. "" is m4's own ids."""

    @property
    def text(self) -> TextRecipe | WordPieceRecipe:
        max_length = (NUM_COORDINATES + 1) * self.max_objects + 1
        if self.wordpiece:
            return WordPieceRecipe(path=self.wordpiece, signal=self.signal, name=self.name, max_length=max_length)
        return TextRecipe(
            signal=self.signal,
            name=self.name,
            vocab_size=self.vocab_size,
            max_length=max_length,
            num_bins=self.num_bins,
            num_sentinels=self.num_sentinels,
        )

    @property
    def layout(self) -> Layout:
        return self.text.layout

    @property
    def modality(self) -> Sequence:
        return self.text.modality

    def check(self, signal: Any) -> None:
        """ValueError for boxes that `encode` refuses, whatever their labels."""
        boxes, labels = np.asarray(signal["bbox"], np.float32).reshape(-1, NUM_COORDINATES), signal["label"]
        if len(boxes) != len(labels):
            raise ValueError(f"{len(boxes)} boxes came with {len(labels)} labels")
        if not ((boxes >= 0) & (boxes <= 1)).all():
            raise ValueError(f"box coordinates must lie in [0, 1], but span {boxes.min()} to {boxes.max()}")
        if "" in labels:
            raise ValueError("a box needs a label: the empty string has no tokens")
        for label in labels:
            check_text(label, "a label")

    def fit(self, source: Examples, *, seed: int) -> "BoxTokenizer":
        start = time.perf_counter()
        count = min(len(source), self.num_examples)
        signals = [source[i][self.signal] for i in range(count)]
        labels = sorted({label for signal in signals for label in signal["label"]})
        if isinstance(self.text, WordPieceRecipe):
            text = self.text.fit(source, seed=seed)
        else:
            text = self.text.fit_texts(labels, split_words=False, seed=seed)
        tokenizer = BoxTokenizer(recipe=self, text=text, card={})
        encoded = tokenizer.encode_unbounded(signals)
        lengths = [len(ids) for ids in encoded]
        decoded = tokenizer.decode(encoded)
        errors = [np.abs(d["bbox"] - s["bbox"]).ravel() for s, d in zip(signals, decoded, strict=True)]
        tokenizer.card.update(
            component="boxes",
            signal=self.signal,
            values="(ymin, xmin, ymax, xmax) in [0, 1] with a label",
            vocab_size=self.modality.vocab_size,
            num_bins=self.layout.num_bins,
            num_labels=len(labels),
            mean_tokens=round(sum(lengths) / max(count, 1), 2),
            longest=max(lengths, default=0),
            longest_error=round(float(np.concatenate([np.zeros(0), *errors]).max(initial=0)), 4),
            num_examples=count,
            fit_seed=seed,
            fit_seconds=round(time.perf_counter() - start, 2),
        )
        return tokenizer


class BoxTokenizer(Reader):
    kind = "boxes"

    def __init__(self, *, recipe: BoxRecipe, text: TextTokenizer, card: dict[str, Any]):
        self.recipe, self.text, self.card = recipe, text, card
        self.layout, self.modality = recipe.layout, recipe.modality
        self.num_bins = self.layout.num_bins

    def _bins(self, corners: np.ndarray) -> np.ndarray:
        """[0, 1] -> bins: of equal width, or, as in 4M, the nearest of i / (bins - 1)."""
        if self.recipe.wordpiece:
            return np.round(corners.astype(np.float64) * (self.num_bins - 1)).astype(np.int32)
        return np.minimum((corners * self.num_bins).astype(np.int32), self.num_bins - 1)

    def _places(self, bins: np.ndarray) -> np.ndarray:
        """Bins -> positions in [0, 1]."""
        return bins / (self.num_bins - 1) if self.recipe.wordpiece else (bins + 0.5) / self.num_bins

    def encode_unbounded(self, signals: Seq[Boxes]) -> list[np.ndarray]:
        """Ids closed by [EOS], of any length."""
        for signal in signals:
            self.recipe.check(signal)
        corners = [np.asarray(signal["bbox"], np.float32).reshape(-1, NUM_COORDINATES) for signal in signals]
        bins = self._bins(np.concatenate([np.zeros((0, NUM_COORDINATES), np.float32), *corners])[:, AS_TOKENS])
        boxes = self.layout.first_coordinate + np.arange(NUM_COORDINATES) * self.num_bins + bins
        labels = [label for signal in signals for label in signal["label"]]
        distinct = list(dict.fromkeys(labels))
        ids = {k: v[:-1].tolist() for k, v in zip(distinct, self.text.encode_unbounded(distinct), strict=True)}
        pieces = iter([[*box, *ids[label]] for box, label in zip(boxes.tolist(), labels, strict=True)])
        return [
            np.array([i for piece in itertools.islice(pieces, len(signal["label"])) for i in piece] + [EOS], np.int32)
            for signal in signals
        ]

    def encode(self, signals: Seq[Boxes]) -> list[np.ndarray]:
        encoded = self.encode_unbounded(signals)
        for signal, ids in zip(signals, encoded, strict=True):
            if len(ids) > self.modality.max_length:
                raise ValueError(
                    f"{len(signal['label'])} boxes need {len(ids)} tokens, but {self.modality.name} has at most "
                    f"{self.modality.max_length} ({self.recipe.max_objects} boxes of one-token labels)"
                    + self._long_labels(signal["label"])
                )
        return encoded

    def _long_labels(self, labels: Seq[str]) -> str:
        """Why labels have more than one token, if some do: the end of an error's text."""
        distinct = list(dict.fromkeys(labels))
        counts = {k: len(ids) - 1 for k, ids in zip(distinct, self.text.encode_unbounded(distinct), strict=True)}
        longest = max(counts, key=counts.__getitem__)
        if counts[longest] < 2 or self.recipe.wordpiece:
            return ""
        first = self.layout.first_text + len(ALPHABET)  # ids that no label can have
        room, known = self.recipe.vocab_size - first, self.card["num_labels"] if "num_labels" in self.card else 0
        if known <= room:
            return f". Label {longest!r} has {counts[longest]} tokens, since the tokenizer was not fitted on it"
        return (
            f". Label {longest!r} has {counts[longest]} tokens, since vocab_size={self.recipe.vocab_size} has room for "
            f"{room} labels and {known} are there; with vocab_size={first + known} each of them is one token"
        )

    def decode(self, ids: Seq[np.ndarray]) -> list[Boxes]:
        """All boxes that can be decoded up to the first [EOS]: pieces that are no box are skipped."""
        decoded = [self.decode_with_scores(row, np.zeros(len(row), np.float32)) for row in ids]
        return [{"bbox": boxes["bbox"], "label": boxes["label"]} for boxes in decoded]

    def decode_with_scores(self, ids: np.ndarray, logprobs: np.ndarray) -> Boxes:
        """Boxes with "score" float32 [n]: the geometric mean of the probabilities of a box's tokens."""
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} ids came with {len(logprobs)} log-probabilities")
        corners, labels, scores = [], [], []
        for start, stop in self._spans(np.asarray(ids)):
            bins = ids[start : start + NUM_COORDINATES] - self.layout.first_coordinate
            x0, y0, x1, y1 = self._places(np.asarray(bins) % self.num_bins)
            corners.append([min(y0, y1), min(x0, x1), max(y0, y1), max(x0, x1)])
            labels.append(self.text.decode([ids[start + NUM_COORDINATES : stop]])[0])
            scores.append(np.exp(np.mean(logprobs[start:stop])))
        bbox = np.array(corners, np.float32).reshape(-1, NUM_COORDINATES)
        return {"bbox": bbox, "label": labels, "score": np.array(scores, np.float32)}

    def _spans(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """[start, stop) of each run v0 v1 v2 v3 text..text."""
        first, first_text = self.layout.first_coordinate, self.layout.first_text
        past_coordinates = first + NUM_COORDINATES * self.num_bins
        is_coordinate = (ids >= first) & (ids < past_coordinates)
        axes = np.where(is_coordinate, (ids - first) // self.num_bins, -1).tolist()
        is_text = ((ids >= first_text) & (ids < first_text + self.text.num_pieces)).tolist()
        ends = np.flatnonzero(ids == EOS)
        length = int(ends[0]) if len(ends) else len(ids)
        spans, i = [], 0
        while i < length:
            stop = i + NUM_COORDINATES
            if stop < length and axes[i:stop] == [0, 1, 2, 3] and is_text[stop]:
                while stop < length and is_text[stop]:
                    stop += 1
                spans.append((i, stop))
                i = stop
            else:
                i += 1
        return spans

    @functools.cached_property
    def grammar(self) -> Any:
        """Boxes of four coordinates in order and a label, as many as fit."""
        from m4.tokens.grammar import Grammar  # here: reading data must not load JAX

        ids = np.arange(self.modality.vocab_size)
        place = ids - self.layout.first_coordinate
        kinds = np.where((place >= 0) & (place < NUM_COORDINATES * self.num_bins), place // self.num_bins, OTHER)
        text = ids - self.layout.first_text
        # Where whole labels are known, a label is one of them; else any text.
        first = len(ALPHABET) if self.text.num_pieces > len(ALPHABET) and not self.recipe.wordpiece else 0
        kinds[(text >= first) & (text < self.text.num_pieces)] = LABEL
        kinds[EOS] = END
        more = {} if first else {LABEL: 5}
        return Grammar.make(
            kinds, [{0: 1, END: -1}, {1: 2}, {2: 3}, {3: 4}, {LABEL: 5}, {0: 1, END: -1, **more}], end_id=EOS
        )

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        return example[self.modality.signal] if self.modality.signal in example else None

    def from_text(self, text: str) -> Boxes:
        """JSON: [{"bbox": [ymin, xmin, ymax, xmax], "label": ...}, ...]."""
        try:
            return super().from_text(text)
        except ValueError as error:
            raise ValueError(
                f'boxes must be JSON like [{{"bbox": [ymin, xmin, ymax, xmax], "label": "cube"}}], or the path '
                f"of a JSON file, not {text[:60]!r}: {error}"
            ) from error

    def write(self, signal: Boxes, folder: Path, *, image: np.ndarray | None) -> None:
        """<signal>.json and, with an image to draw on, <signal>.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pairs = zip(np.asarray(signal["bbox"]), signal["label"], strict=True)
        items = [{"bbox": [round(float(x), 5) for x in box], "label": label} for box, label in pairs]
        lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        (folder / f"{self.modality.signal}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        if image is not None:
            Image.fromarray(self.draw(signal, image=image)).save(folder / f"{self.modality.signal}.png")

    def draw(self, signal: Boxes, *, image: np.ndarray | None) -> np.ndarray:
        """Boxes in a colour per label, on the image (or on white)."""
        picture = canvas(image)
        pen = ImageDraw.Draw(picture)
        for box, label in zip(np.asarray(signal["bbox"]), signal["label"], strict=True):
            draw_box(pen, picture.size, box, label, hue(sum(self.text.encode_unbounded([label])[0])))
        return np.asarray(picture)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        text, _ = self.text.state()
        return {"recipe": dataclasses.asdict(self.recipe), "text": {k: v for k, v in text.items() if k != "recipe"}}, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]) -> "BoxTokenizer":
        recipe = BoxRecipe(**config["recipe"])
        kind: Any = WordPieceTokenizer if recipe.wordpiece else TextTokenizer  # each with its own recipe
        text = kind(recipe=recipe.text, **config["text"], card={})
        return cls(recipe=recipe, text=text, card=card)
