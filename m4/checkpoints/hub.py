"""The trained models in the package."""

from __future__ import annotations

from pathlib import Path

from m4.errors import closest


def packaged() -> dict[str, Path]:
    """The trained models in the package: name -> folder."""
    return {p.parent.name: p.parent for p in sorted((Path(__file__).parents[1] / "pretrained").glob("*/config.json"))}


def check_source(field: str, source: str) -> None:
    """ValueError unless a run folder, a model file or a packaged model has this name; "" names none."""
    if not Path(source or "?").exists() and source not in packaged():
        beside = [*sorted(str(p) for p in Path(source).parent.glob("*")), *packaged()]
        raise ValueError(f"{field}={source!r} is not there; {closest(source, beside)}")
