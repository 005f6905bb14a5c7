"""VL-ICL Bench as it is released (Zong et al. 2024): folders with support.json, query.json and the unpacked images.

    FOLDER/operator_induction/support.json  [{"image": ["operator_induction/support/0.png"], "question", "answer"}, ...]
    FOLDER/operator_induction/query.json    likewise, one entry for each query

Entries of some data sets have further fields, by which their examples are chosen; see `_choose_*`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m4.data.sources.contents import content
from m4.data.sources.files import decode
from m4.errors import check
from m4.files import parse_json, shown
from m4.in_context.tasks.episode_rng import balanced, generator, shuffled
from m4.in_context.tasks.nonce_words import same_text
from m4.masking.episodes import Episode, Shot

Entry = dict[str, Any]
DOWNLOAD = "git clone https://huggingface.co/datasets/ys-zong/VL-ICL && cd VL-ICL && bash unzip.sh"
OPERATORS = ("+", "-", "x")  # the order of a support example's three answers


def _choose_any(query: Entry, support: Sequence[Entry], count: int, rng: np.random.Generator):
    chosen = [support[i] for i in rng.choice(len(support), count, replace=False)]
    return chosen, query, ()


def _choose_operator(query: Entry, support: Sequence[Entry], count: int, rng: np.random.Generator):
    """A support example has an answer for each operator; the query names the operator of the episode."""
    check("operator", query["operator"], OPERATORS)
    chosen, _, _ = _choose_any(query, support, count, rng)
    index = OPERATORS.index(query["operator"])
    return [{**entry, "answer": entry["answer"][index]} for entry in chosen], query, ()


def _choose_classes(query: Entry, support: Sequence[Entry], count: int, rng: np.random.Generator):
    """The query has its own examples: images of two of its `classes`, its own and another, up to five of each."""
    own = query["answer"] if "task_label" not in query else query["task_label"]
    other = shuffled([name for name in query["classes"] if name != own], rng)[0]
    images = {name: list(shuffled(query["support"][name]["images"], rng)) for name in (own, other)}
    question = "Generate a {}" if "task_label" in query else "This is a"
    chosen = [
        {"image": [images[name].pop()], "question": question.format(name), "answer": name}
        for name in balanced((own, other), count, rng)
    ]
    return chosen, {**query, "question": question.format(own)}, (own, other)


def _choose_pairs(query: Entry, support: Sequence[Entry], count: int, rng: np.random.Generator):
    """A support entry has a pair of one class and a pair of two."""
    entries = [support[i] for i in rng.choice(len(support), count, replace=False)]
    return (
        [e[kind] for e, kind in zip(entries, balanced(("same", "diff"), count, rng), strict=True)],
        query,
        ("Yes", "No"),
    )


def _choose_latent(query: Entry, support: Sequence[Entry], count: int, rng: np.random.Generator):
    """Support entries of the same task that share the query's value of the latent variable."""
    latent = query["latent"]
    matching = [e for e in support if all(e[key] == query[key] for key in ("task", "latent", latent))]
    return _choose_any(query, matching, count, rng)


# data set: (target signal, images of an example, how examples are chosen)
DATASETS: dict[str, tuple[str, int, Callable]] = {
    "open_mi": ("caption", 1, _choose_classes),
    "matching_mi": ("caption", 2, _choose_pairs),
    "clevr": ("caption", 1, _choose_any),
    "clevr_text": ("caption", 0, _choose_any),
    "operator_induction": ("caption", 1, _choose_operator),
    "operator_induction_text": ("caption", 0, _choose_operator),
    "operator_induction_interleaved": ("caption", 2, _choose_operator),
    "operator_induction_interleaved_text": ("caption", 0, _choose_operator),
    "textocr": ("caption", 1, _choose_any),
    "open_t2i_mi": ("rgb", 1, _choose_classes),
    "cobsat": ("rgb", 1, _choose_latent),
}


@dataclass(frozen=True, kw_only=True)
class VLICL:
    """One data set of VL-ICL Bench; episode i has its query i."""

    folder: str
    """Folder of the benchmark."""
    dataset: str
    """Name of the data set: a folder within."""
    size: int = 224
    """Rows and columns that images are resized to, pixels."""
    max_shots: int = 8
    """Labelled examples of an episode."""

    def __post_init__(self):
        check("dataset", self.dataset, DATASETS)

    @property
    def name(self) -> str:
        return f"vl_icl_{self.dataset}"

    @property
    def output(self) -> str:
        return DATASETS[self.dataset][0]

    @property
    def images(self) -> int:
        return DATASETS[self.dataset][1]

    @property
    def num_queries(self) -> int:
        return len(self._read("query"))

    def prepare(self, data_dir: str | os.PathLike) -> None:
        """ValueError if the files are missing or cannot be read."""
        for part in ("support", "query"):
            self._read(part)

    def _read(self, part: str) -> list[Entry]:
        return _read(Path(self.folder, self.dataset, f"{part}.json"))

    def draw(self, split: str, index: int, data_dir: str | os.PathLike) -> Episode:
        if split != "test":
            raise ValueError(f"{self.name} has no split {split!r}: the benchmark is for tests alone; allowed: test")
        rng, queries = generator(self.name, split, index), self._read("query")
        query, choose = queries[index % len(queries)], DATASETS[self.dataset][2]
        try:
            entries, query, candidates = choose(query, self._read("support"), self.max_shots, rng)
            texts = [(_text(entry["question"]), str(entry["answer"])) for entry in (*entries, query)]
            paths = [self._paths(entry) for entry in (*entries, query)]
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"query {index % len(queries)} of {Path(self.folder, self.dataset, 'query.json')}, or its examples in "
                f"support.json, are not as VL-ICL Bench has {self.dataset}: {type(error).__name__} {error}; {DOWNLOAD}"
            ) from error
        examples = [self._shot(*text, files) for text, files in zip(texts, paths, strict=True)]
        return Episode(shots=tuple(examples[:-1]), query=examples[-1], candidates=shuffled(candidates, rng))

    def _paths(self, entry: Entry) -> list[str]:
        """The images of an entry. Queries of open_t2i_mi have none, since any image of their class is right."""
        if not self.images or (self.output == "rgb" and "image" not in entry):
            return []
        paths = [entry["image"]] if isinstance(entry["image"], str) else entry["image"]
        if len(paths) != self.images or not all(isinstance(path, str) for path in paths):
            raise ValueError(f"{ascii(paths)[:60]} instead of the names of {self.images} images")
        return paths

    def _shot(self, question: str, answer: str, paths: list[str]) -> Shot:
        images = [self._image(path) for path in paths]
        rgb = {"rgb": images if self.images > 1 else images[0]} if images else {}
        if self.output == "rgb":
            return Shot(inputs={"caption": question}, outputs=rgb)
        return Shot(inputs={**rgb, "caption": question}, outputs={"caption": answer})

    def _image(self, path: str) -> np.ndarray:
        """uint8 [size size 3]."""
        file = Path(self.folder, path)
        try:
            image = Image.fromarray(decode("rgb", shown(file), content(file)))
        except ValueError as error:
            names = Path(self.folder, self.dataset, "support.json")
            raise ValueError(
                f"{error}; {shown(names)} or query.json names it; the images come out of the archives: {DOWNLOAD}"
            ) from error
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def correct(self, answer: Any, episode: Episode) -> bool:
        """Exact match, as the benchmark has it for short answers; there a model judges images, not here."""
        if self.output == "rgb":
            raise ValueError(f"{self.name}: the benchmark has a vision-language model judge pictures, which m4 has not")
        return same_text(answer, episode.query.outputs["caption"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{ascii(value)[:60]} instead of a question")
    return value


@functools.cache
def _read(file: Path) -> list[Entry]:
    if not file.exists():
        raise ValueError(f"{shown(file)}: there is no such file; {DOWNLOAD}")
    data = content(file)
    try:
        entries = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{shown(file)}: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file} must hold a list of objects, one for each example")
    return entries
