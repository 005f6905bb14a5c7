"""How 4M's demo generates: its order of targets, schemes, steps, temperatures and guidance, as stages of a plan.

    from RGB            an image is given: one step for each grid, nearly greedy
    to RGB              no image is given: many steps, warm
    super-resolution    224 -> 448 pixels, by a second model: MaskGIT in 8 steps

Facts: the demo sampler of ml-4m (Bachmann et al. 2024), whose function these stages compute.
"""

from __future__ import annotations

from collections.abc import Iterable

from m4.inference.autoregressive import Autoregressive
from m4.inference.guidance import Guidance
from m4.inference.parallel import ROAR, MaskGIT
from m4.inference.scheme import Stage
from m4.tokens.modality import Modalities

TOP_P = 0.8
PIXELS = ("rgb@224", "tok_rgb@224")  # either makes a plan one "from RGB"


def _grid(target: str, scale: float, **fields) -> Stage:
    guidance = Guidance(scale=scale, grow=True, dropped_sequences="masked")
    return Stage(target=target, scheme=ROAR(**fields, top_p=TOP_P), guidance=guidance)


def _cooling(target: str, steps: int, temperature: float, scale: float) -> Stage:
    cooling = {"temperature_schedule": "power", "final_temperature": 0.5, "temperature_power": 0.5}
    return _grid(target, scale, steps=steps, temperature=temperature, **cooling)


def _text(target: str, temperature: float, max_length: int) -> Stage:
    return Stage(target=target, scheme=Autoregressive(temperature=temperature, top_p=TOP_P, max_length=max_length))


def _sharpened(target: str) -> Stage:
    scheme = MaskGIT(steps=8, schedule="cosine", temperature=1.0, top_p=TOP_P)
    return Stage(target=target, scheme=scheme, guidance=Guidance(scale=2.0, grow=True, dropped_sequences="masked"))


TEXTS = (
    _text("caption", 0.3, 255), _text("det", 0.3, 255), _text("human_poses", 0.1, 274),
    _text("sam_instance", 0.01, 255), _text("color_palette", 0.1, 22), _text("metadata", 0.1, 39),
)  # fmt: skip
GRIDS = (
    *("tok_clip@224", "tok_dinov2@224", "tok_imagebind@224", "tok_depth@224", "tok_normal@224", "tok_semseg@224"),
    *("tok_canny_edge@224", "tok_sam_edge@224"),
)
FROM_RGB = (*(_grid(name, 2.0, steps=1, temperature=0.01) for name in GRIDS), *TEXTS)
TO_RGB = (
    _cooling("tok_clip@224", 50, 5.0, 3.0),
    *(_grid(name, 2.0, steps=8, temperature=0.01) for name in ("tok_dinov2@224", "tok_imagebind@224")),
    *(_cooling(name, 8, 3.0, 2.0) for name in GRIDS[3:]),
    _cooling("tok_rgb@224", 25, 3.0, 2.0),
    *TEXTS,
)
SUPER_RESOLUTION = tuple(_sharpened(f"tok_{name}@448") for name in ("clip", "depth", "normal", "semseg", "rgb"))


def plan(modalities: Modalities, given: Iterable[str]) -> tuple[Stage, ...]:
    """The demo's stages for what a model of 4M's modalities predicts and is not given (names of signals or modalities).

    RGB tokens are left out where pixels are given, and the global vectors always. ValueError for unknown names.
    """
    names = {modalities.as_input(name.partition("#")[0]).name for name in given}
    signals = {modalities.named(name).signal for name in names}
    from_pixels = not names.isdisjoint(PIXELS)
    targets = {m.name for m in modalities if m.is_target and m.name not in names and m.signal not in signals}
    return tuple(stage for stage in (FROM_RGB if from_pixels else TO_RGB) if stage.target in targets)


def super_resolution(modalities: Modalities, generated: Iterable[str]) -> tuple[Stage, ...]:
    """The demo's stages of a second model at 448 x 448 pixels, for those grids of 224 x 224 that are there."""
    known = {name.removesuffix("@224") for name in generated}
    targets = {m.name for m in modalities if m.is_target}
    return tuple(s for s in SUPER_RESOLUTION if s.target in targets and s.target.removesuffix("@448") in known)
