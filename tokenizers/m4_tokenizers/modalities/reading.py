"""`read` of all tokenizers here, by the common reader of files, so that generation reads files as training does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from m4.data.samples import read_sample, written_out


class Reader:
    """`kind` says what signals are (m4.data.sources.files.KINDS); `from_text` reads those that can be written out."""

    modality: Any  # Modality

    if TYPE_CHECKING:  # an attribute or property of each tokenizer

        @property
        def kind(self) -> str: ...

    def from_text(self, text: str) -> Any:
        """A signal that is written out."""
        return written_out(self.kind, text)

    def read(self, value: str | Path) -> Any:
        """A signal from a file, or written out (m4.data.samples.file_of tells which a value is)."""
        if not self.kind:
            raise NotImplementedError(f"{type(self).__name__} needs a kind of its recipe, or a `read` of its own")
        name = self.modality.signal
        tokenizer: Any = self
        return read_sample({name: value}, {name: tokenizer})[name]
