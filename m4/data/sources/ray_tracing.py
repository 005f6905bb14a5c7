"""Solids in front of a camera, traced exactly: colour, depth, normals and the index of the object of each pixel."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

SIZES = {"small": 0.42, "large": 0.95}  # metres; with the camera's height this leaves size readable from one image
MIN_AREA = 32  # pixels of each object that are visible, in an image of 64 x 64
FAR = 25.0  # metres; ground farther away has unknown depth


# ---- Camera and objects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Where the camera is, and what it sees."""

    height: float
    """Height above the ground, metres."""
    pitch: float
    """Angle downwards, radians."""
    focal: float
    """Focal length, pixels."""
    size: int
    """Rows and columns of the image, pixels."""

    @functools.cached_property
    def rotation(self) -> np.ndarray:
        """[K C]: rows are the camera's axes (right, down, forward) in the world."""
        sin, cos = np.sin(self.pitch), np.cos(self.pitch)
        return np.array([[1, 0, 0], [0, -sin, -cos], [0, cos, -sin]], np.float32)

    @functools.cached_property
    def rays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x [1 W], y [H 1], z [H 1]: directions of length 1 along the optical axis: ray time is z-depth."""
        across = ((np.arange(self.size) + 0.5 - self.size / 2) / self.focal).astype(np.float32)
        right, down, forward = self.rotation
        along = forward[:, None] + down[:, None] * across
        return across[None, :], along[1][:, None], along[2][:, None]


@dataclass(frozen=True, kw_only=True)
class Solid:
    """One object, given in units of `radius` about the point (x, y, 0) on the ground, turned by `angle`."""

    attributes: dict[str, str]  # shape, colour, size, material
    albedo: np.ndarray  # [C]
    angle: float
    x: float = 0.0
    y: float = 0.0

    @property
    def shape(self) -> str:
        return self.attributes["shape"]

    @property
    def radius(self) -> float:
        return SIZES[self.attributes["size"]]


# (radius of the footprint, height), in units of a solid's `radius`
EXTENT = {"cube": (0.8 * 2**0.5, 1.6), "sphere": (1.0, 2.0), "cylinder": (0.66, 2.0), "cone": (0.92, 2.1)}


# ---- Ray casting ----------------------------------------------------------------------------------------------------


def _localise(solid: Solid, x, y, z, is_point: bool):
    """Expresses a world point or direction in the units and axes of a solid; keeps ray times unchanged."""
    if is_point:
        x, y = x - solid.x, y - solid.y
    cos, sin = np.float32(np.cos(solid.angle) / solid.radius), np.float32(np.sin(solid.angle) / solid.radius)
    return cos * x + sin * y, cos * y - sin * x, z * np.float32(1 / solid.radius)


def _quadric(a, b, c):
    """Both roots of a t^2 + 2 b t + c = 0, infinite where there are none."""
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    miss = np.where(discriminant > 0, np.float32(0), np.float32(np.inf))
    return (-b - root) / a + miss, (-b + root) / a + miss


def _intersect(solid: Solid, origin, direction) -> np.ndarray:
    """Ray times at which rays enter a solid, infinite for misses; origin and direction are broadcast (x, y, z)."""
    ox, oy, oz = _localise(solid, *origin, is_point=True)
    dx, dy, dz = _localise(solid, *direction, is_point=False)
    radius, height = EXTENT[solid.shape]
    if solid.shape == "sphere":
        oz = oz - 1
        a, b = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz
        time, _ = _quadric(a, b, ox * ox + oy * oy + oz * oz - 1)
    elif solid.shape == "cube":
        enter, leave = -np.inf, np.inf
        for o, d in ((ox, dx), (oy, dy), (oz - 0.8, dz)):
            centre, reach = -o / d, np.abs(0.8 / d)
            enter, leave = np.maximum(enter, centre - reach), np.minimum(leave, centre + reach)
        time = np.where(enter < leave, enter, np.inf)
    elif solid.shape == "cylinder":
        side, _ = _quadric(dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy - radius**2)
        side = np.where(np.abs(oz + side * dz - height / 2) <= height / 2, side, np.inf)
        top = (height - oz) / dz
        time = np.where((ox + top * dx) ** 2 + (oy + top * dy) ** 2 <= radius**2, np.minimum(side, top), side)
    else:  # a cone: the circle at height z has radius slope * (height - z)
        slope = radius / height
        ow, dw = slope * (height - oz), -slope * dz
        a, b = dx * dx + dy * dy - dw * dw, ox * dx + oy * dy - ow * dw
        time = np.inf
        for root in _quadric(a, b, ox * ox + oy * oy - ow * ow):
            inside = (np.abs(oz + root * dz - height / 2) <= height / 2) & (root > 0)
            time = np.minimum(time, np.where(inside, root, np.inf))
    return np.where(time > 0, time, np.inf)


def _normals(solid: Solid, x, y, z) -> np.ndarray:
    """World normals [C ...] at points on the surface of a solid."""
    x, y, z = _localise(solid, x, y, z, is_point=True)
    radius, height = EXTENT[solid.shape]
    if solid.shape == "sphere":
        normal = np.stack([x, y, z - 1])
    elif solid.shape == "cube":
        offset = np.stack([x, y, z - 0.8])
        face = np.abs(offset).argmax(0)
        normal = np.where(np.arange(3)[:, None] == face, np.sign(offset), 0)
    elif solid.shape == "cylinder":
        on_top = (height - z < 1e-3) & (np.hypot(x, y) < radius - 1e-3)
        normal = np.where(on_top, np.array([[0], [0], [1]]), np.stack([x, y, np.zeros_like(z)]))
    else:
        normal = np.stack([x, y, np.hypot(x, y) * radius / height])
    normal = normal / np.sqrt(np.einsum("c...,c...->...", normal, normal))
    cos, sin = np.cos(solid.angle), np.sin(solid.angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return np.einsum("dc,c...->d...", turn, normal).astype(np.float32)


def _window(camera: Camera, solid: Solid) -> tuple[slice, slice, float] | None:
    """Rows and columns that can see a solid, and the share of that window within the image; None if behind."""
    radius, height = (extent * solid.radius for extent in EXTENT[solid.shape])
    signs = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (0, 1)])
    corners = signs * [radius, radius, height] + [solid.x, solid.y, -camera.height]
    right, down, forward = np.einsum("kc,nc->kn", camera.rotation, corners)
    if forward.min() < 0.5:
        return None
    slices, share = [], 1.0
    for along in (down, right):
        pixels = along / forward * camera.focal + camera.size / 2
        start, stop = pixels.min(), pixels.max()
        inner_start, inner_stop = max(start, 0), min(stop, camera.size)
        if inner_start >= inner_stop:
            return None
        share *= (inner_stop - inner_start) / (stop - start)
        slices.append(slice(int(inner_start), int(np.ceil(inner_stop))))
    return slices[0], slices[1], share


def _trace(camera: Camera, solids: list[Solid]) -> tuple[np.ndarray, np.ndarray] | None:
    """Depth and instance maps [H W] (-1 sky, 0 ground, i + 1 solid i); None if any solid is hard to see."""
    x, y, z = camera.rays
    ground = np.where(z < 0, -camera.height / np.minimum(z, -1e-6), np.inf).astype(np.float32)
    depth = np.repeat(ground, camera.size, axis=1)
    instance = np.repeat(np.where(z < 0, 0, -1).astype(np.int32), camera.size, axis=1)
    silhouettes = []
    for i, solid in enumerate(solids):
        window = _window(camera, solid)
        if window is None or window[2] < 0.7:
            return None
        rows, columns, _ = window
        time = _intersect(solid, (0.0, 0.0, camera.height), (x[:, columns], y[rows], z[rows])).astype(np.float32)
        closer = time < depth[rows, columns]
        np.copyto(depth[rows, columns], time, where=closer)
        np.copyto(instance[rows, columns], i + 1, where=closer)
        silhouettes.append(np.isfinite(time).sum())
    visible = np.bincount(instance.ravel() + 1, minlength=len(solids) + 2)[2:]
    enough = MIN_AREA * (camera.size / 64) ** 2
    if any(v < enough or v < 0.4 * s for v, s in zip(visible, silhouettes, strict=True)):
        return None
    return depth, instance
