"""`read` of all tokenizers here: by the one reader of files, so that generation reads what training reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from m4.data.samples import read_sample, written_out


class Reader:
    """`kind` says what signals are (m4.data.sources.files.KINDS); what can be written out has `from_text`."""

    modality: Any  # Modality

    if TYPE_CHECKING:  # an attribute or property of each tokenizer

        @property
        def kind(self) -> str: ...

    def from_text(self, text: str) -> Any:
        """A signal that is written out."""
        return written_out(self.kind, text)

    def read(self, value: str | Path) -> Any:
        """A signal from a file, or from a text that says it (m4.data.samples.file_of tells which of them a value
        is)."""
        if not self.kind:
            raise NotImplementedError(f"{type(self).__name__} needs a kind of its recipe, or a `read` of its own")
        name = self.modality.signal
        tokenizer: Any = self
        return read_sample({name: value}, {name: tokenizer})[name]
