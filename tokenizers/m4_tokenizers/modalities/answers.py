"""Answers to few-shot tasks as tokens: concepts, each with what it refers to, in the order given.

    red  cube [D_28] v0=12 v1=30 v2=25 v3=44     box: xmin, ymin, xmax, ymax
    red  cube [D_29] v0=18 v1=37                 point: x, y
    red  cube [D_30] v0=0 v0=6 ... v0=15         mask: strips of cells, row by row, each a binary number
    red  cube [D_31] v0=40                       depth: one logarithmic bin
    [EOS]

Coordinates are bins of [0, 1], decoded as bin centres. Either corner of a box may come first. A concept is text of
at least one character, in byte-level pieces. The grammar follows its UTF-8 byte by byte, so that a model may spell a
word that no example had, but never stops within a character.
"""

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

from m4.errors import closest
from m4.registry import from_json, to_json
from m4.tokens.modality import Sequence
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.boxes import AS_TOKENS, canvas, draw_box, draw_label, hue
from m4_tokenizers.modalities.reading import Reader
from m4_tokenizers.modalities.text import ALPHABET, EOS, NUM_COORDINATES, Layout, TextRecipe, TextTokenizer, fit_pieces
from m4_tokenizers.modalities.utf8 import NUM_UTF8, utf8_steps

Answer = list[dict[str, Any]]  # {"concept": str, "kind": one of KINDS, "target": see TARGETS}
KINDS = ("box", "point", "mask", "depth")  # declared by the layout's last declarations: new kinds go in front
TARGETS = {
    "box": "4 numbers (ymin, xmin, ymax, xmax) in [0, 1], minima first",
    "point": "2 numbers (y, x) in [0, 1]",
    "mask": "False or True for each of {size} x {size} cells",
    "depth": "metres, above 0",
}

OWN = [ord(character) for character in ALPHABET if ord(character) < 256]  # bytes that stand for themselves
BYTES = dict(zip(ALPHABET, [*OWN, *sorted({*range(256)} - {*OWN})], strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerRecipe:
    """How answers become tokens; ids do not depend on which kinds are used."""

    signal: str = "answer"
    """Signal that is read."""
    name: str = "answer"
    """Name of the modality."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of referents: box, point, mask, depth."""
    mask_size: int = 8
    """Rows and columns of a mask's cells."""
    near: float = 0.5
    """Smallest depth, metres; smaller ones are clipped."""
    far: float = 30.0
    """Largest depth, metres; larger ones are clipped."""
    num_bins: int = 64
    """Bins of a coordinate in [0, 1], and of a depth (bins of equal ratio)."""
    max_length: int = 64
    """Tokens of an answer, at most, [EOS] included."""
    vocab_size: int = 768
    """Different token ids."""
    num_sentinels: int = 16
    """Masked spans of an answer, at most."""
    num_examples: int = 4000
    """Answers from which text pieces are learned, at most."""

    def __post_init__(self):
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r} of answer; {closest(str(kind), KINDS)}")
        if not self.kinds or self.num_bins < 2 or self.mask_size < 1 or not 0 < self.near < self.far:
            raise ValueError(f"{self}: allowed are one kind or more, num_bins > 1, mask_size > 0 and 0 < near < far")

    @property
    def text(self) -> TextRecipe:
        return TextRecipe(
            signal=self.signal,
            name=self.name,
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            num_bins=self.num_bins,
            num_sentinels=self.num_sentinels,
        )

    @property
    def layout(self) -> Layout:
        return self.text.layout

    @property
    def modality(self) -> Sequence:
        return self.text.modality

    @property
    def strip(self) -> int:
        """Cells of a mask in one token: the longest equal parts of a row that the bins can encode."""
        return max(n for n in range(1, self.mask_size + 1) if self.mask_size % n == 0 and 2**n <= self.num_bins)

    def places(self, kind: str) -> list[tuple[int, int]]:
        """(axis, number of bins allowed) of each token of a target."""
        if kind == "mask":
            return [(0, 2**self.strip)] * (self.mask_size**2 // self.strip)
        return [(axis, self.num_bins) for axis in range({"box": 4, "point": 2, "depth": 1}[kind])]

    def signal_of(self, example: Mapping[str, Any]) -> Any:
        """The answer of a raw example: its own or, without one, its boxes, named by their labels."""
        if self.signal in example:
            return example[self.signal]
        if "boxes" not in example or "box" not in self.kinds:
            return None
        pairs = zip(example["boxes"]["bbox"], example["boxes"]["label"], strict=True)
        return [{"concept": label, "kind": "box", "target": box} for box, label in pairs]

    def checked(self, item: Any) -> dict[str, Any]:
        """The item, its target as an array (depth: a float); ValueError if it is invalid."""
        if not isinstance(item, Mapping) or not {"concept", "kind", "target"} <= item.keys():
            raise ValueError(f"an item of an answer needs concept, kind and target, but one is {str(item)[:60]}")
        concept, kind, size = item["concept"], item["kind"], self.mask_size
        if not isinstance(concept, str) or not concept:
            raise ValueError(f"a concept must be text of at least one character, not {concept!r}")
        concept.encode()  # UnicodeEncodeError, a ValueError, on half a surrogate pair
        if kind not in self.kinds:
            raise ValueError(f"unknown kind {kind!r} of {concept!r}; {closest(str(kind), self.kinds)}")
        target = np.asarray(item["target"])
        ok = target.shape == {"box": (4,), "point": (2,), "mask": (size, size), "depth": ()}[kind]
        ok = ok and target.dtype.kind in ("biuf" if kind == "mask" else "iuf")
        if ok and kind == "mask":
            ok = np.isin(target, (0, 1)).all()
        elif ok and kind == "depth":
            ok = 0 < target < np.inf
        elif ok:
            ok = ((target >= 0) & (target <= 1)).all() and (kind == "point" or (target[:2] <= target[2:]).all())
        if not ok:
            allowed = TARGETS[kind].format(size=size)
            raise ValueError(f"the {kind} of {concept!r} is {str(item['target'])[:80]}; allowed: {allowed}")
        cast = float(target) if kind == "depth" else target.astype(bool if kind == "mask" else np.float32)
        return {"concept": concept, "kind": kind, "target": cast}

    def check(self, signal: Any) -> None:
        """ValueError for an answer that `encode` refuses, whatever its concepts."""
        for item in signal:
            self.checked(item)

    def fit(self, source: Examples, *, seed: int) -> "AnswerTokenizer":
        start = time.perf_counter()
        signals = [self.signal_of(source[i]) for i in range(min(len(source), self.num_examples))]
        answers = [answer for answer in signals if answer is not None]
        concepts = [item["concept"] for answer in answers for item in answer]
        num_pieces = self.vocab_size - self.layout.first_text
        pieces, merges = fit_pieces(concepts, num_pieces=num_pieces, split_words=True)
        text = TextTokenizer(recipe=self.text, pieces=pieces, merges=merges, split_words=True, card={})
        tokenizer = AnswerTokenizer(recipe=self, text=text, card={})
        lengths = [len(ids) for ids in tokenizer.encode(answers)]
        tokenizer.card.update(
            component="answers",
            signal=self.signal,
            values=f"concepts with {', '.join(self.kinds)}",
            vocab_size=self.modality.vocab_size,
            num_bins=self.num_bins,
            num_concepts=len({*concepts}),
            mean_tokens=round(sum(lengths) / max(len(lengths), 1), 2),
            longest=max(lengths, default=0),
            num_examples=len(answers),
            fit_seed=seed,
            fit_seconds=round(time.perf_counter() - start, 2),
        )
        return tokenizer


class AnswerTokenizer(Reader):
    kind = "answer"

    def __init__(self, *, recipe: AnswerRecipe, text: TextTokenizer, card: dict[str, Any]):
        self.recipe, self.text, self.card = recipe, text, card
        self.layout, self.modality = recipe.layout, recipe.modality
        first = self.layout.first_text - len(KINDS)
        self._kinds = {first + i: kind for i, kind in enumerate(KINDS) if kind in recipe.kinds}  # of declarations
        self._bytes = [bytes(BYTES[character] for character in piece) for piece in text.pieces]

    def checked(self, item: Any) -> dict[str, Any]:
        return self.recipe.checked(item)

    def _bins(self, kind: str, target: Any) -> np.ndarray:
        """Target -> bins, in the order of tokens."""
        if kind == "mask":
            return target.reshape(-1, self.recipe.strip) @ self._powers
        if kind == "depth":
            position = np.log([target / self.recipe.near]) / np.log(self.recipe.far / self.recipe.near)
        else:
            position = target[AS_TOKENS[: len(target)]].astype(np.float64)
        return (position.clip(0, 1) * self.recipe.num_bins).astype(np.int64).clip(max=self.recipe.num_bins - 1)

    def _target(self, kind: str, bins: Seq[int] | np.ndarray) -> Any:
        """Bins -> target."""
        bins = np.asarray(bins)
        if kind == "mask":
            return (bins[:, None] & self._powers[None] > 0).reshape(self.recipe.mask_size, -1)
        position = (bins + 0.5) / self.recipe.num_bins
        if kind == "depth":
            return float(self.recipe.near * (self.recipe.far / self.recipe.near) ** position[0])
        # Any two corners span a box, whichever comes first.
        target = position if kind == "point" else np.sort(position.reshape(2, 2), axis=0).ravel()
        return target[AS_TOKENS[: len(target)]].astype(np.float32)

    @functools.cached_property
    def _powers(self) -> np.ndarray:
        return 2 ** np.arange(self.recipe.strip)[::-1]  # the first cell is the highest bit

    def encode(self, signals: Seq[Any]) -> list[np.ndarray]:
        """int32 [n] each, closed by [EOS]; ValueError if an answer is invalid or too long."""
        answers = [[self.checked(item) for item in answer] for answer in signals]
        declarations = {kind: id for id, kind in self._kinds.items()}
        concepts = list(dict.fromkeys(item["concept"] for answer in answers for item in answer))
        texts = dict(zip(concepts, self.text.encode_unbounded(concepts), strict=True))
        encoded = []
        for answer in answers:
            ids = []
            for item in answer:
                axes = np.array([axis for axis, _ in self.recipe.places(item["kind"])])
                bins = axes * self.recipe.num_bins + self._bins(item["kind"], item["target"])
                ids += [*texts[item["concept"]][:-1], declarations[item["kind"]]]
                ids += (self.layout.first_coordinate + bins).tolist()
            if len(ids) >= self.modality.max_length:
                raise ValueError(
                    f"an answer of {len(answer)} items needs {len(ids) + 1} tokens, but {self.modality.name} has at "
                    f"most {self.modality.max_length}"
                )
            encoded.append(np.array([*ids, EOS], np.int32))
        return encoded

    def parse(self, ids: Seq[int] | np.ndarray) -> Answer:
        """The answer of these ids; ValueError names the first id that is not allowed, and what is."""
        ids, items, i = np.asarray(ids, np.int64).ravel().tolist(), [], 0
        while i < len(ids) and ids[i] != EOS:
            item, i = self._item(ids, i)
            items.append(item)
        if i == len(ids):
            raise self._unexpected(ids, i, "text, [EOS]")
        if i < len(ids) - 1:
            raise self._unexpected(ids, i + 1, "nothing after [EOS]")
        return items

    def decode(self, ids: Seq[Seq[int] | np.ndarray]) -> list[Answer]:
        """The complete items up to the first [EOS]; broken ones are dropped."""
        answers = []
        for row in ids:
            row, items, i = list(itertools.takewhile(lambda id: id != EOS, np.asarray(row).ravel().tolist())), [], 0
            while i < len(row):
                try:
                    item, i = self._item(row, i)
                    items.append(item)
                except ValueError:
                    i += 1
            answers.append(items)
        return answers

    def _item(self, ids: list[int], start: int) -> tuple[dict[str, Any], int]:
        """The item that begins at `start`, and where the next one does."""
        first_text, first, size = self.layout.first_text, self.layout.first_coordinate, self.recipe.num_bins
        pieces = [*itertools.takewhile(lambda id: 0 <= id - first_text < self.text.num_pieces, ids[start:])]
        at = start + len(pieces)
        if not pieces:
            raise self._unexpected(ids, at, "text, [EOS]")
        spelled = b"".join(self._bytes[id - first_text] for id in pieces)
        try:
            concept = spelled.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"tokens {start} to {at - 1} spell {spelled!r}; allowed: UTF-8, {error.reason}") from error
        if at >= len(ids) or ids[at] not in self._kinds:
            names = [f"{self._name(id)} ({kind})" for id, kind in self._kinds.items()]
            raise self._unexpected(ids, at, f"more text, {', '.join(names)}")
        kind, bins = self._kinds[ids[at]], []
        for axis, count in self.recipe.places(kind):
            at, lowest = at + 1, first + axis * size
            if at >= len(ids) or not 0 <= ids[at] - lowest < count:
                raise self._unexpected(ids, at, f"v{axis}=0 to v{axis}={count - 1}, of a {kind}")
            bins.append(ids[at] - lowest)
        return {"concept": concept, "kind": kind, "target": self._target(kind, bins)}, at + 1

    def _unexpected(self, ids: list[int], at: int, allowed: str) -> ValueError:
        problem = f"token {at} is {self._name(ids[at])}" if at < len(ids) else f"the {len(ids)} tokens end too early"
        return ValueError(f"{problem}; allowed here: {allowed}")

    def _name(self, id: int) -> str:
        if 0 <= id < self.layout.first_text:
            return self.layout.names[id]
        known = 0 <= id - self.layout.first_text < self.text.num_pieces
        return repr(self._bytes[id - self.layout.first_text]) if known else f"the unused id {id}"

    @functools.cached_property
    def grammar(self) -> Any:
        """The sequences that `parse` accepts: concepts in UTF-8, each with a kind and its target, as many as fit."""
        from m4.tokens.grammar import Grammar  # here: reading data must not load JAX

        size, strips = self.recipe.num_bins, 2**self.recipe.strip
        strip, end, other = range(NUM_COORDINATES, NUM_COORDINATES + 3)  # classes; those below are the axes'
        classes = np.full(self.modality.vocab_size, other, np.int32)
        for axis in range(NUM_COORDINATES):
            classes[self.layout.first_coordinate + axis * size :][:size] = axis
        classes[self.layout.first_coordinate :][:strips] = strip
        classes[EOS] = end
        # A class of text for each way in which pieces lead from state to state of UTF-8.
        steps = [utf8_steps(piece) for piece in self._bytes]
        texts = {step: other + 1 + i for i, step in enumerate(dict.fromkeys(steps))}
        classes[self.layout.first_text :][: len(steps)] = [texts[step] for step in steps]
        # State 0: between items; 1 + u: within a concept, UTF-8 in state u; then the targets of each kind.
        rules = [{kind: 1 + step[u] for step, kind in texts.items() if step[u] >= 0} for u in (0, *range(NUM_UTF8))]
        rules[0][end] = -1
        for declaration, kind in self._kinds.items():
            classes[declaration] = classes.max() + 1
            rules[1][int(classes[declaration])] = len(rules)
            places = self.recipe.places(kind)
            for i, (axis, count) in enumerate(places):
                after = 0 if i == len(places) - 1 else len(rules) + 1
                allowed = {axis} if count == size else set()
                rules.append(dict.fromkeys(allowed | ({strip} if axis == 0 else set()), after))
        return Grammar.make(classes, rules, end_id=EOS)

    def signal_of(self, example: Mapping[str, Any]) -> Answer | None:
        answer = self.recipe.signal_of(example)
        if answer is not None and not isinstance(answer, list):
            raise ValueError(f"an answer is a list of concepts, not {str(answer)[:60]!r}")
        return None if answer is None else [self.checked(item) for item in answer]

    def from_text(self, text: str) -> Answer | None:
        """JSON: [{"concept": "cube", "kind": "point", "target": [y, x]}, ...]."""
        try:
            return self.signal_of({self.recipe.signal: super().from_text(text)})
        except ValueError as error:
            raise ValueError(
                f'an answer must be JSON like [{{"concept": "cube", "kind": "point", "target": [y, x]}}], or the path '
                f"of a JSON file, not {text[:60]!r}: {error}"
            ) from error

    def write(self, signal: Answer, folder: Path, *, image: np.ndarray | None) -> None:
        """<signal>.json and, with an image to draw on, <signal>.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for item in map(self.checked, signal):
            target = item["target"]
            if item["kind"] != "depth":
                target = (target.astype(int) if item["kind"] == "mask" else target.astype(float).round(5)).tolist()
            lines.append(json.dumps({**item, "target": target}, ensure_ascii=False))
        text = ",\n".join(lines)
        (folder / f"{self.modality.signal}.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
        if image is not None:
            Image.fromarray(self.draw(signal, image=image)).save(folder / f"{self.modality.signal}.png")

    def draw(self, signal: Answer, *, image: np.ndarray | None) -> np.ndarray:
        """Boxes, points and masks in a colour per concept, on the image (or on white); depths as text at the left."""
        picture, row = canvas(image), 2
        pen = ImageDraw.Draw(picture)
        for item in map(self.checked, signal):
            concept, kind, target = item["concept"], item["kind"], item["target"]
            colour = hue(sum(concept.encode()))
            if kind == "box":
                draw_box(pen, picture.size, target, concept, colour)
            elif kind == "point":
                y, x = (float(v) for v in target * picture.size[::-1])
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour, outline="white")
                draw_label(pen, (x + 8, y - 6), concept, colour)
            elif kind == "mask":
                layer = Image.fromarray(target.astype(np.uint8) * 128).resize(picture.size, Image.Resampling.NEAREST)
                picture.paste(colour, mask=layer)
                left, top, _, _ = layer.getbbox() or (0, 0, 0, 0)
                draw_label(pen, (left + 3, top + 2), concept, colour)
            else:
                draw_label(pen, (3, row), f"{concept}: {target:.2f} m", colour)
                row += 15
        return np.asarray(picture)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        text, _ = self.text.state()
        return {"recipe": to_json(self.recipe), "text": {k: v for k, v in text.items() if k != "recipe"}}, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]):
        recipe = from_json(config["recipe"])
        return cls(recipe=recipe, text=TextTokenizer(recipe=recipe.text, **config["text"], card={}), card=card)
