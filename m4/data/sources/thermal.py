"""Scenes as a thermal camera sees them too: a modality with a structure of its own, for fine-tuning.

apparent temperature = AIR + heat of the object x exp(-distance / HAZE)         heat: by material and size

Axes: H rows, W columns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from m4.data.sources.rendering import SPLITS
from m4.data.sources.scenes import Scenes, SceneSplit
from m4.errors import check

AIR, HAZE = 10.0, 15.0  # degrees Celsius; metres after which a share of 1 / e is left
GROUND_HEAT = 8.0  # degrees Celsius above AIR, right before the camera
HEAT = {("matte", "small"): 20.0, ("matte", "large"): 35.0, ("metallic", "small"): 50.0, ("metallic", "large"): 65.0}


def thermal(
    depth: Float[np.ndarray, "H W"], instance: Int[np.ndarray, "H W"], objects: Sequence[Mapping[str, str]]
) -> Float[np.ndarray, "H W"]:
    """Apparent temperature in degrees Celsius, float32; AIR where depth is unknown (0)."""
    heat = np.array([GROUND_HEAT, *(HEAT[o["material"], o["size"]] for o in objects)], np.float32)
    return np.where(depth > 0, AIR + heat[instance] * np.exp(-depth / HAZE), AIR).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ThermalScenes(Scenes):
    """The scenes of the same recipe, with "thermal", in the same folder: `thermal` is computed from the rest."""

    def split(self, name: str, data_dir: str | os.PathLike) -> "ThermalSplit":
        check("split", name, SPLITS)
        return ThermalSplit(folder=self.folder(data_dir), name=name)


class ThermalSplit(SceneSplit):
    """Raw examples of `Scenes`, each with thermal float32 [H W] degrees Celsius."""

    def decode(self, stored: dict) -> dict:
        example = super().decode(stored)
        return {**example, "thermal": thermal(example["depth"], example["instance"], example["objects"])}
