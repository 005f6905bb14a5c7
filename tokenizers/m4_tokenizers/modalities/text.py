"""Captions as tokens: byte-level, so that every string has ids, with a few reserved ids in front.

    id  0      1      2      3      4 ..            4 + S ..                    then       then
        [PAD]  [UNK]  [SOS]  [EOS]  [S_0] [S_1] ..  v0=0 .. v0=B-1 v1=0 .. v3=.. [D_0] ..   bytes, words, merges, unused

S sentinels mark masked spans ([S_1] is the first in use, as in 4M), B bins give the four coordinates of a box, and the
32 [D_i] declare what text cannot say: [D_0] an answer, [D_i] image i of an in-context example (m4.masking.episodes).
Hugging Face's model has only the ids behind the reserved ones: all that a user types, "[EOS]" included, is bytes. A
text with declarations is a tuple: ("is", 1, "like", 2).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import textwrap
import time
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from m4.files import check_strings
from m4.tokens.modality import Sequence
from m4.tokens.tokenizer import Examples
from m4_tokenizers.modalities.reading import Reader

Text = str | tuple[str | int, ...]
PAD, UNK, SOS, EOS = range(4)
NUM_COORDINATES, NUM_DECLARATIONS = 4, 32
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # one printable character for each of the 256 bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The reserved ids, in this order."""

    num_sentinels: int
    """Sentinels [S_i]."""
    num_bins: int
    """Bins of each of the four coordinates."""
    num_declarations: int = NUM_DECLARATIONS
    """Declarations [D_i]."""

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return (
            *("[PAD]", "[UNK]", "[SOS]", "[EOS]"),
            *(f"[S_{i}]" for i in range(self.num_sentinels)),
            *(f"v{axis}={i}" for axis in range(NUM_COORDINATES) for i in range(self.num_bins)),
            *(f"[D_{i}]" for i in range(self.num_declarations)),
        )

    @property
    def first_sentinel(self) -> int:
        return EOS + 2  # [S_1]: masking never used [S_0]

    @property
    def first_coordinate(self) -> int:
        return EOS + 1 + self.num_sentinels

    @property
    def first_declaration(self) -> int:
        return self.first_coordinate + NUM_COORDINATES * self.num_bins

    @property
    def first_text(self) -> int:
        return self.first_declaration + self.num_declarations


def as_sequence(*, name: str, signal: str, vocab_size: int, max_length: int, layout: Layout) -> Sequence:
    return Sequence(
        name=name,
        signal=signal,
        vocab_size=vocab_size,
        max_length=max_length,
        first_sentinel=layout.first_sentinel,
        num_sentinels=layout.num_sentinels - 1,
        end_id=EOS,
        first_declaration=layout.first_declaration if layout.num_declarations else 0,
        num_declarations=layout.num_declarations,
    )


def fit_pieces(texts: Seq[Text], *, num_pieces: int, split_words: bool) -> tuple[list[str], list[list[str]]]:
    """(pieces, merges) of a byte-level model: the 256 bytes first, at most `num_pieces` in all.

    Where all words (with their leading space) fit, each becomes one piece, at no cost for intermediate merges; any
    other word is spelled in bytes. A larger corpus has ordinary byte-pair merges. With `split_words` off a text is
    one word.
    """
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    parts = [part for text in texts for part in ((text,) if isinstance(text, str) else text) if isinstance(part, str)]
    counts = Counter(word for text in parts for word, _ in splitter.pre_tokenize_str(text))
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    if len(ALPHABET) + len(words) <= num_pieces:
        return ALPHABET + words, []
    model = FastTokenizer(models.BPE())
    model.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces, initial_alphabet=ALPHABET, min_frequency=2, show_progress=False, special_tokens=[]
    )
    model.train_from_iterator(parts, trainer)
    vocabulary = model.get_vocab()
    state = json.loads(model.to_str())["model"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [list(pair) for pair in state["merges"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """Text of at most `max_length` tokens, in byte-level pieces."""

    signal: str = "caption"
    """Signal that is read."""
    name: str = "caption"
    """Name of the modality."""
    vocab_size: int = 768
    """Different token ids, reserved ones and 256 bytes included."""
    max_length: int = 32
    """Tokens of a text, at most, the closing [EOS] included."""
    num_bins: int = 64
    """Reserved ids for bins of a coordinate."""
    num_sentinels: int = 16
    """Masked spans of a text, at most."""
    num_examples: int = 4000
    """Texts from which the pieces are learned, at most."""
    cut_long: bool = False
    """Truncate texts that are too long; else they are an error."""

    def __post_init__(self):
        smallest = self.layout.first_text + len(ALPHABET)
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size={self.vocab_size} is too small: {self.layout.first_text} reserved ids and "
                f"{len(ALPHABET)} bytes need at least {smallest}"
            )

    @property
    def layout(self) -> Layout:
        return Layout(num_sentinels=self.num_sentinels, num_bins=self.num_bins)

    @property
    def modality(self) -> Sequence:
        return as_sequence(
            name=self.name,
            signal=self.signal,
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            layout=self.layout,
        )

    def check(self, signal: Any) -> None:
        """ValueError for a signal that no text tokenizer can encode."""
        check_text(signal)

    def fit(self, source: Examples, *, seed: int) -> "TextTokenizer":
        texts = [source[i][self.signal] for i in range(min(len(source), self.num_examples))]
        return self.fit_texts(texts, split_words=True, seed=seed)

    def fit_texts(self, texts: Seq[Text], *, split_words: bool, seed: int) -> "TextTokenizer":
        """The tokenizer of these texts; nothing in it is random, so the seed is only recorded."""
        start = time.perf_counter()
        pieces, merges = fit_pieces(texts, num_pieces=self.vocab_size - self.layout.first_text, split_words=split_words)
        tokenizer = TextTokenizer(recipe=self, pieces=pieces, merges=merges, split_words=split_words, card={})
        lengths = [len(ids) for ids in tokenizer.encode_unbounded(texts[:2000])]
        tokenizer.card.update(
            component="text",
            signal=self.signal,
            values="any Unicode string",
            vocab_size=self.vocab_size,
            reserved_ids=self.layout.first_text,
            bytes_and_pieces=len(pieces),
            mean_tokens=round(sum(lengths) / max(len(lengths), 1), 2),
            longest=max(lengths, default=0),
            share_cut=round(sum(n > self.max_length for n in lengths) / max(len(lengths), 1), 4) * self.cut_long,
            num_examples=len(texts),
            fit_seed=seed,
            fit_seconds=round(time.perf_counter() - start, 2),
        )
        return tokenizer


def check_text(signal: Any, what: str = "a text") -> None:
    """ValueError unless a signal is text (or parts of it, between declarations) that UTF-8 can hold."""
    for part in (signal,) if isinstance(signal, str) else signal if isinstance(signal, tuple | list) else (None,):
        if not isinstance(part, str | int):
            raise ValueError(f"{what} must be a string, not {type(signal).__name__}")
        if isinstance(part, str) and any("\ud800" <= c <= "\udfff" for c in part):
            raise ValueError(f"{what} has half a surrogate pair: {ascii(part)[:60]}")


def draw_text(text: str) -> np.ndarray:
    """uint8 [H W 3]: the text, wrapped, in black on a white tile."""
    tile = Image.new("RGB", (128, 128), "white")
    printable = text.encode("latin-1", "replace").decode("latin-1")  # all that PIL's built-in font has
    lines = textwrap.wrap(printable, 20)[:9]
    ImageDraw.Draw(tile).multiline_text((4, 4), "\n".join(lines), fill="black", spacing=3)
    return np.asarray(tile)


class TextTokenizer(Reader):
    kind = "text"

    def __init__(
        self, *, recipe: TextRecipe, pieces: list[str], merges: list[list[str]], split_words: bool, card: dict[str, Any]
    ):
        self.recipe, self.pieces, self.merges, self.split_words, self.card = recipe, pieces, merges, split_words, card
        self.layout, self.modality = recipe.layout, recipe.modality
        self._first_id = self.layout.first_text  # of Hugging Face's model
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        # ignore_merges: a word that is a piece needs no merges to become one.
        model = models.BPE(vocab=vocabulary, merges=[(left, right) for left, right in merges], ignore_merges=True)
        self._model = FastTokenizer(model)
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
        self._model.decoder = decoders.ByteLevel()

    @property
    def num_pieces(self) -> int:
        """Ids of text, from layout.first_text on."""
        return len(self.pieces)

    def encode_unbounded(self, signals: Seq[Text]) -> list[np.ndarray]:
        """Ids closed by [EOS], of any length."""
        for text in signals:
            check_text(text)
        parts = [part for text in signals for part in ((text,) if isinstance(text, str) else text)]
        check_strings(parts)
        texts = iter(self._model.encode_batch_fast([p for p in parts if isinstance(p, str)], add_special_tokens=False))
        ids_by_part = iter(
            np.array(next(texts).ids, np.int32) + self._first_id if isinstance(p, str) else self._declaration_ids(p)
            for p in parts
        )
        counts = [1 if isinstance(text, str) else len(text) for text in signals]
        return [np.array([*itertools.chain(*itertools.islice(ids_by_part, n)), EOS], np.int32) for n in counts]

    def _declaration_ids(self, index: int) -> list[int]:
        if not 0 <= index < self.layout.num_declarations:
            raise ValueError(
                f"{self.modality.name} has no declaration {index}; it has {self.layout.num_declarations}, from 0 on"
            )
        return [self.layout.first_declaration + index]

    def encode(self, signals: Seq[Text]) -> list[np.ndarray]:
        """int32 [n] each. ValueError for a text that is too long; with `cut_long` it is truncated, without [EOS]."""
        encoded, longest = self.encode_unbounded(signals), self.modality.max_length
        if self.recipe.cut_long:
            return [ids[:longest] for ids in encoded]
        for text, ids in zip(signals, encoded, strict=True):
            if len(ids) > longest:
                raise ValueError(
                    f"{self.modality.name} of {len(ids)} tokens is longer than the allowed {longest}: {text[:60]!r} "
                    f"(cut_long=True in its recipe cuts such texts)"
                )
        return encoded

    def decode(self, ids: Seq[np.ndarray]) -> list[str]:
        """The text up to the first [EOS]; reserved and unused ids are skipped, broken UTF-8 becomes U+FFFD."""
        first = self.layout.first_text
        texts = []
        for row in ids:
            row = np.asarray(row, np.int64).ravel()
            ends = np.flatnonzero(row == EOS)
            row = row[: ends[0]] if len(ends) else row
            kept = row[(row >= first) & (row < first + self.num_pieces)]
            texts.append(self._model.decode((kept - self._first_id).tolist(), skip_special_tokens=False))
        return texts

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        return example[self.modality.signal] if self.modality.signal in example else None

    def write(self, signal: str, folder: Path, *, image: np.ndarray | None) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{self.modality.signal}.txt").write_text(signal + "\n", encoding="utf-8")

    def draw(self, signal: str, *, image: np.ndarray | None) -> np.ndarray:
        return draw_text(signal)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        config = {
            "recipe": dataclasses.asdict(self.recipe),
            "pieces": self.pieces,
            "merges": self.merges,
            "split_words": self.split_words,
        }
        return config, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]) -> "TextTokenizer":
        recipe = TextRecipe(**config["recipe"])
        return cls(
            recipe=recipe,
            pieces=config["pieces"],
            merges=config["merges"],
            split_words=config["split_words"],
            card=card,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPieceRecipe:
    """4M's text tokenizer, from its own file (text_tokenizer_4m_wordpiece_30k.json): 30,000 lower-case word pieces, 200
    sentinels, 1000 bins a coordinate, object classes as single ids behind them."""

    path: str
    """Path of the file."""
    signal: str = "caption"
    """Signal that is read."""
    name: str = "caption"
    """Name of the modality."""
    max_length: int = 256
    """Tokens of a text, at most, the closing [EOS] included."""
    cut_long: bool = False
    """Truncate texts that are too long; else they are an error."""

    layout = Layout(num_sentinels=200, num_bins=1000, num_declarations=0)
    vocab_size = 30_000

    @property
    def modality(self) -> Sequence:
        return as_sequence(
            name=self.name,
            signal=self.signal,
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            layout=self.layout,
        )

    def fit(self, source: Examples, *, seed: int) -> "WordPieceTokenizer":
        """Reads the file; nothing is fitted. ValueError if it is missing or another tokenizer."""
        try:
            file = Path(self.path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"no WordPiece file {self.path!r}: {error.strerror}") from error
        card = {"component": "wordpiece", "signal": self.signal, "values": "text, read as lower case"}
        return WordPieceTokenizer(recipe=self, file=file, card={**card, "vocab_size": self.vocab_size})


class WordPieceTokenizer(TextTokenizer):
    """4M's ids; the file is stored in the tokenizer."""

    def __init__(self, *, recipe: WordPieceRecipe, file: str, card: dict[str, Any]):
        self.recipe, self.file, self.card = recipe, file, card
        self.layout, self.modality = recipe.layout, recipe.modality
        self._first_id = 0
        try:
            self._model = FastTokenizer.from_str(file)
        except Exception as error:  # Hugging Face raises nothing more specific
            raise ValueError(f"{recipe.path} is no tokenizer file: {error}") from error
        wrong = [name for i, name in enumerate(self.layout.names) if self._model.token_to_id(name) != i]
        if wrong or self._model.get_vocab_size() != recipe.vocab_size:
            raise ValueError(
                f"{recipe.path} is not the original's WordPiece file: {self._model.get_vocab_size():,} entries instead "
                f"of {recipe.vocab_size:,}, {len(wrong):,} reserved ids elsewhere {wrong[:3]}"
            )

    @property
    def num_pieces(self) -> int:
        return self.recipe.vocab_size - self.layout.first_text

    def decode_verbatim(self, ids: np.ndarray) -> str:
        """All ids as text, names of reserved ones such as [EOS] included, as ml-4m decodes them."""
        return self._model.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"recipe": dataclasses.asdict(self.recipe), "file": self.file}, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]):
        return cls(recipe=WordPieceRecipe(**config["recipe"]), file=config["file"], card=card)
