"""In-context examples: labelled examples and a query, packed into one budget of tokens.

    item 2, example 2     rgb .....   caption d a x $               a labelled example: goes in whole
    item 1, example 1     rgb .....   caption b l i c k e t $
    item 0, example 0     rgb .....   caption S1                    the query: what S1 stands for is predicted

Everything is a token with an address, which says to which `example` it belongs, and to which `item` (image, text or
frame). Each further image of an example is an item of its own, and a text says [D_i] where it means the example's image
i; that token belongs to the image's item. [D_0] stands between a question and its answer, so that a text is one
sequence of which the query keeps what comes before.

The task forms follow VL-ICL Bench (Zong et al. 2024) and M2IXT (Chen et al. 2023).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from m4.masking.base import ExampleMasking
from m4.tokens.batch import MaskedBatch, Targets, pad
from m4.tokens.modality import Features, Modalities, Modality, Sequence
from m4.tokens.packing import ANSWER, Packed, Record, pack, stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """One example: signals by name.

    A list is several images of one signal; an image may be the path of its file, a text a pathlib.Path. Text is a str,
    or a tuple of str and int: i says "image i of this example" (from 1), in reading order. A structured answer is a
    list too, of mappings with "concept", "kind" and "target", and is one value.
    """

    inputs: Mapping[str, Any]
    """Given signals. A signal may be both input (a question) and output (its answer)."""
    outputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Signals to predict, as the example answers them; {} in a query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """Labelled examples, then a query whose outputs are the truth."""

    shots: tuple[Shot, ...]
    """The labelled examples, in their order in the prompt."""
    query: Shot
    """The example that is answered."""
    candidates: tuple[Any, ...] = ()
    """Answers among which closed-ended scoring chooses; () is open-ended."""


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass that draws episodes. Nothing of its test split that is to be learned occurs in training.

    name: its key in results. output: the signal that is asked for. images: how many are in each example.
    max_shots: labelled examples in every episode, of which every prefix is as balanced over labels as it can be.
    """

    @property
    def name(self) -> str: ...

    output: str
    images: int
    max_shots: int

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """Renders what is needed; returns at once when it is there."""

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        """Episode `index` of "train" or "test": a pure function of the task's fields, split and index."""

    def correct(self, answer: Any, episode: Episode) -> bool | float:
        """Whether, or how much, an answer to the query is right."""


# ---- Encoding -------------------------------------------------------------------------------------------------------


def raw_examples(shot: Shot) -> list[dict[str, Any]]:
    """A shot as ordinary raw examples: one for each image, the first with all the rest."""
    for name, value in [*shot.inputs.items(), *shot.outputs.items()]:
        if isinstance(value, list) and not value:
            raise ValueError(f"{name} of a shot is an empty list; leave it out instead")
    lists = {name: v for name, v in {**shot.outputs, **shot.inputs}.items() if is_several(v)}
    examples: list[dict[str, Any]] = [{} for _ in range(max([1, *map(len, lists.values())]))]
    for name in dict.fromkeys([*shot.inputs, *shot.outputs]):
        if name in shot.inputs and name in shot.outputs:
            examples[0][name] = question_answer_text(shot.inputs[name], shot.outputs[name], name)
            continue
        value = shot.inputs[name] if name in shot.inputs else shot.outputs[name]
        for example, item in zip(examples, value if is_several(value) else [value], strict=False):
            example[name] = item
    return examples


def is_several(value: Any) -> bool:
    """Whether a signal of a shot is a list of several images, and not one structured answer."""
    return isinstance(value, list) and not all(isinstance(item, Mapping) and "concept" in item for item in value)


def question_answer_text(question: Any, answer: Any, name: str) -> tuple:
    """One text of a question and its answer (None: up to where it begins)."""
    parts = [(x,) if isinstance(x, str) else x for x in (question, *([] if answer is None else [answer]))]
    if not all(isinstance(x, tuple) for x in parts):
        raise ValueError(f"{name} is both input and output of a shot, which only a text can be")
    return (*parts[0], ANSWER, *itertools.chain(*parts[1:]))


def inputs_of(shots: Seq[Shot]) -> dict[str, list[Any]]:
    """The inputs of each by name, None where it lacks one; of several images the first."""
    first = lambda value: value[0] if is_several(value) else value  # noqa: E731
    names = dict.fromkeys(name for shot in shots for name in shot.inputs)
    return {n: [first(s.inputs[n]) if n in s.inputs else None for s in shots] for n in names}


def pack_shots(
    shots: Seq[Seq[Record]], modalities: Modalities, *, budget: int, num_tokens: int = 0, first_item: int = 1
) -> tuple[Packed, int]:
    """Labelled examples, whose items are numbered from `first_item` on, and how many of them there was no room for.

    What does not fit into `budget` tokens is dropped whole, the oldest first. The newest example is number 1.
    """
    kept: list[Packed] = []
    item, used = first_item, 0
    for number, records in enumerate(reversed(shots), 1):
        items = range(item, item + len(records))
        packed = pack(records, items, modalities, example=number, num_tokens=num_tokens)
        if used + packed.columns.shape[1] > budget:
            break
        kept.append(packed)
        used, item = used + packed.columns.shape[1], items.stop
    return Packed.join(kept, modalities), len(shots) - len(kept)


def split_prompt_and_target(
    stored: np.ndarray, m: Modality, item: int, example: int, modalities: Modalities, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, "6 m"]]:
    """What is given of a predicted output, and its columns of targets (ids, previous, modality, position, item,
    example).

    Of a text the question, up to where the answer begins, and a sentinel in its place; of a grid a random share.
    """
    ids = stored.astype(np.int32)
    if isinstance(m, Sequence):
        (begins,) = np.nonzero(ids == m.first_declaration + ANSWER) if m.num_declarations else ([],)
        begin = begins[0] + 1 if len(begins) else 0
        question, ids = np.append(ids[:begin], m.first_sentinel), ids[begin:]
        previous, place = np.append(m.first_sentinel, ids[:-1]), np.arange(len(ids))
    else:
        known = rng.permutation(len(ids)) < rng.integers(len(ids))
        question, place = np.where(known, ids, -1), np.flatnonzero(~known)
        ids, previous = ids[place], np.full(len(place), -1)
    index, own = np.full(len(ids), modalities.index(m.name)), (np.full(len(ids), x) for x in (item, example))
    return question, np.stack([ids, previous, index, place, *own]).astype(np.int32)


# ---- Training -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeMasking(ExampleMasking):
    """How episodes become masked examples. An episode is `num_examples` consecutive ones of its data set, each of
    `num_images` records (the first with all but the further images); the last example is its query.

    A random number of examples goes in with their outputs, and the query's outputs are predicted. If labels of an
    episode are drawn to be balanced, the labelled ones tell what these others are not, and a task in which there is
    little else to go by is not learned. Items are numbered at random, so that all their addresses are learned.
    """

    num_examples: int = 9
    """Examples of an episode, the query included."""
    num_images: int = 1
    """Images of each example."""
    max_items: int = 17
    """Items are numbered below this, at random; at least `ModelConfig.max_items`, for all learned addresses to be
    learned."""
    inputs: tuple[str, ...] = ("rgb",)
    """Signals or modalities that go in."""
    outputs: tuple[str, ...] = ("caption",)
    """Signals or modalities that are predicted. In labelled examples they go in, as the model reads their signal."""
    labelled: tuple[int, int] = (0, 8)
    """Smallest and largest number of examples that go in with their outputs, drawn uniformly."""
    num_tokens: tuple[int, ...] = (0,)
    """Tokens of an image that go in, coarse to fine, one of these drawn for each episode; 0 is all. The query's image
    goes in whole."""
    ask_all: bool = False
    """Predict the outputs of the other examples too, so that one pass answers several queries; else they are left
    out."""

    def __post_init__(self):
        low, high = self.labelled
        if not 0 <= low <= high < self.num_examples:
            raise ValueError(
                f"labelled={self.labelled} must be two rising numbers within [0, {self.num_examples - 1}]: of "
                f"{self.num_examples} examples one is the query"
            )
        if self.num_records > self.max_items:
            raise ValueError(
                f"{self.num_examples} examples of {self.num_images} images are {self.num_records} items, more than "
                f"max_items={self.max_items}"
            )
        if not self.num_tokens or min(self.num_tokens) < 0:
            raise ValueError(f"num_tokens={self.num_tokens} must be numbers of at least 0, at least one")

    @property
    def num_records(self) -> int:
        return self.num_examples * self.num_images

    @property
    def num_items(self) -> int:
        return self.max_items

    def check(self, modalities: Modalities) -> None:
        for name in self.inputs:
            modalities.as_input(name)
        for name in self.outputs:
            modalities.as_target(name)

    def num_vectors(self, num_inputs: int) -> int:
        return num_inputs

    def mask_one(
        self, records: Seq[Record], modalities: Modalities, rng: np.random.Generator, num_inputs: int, num_targets: int
    ) -> tuple[Packed, Int[np.ndarray, "6 m"]]:
        """One episode -> its input tokens, and columns of targets: ids, previous, modality, position, item, example.

        Examples for which there is no room are left out, the oldest first.
        """
        r = self.num_images
        examples = [records[i : i + r] for i in range(0, self.num_records, r)]
        num_labelled = int(rng.integers(self.labelled[0], self.labelled[1] + 1))
        num_tokens = int(self.num_tokens[rng.integers(len(self.num_tokens))])
        order = rng.permutation(len(examples) - 1)  # any may be labelled but the query
        labelled = {*order[:num_labelled].tolist()}
        kept = range(len(examples) - 1) if self.ask_all else sorted(labelled)
        free = (1 + rng.permutation(self.max_items - 1)).tolist()
        reads = [modalities.as_input(name).name for name in self.inputs]
        asks = [modalities.as_target(name) for name in self.outputs]
        parts, targets, room_in, room_out = [], [], num_inputs, num_targets
        for number, i in enumerate([len(examples) - 1, *reversed(kept)]):
            is_query = i == len(examples) - 1
            items = [0, *free[: r - 1]] if is_query else free[:r]
            free = free[len(items) - is_query :]
            names = [*reads, *(modalities.as_input(name).name for name in self.outputs if i in labelled)]
            shown = [{n: e[n] for n in dict.fromkeys(names) if n in e} for e in examples[i]]
            wanted = []
            for m in asks if i not in labelled else ():
                stored = examples[i][0][m.name]
                question, target = split_prompt_and_target(stored, m, items[0], number, modalities, rng)
                shown[0].pop(m.name, None)
                shown[0][m.name] = question
                wanted.append(target)
            part = pack(shown, items, modalities, example=number, num_tokens=0 if is_query else num_tokens)
            count = sum(t.shape[1] for t in wanted)
            if part.columns.shape[1] > room_in or count > room_out:
                if is_query:
                    raise ValueError(
                        f"a query of {part.columns.shape[1]} input and {count} target tokens does not fit into "
                        f"num_inputs={num_inputs} and num_targets={num_targets} of the masking"
                    )
                break
            parts.append(part)
            targets += wanted
            room_in, room_out = room_in - part.columns.shape[1], room_out - count
        return Packed.join(parts, modalities), np.concatenate([np.zeros((6, 0), np.int32), *targets], axis=1)

    def __call__(
        self, examples: Seq[Seq[Record]], modalities: Modalities, keys: Any, num_inputs: int, num_targets: int
    ) -> MaskedBatch:
        """Episodes -> MaskedBatch; `keys`: two numbers for each, which decide its mask."""
        rows = [
            self.mask_one(e, modalities, np.random.default_rng(key), num_inputs, num_targets)
            for e, key in zip(examples, keys, strict=True)
        ]
        inputs, features = stack([packed for packed, _ in rows], modalities, num_inputs, num_inputs)
        for m in modalities:
            if isinstance(m, Features) and m.name not in features:
                features[m.name] = np.zeros((len(rows), num_inputs, m.size), m.dtype)
        counts = np.array([t.shape[1] for _, t in rows])
        targets = [np.stack([pad([t[i]], num_targets) for _, t in rows]) for i in range(6)]
        return MaskedBatch(inputs, Targets(*targets, np.arange(num_targets) < counts[:, None]), features)
