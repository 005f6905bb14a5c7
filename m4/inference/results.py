"""What a sampler generated: signals by target, to draw and to write as files."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from m4.files import check_name, replacing_folder, replacing_together, shown


class Results(dict):
    """Signals by target: lists, or single signals if the inputs were single.

    `tokens`: ids by target's modality, one array a sample. `history`: by target's modality the step in which each token
    was decoded. `inputs`: signals as they were read. `sampler`: the m4.inference.sampler.Sampler that generated them,
    for its tokenizers.
    """

    def __init__(self, sampler: Any, targets: Seq[str], inputs: Mapping[str, list[Any]], single: bool):
        super().__init__({name: [] for name in targets})
        self.sampler, self.inputs, self.single = sampler, inputs, single
        self.tokens: dict[str, list[np.ndarray]] = {}
        self.history: dict[str, list[np.ndarray]] = {}

    def add(self, other: Results) -> None:
        """Further samples of the same targets."""
        for mine, theirs in ((self, other), (self.tokens, other.tokens), (self.history, other.history)):
            for name in theirs:
                mine.setdefault(name, []).extend(theirs[name])

    def signals(self, name: str) -> list[Any]:
        return [self[name]] if self.single else self[name]

    def image(self, i: int = 0) -> np.ndarray | None:
        """An image to draw on: the rgb input or target."""
        for name, signals in [*self.inputs.items(), *((n, self.signals(n)) for n in self)]:
            if name.split("_")[0] == "rgb" and signals[i] is not None:
                return signals[i]
        return None

    def draw(self, name: str, i: int = 0) -> np.ndarray:
        """uint8 picture [H W 3] of a target's sample i."""
        return self.sampler.tokenizer(name).draw(self.signals(name)[i], image=self.image(i))

    def pictures(self, i: int = 0) -> dict[str, np.ndarray]:
        """uint8 pictures [H W 3] of sample i: inputs by name, then targets (`name >` if that is an input, too)."""
        given = {
            name: self.sampler.input_tokenizer(name).draw(signals[i], image=self.image(i))
            for name, signals in self.inputs.items()
            if signals[i] is not None
        }
        return given | {f"{name} >" if name in given else name: self.draw(name, i) for name in self}

    def write(self, folder: str | Path, i: int = 0, *, alone: bool = False, with_inputs: bool = False) -> None:
        """Files of all targets of sample i, all of them or none. With its inputs, as they were read, they are a data
        set (m4.data.sources.generated).

        `alone`: they replace the whole folder; else other files in it stay. ValueError if it cannot be written, or if a
        signal's name would lead elsewhere.
        """
        folder = Path(folder)
        signals = {name: (self.sampler.tokenizer(name), self.signals(name)[i]) for name in self}
        targets = {tokenizer.modality.signal for tokenizer, _ in signals.values()}
        for name, given in self.inputs.items() if with_inputs else ():
            tokenizer = self.sampler.input_tokenizer(name)
            if given[i] is not None and "#" not in name and tokenizer.modality.signal not in targets:
                signals[f"input {name}"] = tokenizer, given[i]
        for name, (tokenizer, _) in signals.items():
            check_name(tokenizer.modality.signal, f"the signal of {ascii(name)}")
        try:
            with replacing_folder(folder) if alone else replacing_together(folder, with_digests=False) as temporary:
                for tokenizer, signal in signals.values():
                    tokenizer.write(signal, temporary, image=self.image(i))
        except OSError as error:
            raise ValueError(f"{shown(folder)} cannot be written: {error.strerror or error}") from error
