"""Ray-cast scenes of simple solids: exactly aligned rgb, depth, normals, classes, boxes and captions.

A scene is a pure function of (variant, seed, split, index): solids on a ground plane, ray-cast with numpy. World axes
are x right, y forward, z up, with the camera above the origin; the camera's own axes (those of `normals`) are x right,
y down, z forward. `depth` is z-depth, measured along the optical axis.

Axes: H rows, W columns, C the three world axes or colour channels, K the three camera axes.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from m4.components import closest

VERSION = "1.0.0"  # of the scenes: raise it whenever the same arguments give other scenes
# Hues in degrees, far enough apart to be told from pixels.
COLOURS = {"red": 0, "orange": 28, "yellow": 55, "green": 120, "cyan": 182, "blue": 228, "purple": 276, "pink": 326}
SHAPES = ("cube", "sphere", "cylinder", "cone")  # the classes of `semseg`, from 2 on
SIZES = {"small": 0.42, "large": 0.95}  # metres; with the camera's height this leaves size readable from one image
MATERIALS = ("matte", "metallic")
NAMES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "material": MATERIALS}
SPLITS = ("train", "validation", "test", "heldout")
MIN_AREA = 32  # pixels of each object that are visible, in an image of 64 x 64
FAR = 25.0  # metres; ground farther away has unknown depth


@dataclass(frozen=True, kw_only=True)
class Variant:
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    materials: tuple[str, ...]
    max_objects: int
    heldout: tuple[tuple[str, str], ...]  # (colour, shape) pairs that only the split heldout shows
    phrasings: bool  # many ways to say a scene, with materials and relations, or a single plain one


# Ways to draw and caption scenes; a set of scenes names one. New ones go last: their number seeds the scenes.
VARIANTS = {
    "simple": Variant(
        colours=("red", "yellow", "green", "cyan", "blue", "purple"),
        shapes=("cube", "sphere", "cylinder"),
        materials=("matte",),
        max_objects=3,
        heldout=(("red", "cube"), ("blue", "sphere"), ("green", "cylinder")),
        phrasings=False,
    ),
    "full": Variant(
        colours=tuple(COLOURS),
        shapes=SHAPES,
        materials=MATERIALS,
        max_objects=4,
        heldout=(("red", "cube"), ("blue", "sphere"), ("green", "cylinder"), ("orange", "cone"), ("pink", "cube")),
        phrasings=True,
    ),
}
# Single objects: those that "simple" shows in training, and held out all others.
_seen = VARIANTS["simple"]
VARIANTS["kinds"] = Variant(
    colours=tuple(COLOURS),
    shapes=SHAPES,
    materials=("matte",),
    max_objects=1,
    heldout=tuple(
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if colour not in _seen.colours or shape not in _seen.shapes or (colour, shape) in _seen.heldout
    ),
    phrasings=False,
)


def check(kind: str, given: str, allowed: Iterable[str]) -> None:
    """ValueError unless `given` is one of the allowed."""
    if given not in allowed:
        raise ValueError(f"unknown {kind} {given!r}; {closest(str(given), list(allowed))}")


# ---- What stands where ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Camera:
    height: float  # metres
    pitch: float  # radians, downwards
    focal: float  # pixels
    size: int  # pixels

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
    """One object, given in units of `radius` about the point (x, y, 0) on which it stands, turned by `angle`."""

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


def _sample_solids(variant: Variant, heldout: bool, rng: np.random.Generator) -> list[Solid]:
    """Draws 1 to max_objects attribute combinations; exactly the split heldout has a held-out one."""
    allowed = [(c, s) for c in variant.colours for s in variant.shapes if (c, s) not in variant.heldout]
    pairs = [allowed[rng.integers(len(allowed))] for _ in range(rng.integers(1, variant.max_objects + 1))]
    if heldout:
        pairs[rng.integers(len(pairs))] = variant.heldout[rng.integers(len(variant.heldout))]
    solids = []
    for colour, shape in pairs:
        hue = (COLOURS[colour] + rng.uniform(-4, 4)) / 60 % 6
        value, saturation = rng.uniform(0.85, 1.0), rng.uniform(0.72, 0.9)
        # Hexcone: a channel is at its peak within 60 degrees of its own hue, and falls to its floor over the next 60.
        apart = np.abs((hue - np.array([0, 2, 4]) + 3) % 6 - 3)
        albedo = (value * (1 - saturation * (1 - np.clip(2 - apart, 0, 1)))).astype(np.float32)
        size = list(SIZES)[rng.integers(len(SIZES))]
        material = variant.materials[rng.integers(len(variant.materials))]
        attributes = {"shape": shape, "colour": colour, "size": size, "material": material}
        solids.append(Solid(attributes=attributes, albedo=albedo, angle=rng.uniform(0, 2 * np.pi)))
    return solids


def _place(solids: list[Solid], camera: Camera, distance: float, rng: np.random.Generator) -> list[Solid] | None:
    """Stands the solids within view near `distance` without touching each other; None if they collide."""
    placed = []
    for solid in solids:
        y = distance * rng.uniform(0.75, 1.35)
        x = y * camera.size * rng.uniform(-0.42, 0.42) / camera.focal
        for other in placed:
            gap = EXTENT[solid.shape][0] * solid.radius + EXTENT[other.shape][0] * other.radius + 0.1
            if np.hypot(x - other.x, y - other.y) < gap:
                return None
        placed.append(replace(solid, x=x, y=y))
    return placed


# ---- Ray casting ----------------------------------------------------------------------------------------------------


def _localise(solid: Solid, x, y, z, is_point: bool):
    """Expresses a world point or direction in the units and axes of a solid; keeps ray times as they are."""
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


def _shade(camera: Camera, solids: list[Solid], depth, instance, rng: np.random.Generator):
    """Colours [H W C] as uint8 and world normals [C H W], under one sun that casts shadows."""
    size = camera.size
    # The sun stands behind the camera or beside it, since objects against the light show little of their colour.
    azimuth, elevation = np.pi + rng.uniform(-1.9, 1.9), rng.uniform(0.5, 1.25)
    level = np.cos(elevation)
    sun = np.array([level * np.sin(azimuth), level * np.cos(azimuth), np.sin(elevation)], np.float32)
    ambient, power = rng.uniform(0.38, 0.52), rng.uniform(0.5, 0.7)
    # Backgrounds stay below a saturation of 0.15, far from the objects', so that colours can be read off the pixels.
    brightness = np.array([rng.uniform(0.4, 0.8), rng.uniform(0.6, 0.95), rng.uniform(0.6, 0.95)])[:, None]
    ground, horizon, zenith = (brightness * (1 - rng.uniform(0, 0.13, (3, 3)))).astype(np.float32)

    seen = instance >= 0
    distance = np.where(seen, depth, 1).astype(np.float32)
    px, py, pz = (distance * ray for ray in camera.rays)
    pz = pz + np.float32(camera.height)
    normals = np.zeros((3, size, size), np.float32)
    normals[2] = seen
    for i, solid in enumerate(solids):
        where = np.nonzero(instance == i + 1)
        normals[:, where[0], where[1]] = _normals(solid, px[where], py[where], pz[where])

    lambert = np.maximum(np.einsum("chw,c->hw", normals, sun), 0)
    for i, solid in enumerate(solids):  # solids are convex: none casts a shadow on its own lit side
        radius, height = (extent * solid.radius for extent in EXTENT[solid.shape])
        vx, vy, vz = solid.x - px, solid.y - py, height / 2 - pz
        along = vx * sun[0] + vy * sun[1] + vz * sun[2]
        near = vx * vx + vy * vy + vz * vz - along * along < radius**2 + height**2 / 4
        where = np.nonzero(near & (lambert > 0) & (instance != i + 1))
        time = _intersect(solid, (px[where], py[where], pz[where]), sun)
        lambert[where] *= ~np.isfinite(time)

    is_metallic = np.array([False, *(solid.attributes["material"] == "metallic" for solid in solids)])
    metallic = is_metallic[np.maximum(instance, 0)]
    contrast = np.where(metallic, np.float32(1.25), np.float32(1))
    light = ambient * (0.75 + 0.25 * normals[2]) / contrast**2 + power * lambert * contrast
    palette = np.stack([ground, *(solid.albedo for solid in solids)]).astype(np.float32)
    colour = palette.T[:, np.maximum(instance, 0)] * np.minimum(light, 1)  # no channel clips: hues stay exact
    rows, columns = np.nonzero(metallic)
    view = -np.stack([np.broadcast_to(ray, (size, size))[rows, columns] for ray in camera.rays])
    view /= np.sqrt(np.einsum("cp,cp->p", view, view))
    facing = normals[:, rows, columns]
    half = view + sun[:, None]
    half /= np.sqrt(np.einsum("cp,cp->p", half, half))
    highlight = (lambert[rows, columns] > 0) * np.maximum(np.einsum("cp,cp->p", half, facing), 0) ** 40
    mirrored = 2 * np.einsum("cp,cp->p", view, facing) * facing[2] - view[2]  # upwards where metal mirrors the sky
    gloss = 0.6 * highlight + 0.25 * np.clip(2 * mirrored, 0, 1)
    colour[:, rows, columns] += gloss * (1 - colour[:, rows, columns])
    # Ground fades into the horizon, and the sky from there into its zenith.
    haze = (instance == 0) * (1 - np.exp(distance * np.float32(-1 / 30)))
    colour += haze * (horizon[:, None, None] - colour)
    sky = horizon[:, None, None] + np.clip(camera.rays[2], 0, 1) * (zenith - horizon)[:, None, None]
    colour = np.where(seen, colour, sky)
    return np.ascontiguousarray((colour * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)), normals


def scene(variant: str, seed: int, split: str, index: int, size: int = 64) -> dict:
    """One raw example, the same for the same arguments.

    rgb uint8 [H W C]; depth float32 [H W] metres, 0 where unknown; normals float32 [H W K], unit or zero where unknown;
    semseg int32 [H W], 0 sky, 1 ground, 2.. SHAPES; instance int32 [H W], 0 none, i + 1 the i-th object;
    objects: attributes from left to right; boxes: tight around visible pixels, in the same order; caption.
    """
    check("variant", variant, VARIANTS)
    check("split", split, SPLITS)
    rng = np.random.default_rng([seed, list(VARIANTS).index(variant), SPLITS.index(split), index])
    rules = VARIANTS[variant]
    wanted = _sample_solids(rules, split == "heldout", rng)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        while True:  # the contents stay, only the view is drawn again, so that hard scenes are as frequent as drawn
            distance = np.exp(rng.uniform(np.log(3.6), np.log(9.0)))
            height = rng.uniform(2.0, 3.2)
            camera = Camera(
                height=height,
                pitch=np.arctan2(height - 0.6, distance) + rng.uniform(-0.1, 0.1),
                focal=size * rng.uniform(1.0, 1.4),
                size=size,
            )
            solids = _place(wanted, camera, distance, rng)
            traced = _trace(camera, solids) if solids else None
            if traced is None:
                continue
            depth, instance = traced
            boxes = np.stack([_tight_box(instance == i + 1) for i in range(len(solids))])
            centres = boxes[:, 1] + boxes[:, 3]
            order = np.argsort(centres)
            if len(solids) == 1 or np.diff(centres[order]).min() > 0.08:  # left and right must be plain to see
                break
        solids = [solids[i] for i in order]
        instance = np.concatenate([[0], np.argsort(order) + 1, [-1]]).astype(np.int32)[instance]
        rgb, normals = _shade(camera, solids, depth, instance, rng)
    known = (instance >= 0) & (depth < FAR)
    classes = np.array([1, *(2 + SHAPES.index(solid.shape) for solid in solids), 0], np.int32)
    objects = [solid.attributes for solid in solids]
    return {
        "rgb": rgb,
        "depth": np.where(known, np.round(depth * 1000), 0).astype(np.float32) / np.float32(1000),
        "normals": np.einsum("kc,chw->hwk", camera.rotation, normals * known),
        "semseg": classes[instance],
        "instance": np.maximum(instance, 0),
        "boxes": {"bbox": boxes[order], "label": [solid.shape for solid in solids]},
        "objects": objects,
        "caption": _phrase(objects, [solid.y for solid in solids], rng) if rules.phrasings else _list(objects),
    }


def _tight_box(mask: np.ndarray) -> np.ndarray:
    box = []
    for axis in (1, 0):
        inside = np.nonzero(mask.any(axis))[0]
        box += [inside[0] / mask.shape[1 - axis], (inside[-1] + 1) / mask.shape[1 - axis]]
    return np.array(box, np.float32)[[0, 2, 1, 3]]


# ---- Captions -------------------------------------------------------------------------------------------------------


def _join(phrases: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def _list(objects: list[dict[str, str]]) -> str:
    return _join([f"a {o['size']} {o['colour']} {o['shape']}" for o in objects])


def _phrase(objects: list[dict[str, str]], depths: list[float], rng: np.random.Generator) -> str:
    """Says everything in one of several ways: lists and relations from left to right, or from near to far."""
    words = [("size", "material", "colour"), ("size", "colour", "material")][rng.integers(2)]
    phrases = ["a " + " ".join(o[word] for word in (*words, "shape")) for o in objects]
    nearest_first = [phrases[i] for i in np.argsort(depths)]
    sayings = [_join(phrases), f"there is {_join(phrases)}"]
    if len(phrases) > 1:
        sayings += [
            f"from left to right: {_join(phrases)}",
            f"from near to far: {_join(nearest_first)}",
            ", which is left of ".join(phrases),
            ", which is in front of ".join(nearest_first),
        ]
    return sayings[rng.integers(len(sayings))]
