"""The trained models in the package."""

from __future__ import annotations

from pathlib import Path


def packaged() -> dict[str, Path]:
    """The trained models in the package: name -> folder."""
    return {p.parent.name: p.parent for p in sorted((Path(__file__).parents[1] / "pretrained").glob("*/config.json"))}
