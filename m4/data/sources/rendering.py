"""Ray-cast scenes of simple solids: exactly aligned rgb, depth, normals, classes, boxes and captions.

A scene is a pure function of (variant, seed, split, index): solids on a ground plane, ray-cast with numpy. World axes
are x right, y forward, z up, with the camera above the origin; the camera's own axes (those of `normals`) are x right,
y down, z forward. `depth` is z-depth, measured along the optical axis.

Axes: H rows, W columns, C the three world axes or colour channels, K the three camera axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from m4.data.sources.ray_tracing import EXTENT, FAR, SIZES, Camera, Solid, _intersect, _normals, _trace
from m4.errors import check

VERSION = "1.0.0"  # of the scenes: raise it whenever the same arguments give other scenes

# Hues in degrees, far enough apart to be distinguished by pixels.
COLOURS = {"red": 0, "orange": 28, "yellow": 55, "green": 120, "cyan": 182, "blue": 228, "purple": 276, "pink": 326}
SHAPES = ("cube", "sphere", "cylinder", "cone")  # the classes of `semseg`, from 2 on
MATERIALS = ("matte", "metallic")
NAMES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "material": MATERIALS}
SPLITS = ("train", "validation", "test", "heldout")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a family of scenes may show."""

    colours: tuple[str, ...]
    """Names of colours."""
    shapes: tuple[str, ...]
    """Names of shapes."""
    materials: tuple[str, ...]
    """Names of materials."""
    max_objects: int
    """Objects of a scene, at most."""
    heldout: tuple[tuple[str, str], ...]
    """Pairs (colour, shape) that only the split heldout shows."""
    phrasings: bool
    """Many ways to describe a scene, with materials and relations; else a single plain one."""


# Ways to draw and caption scenes; a set of scenes names one. New ones go last: their index seeds the scenes.
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

# Single objects: those that "simple" shows in training; all others are held out.
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


def _sample_solids(variant: Variant, heldout: bool, rng: np.random.Generator) -> list[Solid]:
    """Draws 1 to max_objects attribute combinations; only the split heldout has a held-out one."""
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
    """Places the solids within view near `distance` without touching each other; None if they collide."""
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


def _shade(camera: Camera, solids: list[Solid], depth, instance, rng: np.random.Generator):
    """Colours [H W C] as uint8 and world normals [C H W], under one sun that casts shadows."""
    size = camera.size
    # The sun is behind the camera or beside it, since objects against the light show little of their colour.
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
        while True:  # the view alone is drawn again, so that scenes that are hard to place stay as frequent
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
            if solids is None or traced is None:
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
    """Describes everything in one of several ways: lists and relations from left to right, or from near to far."""
    adjectives = [("size", "material", "colour"), ("size", "colour", "material")][rng.integers(2)]
    phrases = ["a " + " ".join(o[word] for word in (*adjectives, "shape")) for o in objects]
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
