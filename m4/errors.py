"""What errors say about a choice: what is allowed, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence as Seq


def closest(name: str, allowed: Seq[str]) -> str:
    """The tail of an error: what is allowed, and what was probably meant."""
    match = difflib.get_close_matches(name, allowed, n=1, cutoff=0.4)
    return f"allowed: {', '.join(allowed) or '(none)'}" + (f". Did you mean {match[0]!r}?" if match else "")
