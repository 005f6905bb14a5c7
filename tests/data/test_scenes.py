"""Scenes are reproducible, aligned and held out as promised, and the rules that read them read them right.

Axes: S scenes, H rows, W columns, P points, C the three camera axes.
"""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from m4.data.sources import rendering
from m4.data.sources.ray_tracing import SIZES
from m4.data.sources.rendering import SHAPES, VARIANTS, scene
from m4.data.sources.scene_rules import (
    ATTRIBUTES,
    attribute_counts,
    micro_f1,
    parse_caption,
    read_colours,
    segment_objects,
)
from m4.data.sources.scenes import Scenes

SMALL = {"num_train": 300, "num_validation": 3, "num_test": 3, "num_heldout": 3}  # train is enough for two processes


@pytest.fixture(scope="module")
def renders() -> dict[str, list[dict]]:
    return {variant: [scene(variant, 0, "test", i) for i in range(300)] for variant in VARIANTS}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Scenes, Path]:
    data_dir = tmp_path_factory.mktemp("scenes")
    source = Scenes(variant="full", **SMALL)
    source.prepare(data_dir)
    return source, data_dir


def assert_same(left, right, exact: bool = True):
    """Equal examples; the stored normals alone are rounded."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[name])
        elif name == "normals" and not exact:
            np.testing.assert_allclose(value, right[name], atol=0.01)
        elif isinstance(value, np.ndarray):
            assert value.dtype == right[name].dtype
            np.testing.assert_array_equal(value, right[name], err_msg=name)
        else:
            assert value == right[name], name


def points(example: dict) -> np.ndarray:
    """Unprojects depth to [H W C]. The focal length comes from the ground: 1 / depth is affine in the row, and the
    slope against the offset at the optical axis tells it, given the ground's normal."""
    size = example["depth"].shape[0]
    ground = (example["semseg"] == 1) & (example["depth"] > 0)
    rows, columns = np.nonzero(ground)
    slope, offset = np.polyfit(rows + 0.5 - size / 2, 1 / example["depth"][ground].astype(np.float64), 1)
    normal = example["normals"][rows[0], columns[0]]
    focal = normal[1] / normal[2] * offset / slope
    across = (np.arange(size) + 0.5 - size / 2) / focal
    rays = np.stack([*np.meshgrid(across, across), np.ones((size, size))], axis=-1)
    return example["depth"][..., None] * rays


def multiset(objects) -> list:
    return sorted(sorted(thing.items()) for thing in objects)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scene_is_a_function_of_its_arguments(variant):
    """The same arguments give the same scene whatever was drawn before; each argument matters."""
    first = scene(variant, 3, "train", 5)
    others = [scene(variant, 4, "train", 5), scene(variant, 3, "test", 5), scene(variant, 3, "train", 6)]
    assert_same(first, scene(variant, 3, "train", 5))
    assert all((first["rgb"] != other["rgb"]).any() for other in others)


def test_builds_are_byte_identical(built, tmp_path, monkeypatch):
    """One process and several write the same bytes, into the same file names."""
    source, data_dir = built
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    source.prepare(tmp_path)
    folders = [source.folder(path) for path in (data_dir, tmp_path)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert sum("array_record" in name for name in files[0]) == 4
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


def test_read_back_in_order(built):
    """A split holds the scenes of its indices in order, also after a trip through pickle."""
    source, data_dir = built
    for name in source.splits:
        split = source.split(name, data_dir)
        count = getattr(source, f"num_{name}")
        assert len(split) == count
        for i in (0, 1, count - 1):
            assert_same(scene("full", 0, name, i), split[i], exact=False)
        assert_same(split[-1], pickle.loads(pickle.dumps(split))[count - 1])
        with pytest.raises(IndexError, match=str(count)):
            split[count]


@pytest.mark.parametrize("variant", VARIANTS)
def test_annotations_are_aligned(renders, variant):
    """Boxes touch visible pixels on all sides, classes follow instances, depth and normals are known together."""
    for example in renders[variant]:
        instance, depth, semseg = example["instance"], example["depth"], example["semseg"]
        assert instance.max() == len(example["objects"]) == len(example["boxes"]["label"])
        centres = []
        for i, thing in enumerate(example["objects"]):
            rows, columns = np.nonzero(instance == i + 1)
            tight = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            np.testing.assert_array_equal(example["boxes"]["bbox"][i] * 64, tight)
            assert example["boxes"]["label"][i] == thing["shape"]
            assert (semseg[instance == i + 1] == 2 + SHAPES.index(thing["shape"])).all()
            assert len(rows) >= 25
            centres.append(tight[1] + tight[3])
        assert centres == sorted(centres)
        assert ((semseg >= 2) == (instance > 0)).all()
        assert np.isfinite(depth).all() and (depth[semseg == 0] == 0).all() and (depth[instance > 0] > 0).all()
        assert depth[depth > 0].min() > 1 and depth.max() <= 25
        lengths = np.linalg.norm(example["normals"], axis=-1)
        np.testing.assert_allclose(lengths, depth > 0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_normals_agree_with_depth(renders, variant):
    """Points minus radius times normal are the centre of a sphere; faces of cubes are planes across their normals."""
    num_spheres = num_faces = 0
    for example in renders[variant][:100]:
        position, normals = points(example), example["normals"].astype(np.float64)
        for i, thing in enumerate(example["objects"]):
            mask = example["instance"] == i + 1
            if thing["shape"] == "sphere":
                centre = position[mask] - SIZES[thing["size"]] * normals[mask]
                assert np.ptp(centre, axis=0).max() < 0.02
                num_spheres += 1
            if thing["shape"] == "cube":
                faces, of = np.unique(np.round(normals[mask], 3), axis=0, return_inverse=True)
                assert len(faces) <= 3
                for j, face in enumerate(faces):
                    height = np.einsum("pc,c->p", position[mask][of == j], face)
                    assert np.ptp(height) < 0.02
                    num_faces += 1
        seen = example["depth"] > 0
        away = np.einsum("pc,pc->p", position[seen], normals[seen]) > 1e-3
        assert away.sum() <= 1  # surfaces face the camera, but for a pixel on the rim of some cylinders
    assert num_spheres > 20 and num_faces > 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_held_out_combinations(variant):
    """Every held-out scene shows one of the listed combinations, all are shown, and no other split shows any."""
    kept = set(VARIANTS[variant].heldout)

    def combinations(split):
        return [
            {(thing["colour"], thing["shape"]) for thing in scene(variant, 0, split, i)["objects"]} for i in range(150)
        ]

    heldout = combinations("heldout")
    assert all(found & kept for found in heldout) and set.union(*heldout) >= kept
    train = set.union(*combinations("train"))
    assert not train & kept
    everything = {(colour, shape) for colour in VARIANTS[variant].colours for shape in VARIANTS[variant].shapes}
    assert train == everything - kept
    assert not set.union(*combinations("validation"), *combinations("test")) & kept


@pytest.mark.parametrize("variant", VARIANTS)
def test_captions_parse_back(renders, variant):
    """A caption names exactly the objects and attributes of its scene; the plain one also in their order."""
    for example in renders[variant]:
        names = ("shape", *ATTRIBUTES[variant])
        truth = [{name: thing[name] for name in names} for thing in example["objects"]]
        parsed = parse_caption(example["caption"])
        assert multiset(parsed) == multiset(truth)
        assert variant == "full" or parsed == truth
        full = sum(len(thing) - 1 for thing in truth)
        assert attribute_counts(example["caption"], example["objects"], ATTRIBUTES[variant]) == (full, full, full)


def test_plain_caption():
    """The wording that configs and documentation rely on."""
    objects = [
        {"size": size, "colour": colour, "shape": shape}
        for size, colour, shape in (("small", "red", "cube"), ("large", "blue", "sphere"), ("small", "green", "cone"))
    ]
    assert rendering._list(objects) == "a small red cube, a large blue sphere and a small green cone"
    assert rendering._list(objects[:2]) == "a small red cube and a large blue sphere"
    assert rendering._list(objects[:1]) == "a small red cube"


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("", []),
        ("red red , and and small", []),
        ("\x00[S_1] ??? CUBE!", [{"shape": "cube"}]),
        ("a red dog and a blue cube", [{"shape": "cube", "colour": "blue"}]),
        ("cube sphere", [{"shape": "cube"}, {"shape": "sphere"}]),
        ("a small, red cube of large", [{"shape": "cube", "colour": "red"}]),
    ],
)
def test_parsing_survives_generated_text(text, objects):
    """Junk is ignored, and attributes do not leak from one phrase to the next."""
    assert parse_caption(text) == objects


def test_attribute_counts_match_the_best_way():
    """Objects of one shape are matched for agreement rather than in order; the rest are misses and false alarms."""
    truth = "a small red cube and a large blue cube"
    assert attribute_counts("a large blue cube and a small red cube", truth) == (4, 4, 4)
    assert attribute_counts("a large green cube", truth) == (1, 2, 4)
    assert attribute_counts("a small red sphere", truth) == (0, 2, 4)
    assert attribute_counts("a small metallic red cube", truth) == (2, 2, 4)
    assert attribute_counts("", truth) == (0, 0, 4)
    assert micro_f1([(3, 3, 6), (0, 1, 0)]) == pytest.approx(0.6)
    assert micro_f1([]) == 0


@pytest.mark.parametrize(("variant", "colour_f1", "overlap"), [("simple", 0.99, 0.98), ("full", 0.97, 0.95)])
def test_pixels_are_read_right(renders, variant, colour_f1, overlap):
    """On true renders the rules find the colours and the foreground, with all eight colours to choose from."""
    counts, overlaps = [], []
    for example in renders[variant]:
        found, truth = read_colours(example["rgb"]), {thing["colour"] for thing in example["objects"]}
        counts.append((len(found & truth), len(found), len(truth)))
        mask, true_mask = segment_objects(example["rgb"]), example["instance"] > 0
        overlaps.append((mask & true_mask).sum() / (mask | true_mask).sum())
    assert micro_f1(counts) >= colour_f1
    assert np.mean(overlaps) >= overlap


def test_pixel_rules_find_nothing_in_a_mean_image(renders):
    """An average of many scenes, what a model that knows nothing would paint, holds no colours and no objects."""
    mean = np.mean([example["rgb"] for example in renders["simple"]], axis=0).astype(np.uint8)
    assert read_colours(mean) == set()
    assert not segment_objects(mean).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_constant_depth_is_a_weak_predictor(renders, variant):
    """Neither the mean depth map nor the best constant says how far objects are."""
    depth = np.stack([example["depth"] for example in renders[variant]])
    objects = np.stack([example["instance"] > 0 for example in renders[variant]])
    mean = depth.sum(0) / np.maximum((depth > 0).sum(0), 1)
    middle = np.exp(np.log(depth[objects]).mean())
    for constant in (np.maximum(mean, 1e-3), np.full_like(mean, middle)):
        ratio = np.maximum(depth / constant, constant / np.maximum(depth, 1e-3))
        assert (ratio < 1.25)[objects].mean() < 0.8


def test_errors_name_what_is_wrong(tmp_path):
    """Unknown names come with the choices and the closest one; an unprepared source says what to call."""
    with pytest.raises(ValueError, match="'simpel'.*simple, full.*'simple'"):
        Scenes(variant="simpel")
    with pytest.raises(ValueError, match="num_test is 0"):
        Scenes(num_test=0)
    with pytest.raises(ValueError, match="'val'.*train, validation, test, heldout.*'validation'"):
        Scenes().split("val", tmp_path)
    with pytest.raises(ValueError, match="prepare"):
        len(Scenes().split("train", tmp_path))


def test_recipes_do_not_share_folders(tmp_path):
    """Every field of the recipe is part of the folder's name."""
    recipes = [Scenes(), Scenes(variant="full"), Scenes(seed=1), Scenes(size=32)]
    recipes += [Scenes(**{f"num_{split}": 7}) for split in Scenes.splits]
    assert len({recipe.folder(tmp_path) for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_shards_are_named(tmp_path, damage):
    """A shard that is cut short, altered or gone raises an error that names the file."""
    source = Scenes(**{**SMALL, "num_train": 40})
    source.prepare(tmp_path)
    (shard,) = source.folder(tmp_path).glob("*train.array_record*")
    content = bytearray(shard.read_bytes())
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(content[: len(content) * 2 // 3])
    if damage == "flipped":
        content[20_000] ^= 255
        shard.write_bytes(content)
    split = source.split("train", tmp_path)
    with pytest.raises(ValueError, match=shard.name):
        for i in range(len(split)):
            split[i]


def test_a_killed_build_leaves_neither_data_nor_processes(tmp_path):
    """After kill -9 in mid-build the folder is absent, and the workers end."""
    recipe = "Scenes(num_train=100_000, num_validation=1, num_test=1, num_heldout=1)"
    script = tmp_path / "build.py"
    script.write_text(
        "from m4.data.sources.scenes import Scenes\n"
        f"if __name__ == '__main__':\n    {recipe}.prepare({str(tmp_path)!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(rendering.__file__).parents[3])}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    build = psutil.Popen([sys.executable, script], env=environment, **silent)
    deadline = time.monotonic() + 20
    while len(workers := build.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert build.is_running() and workers
    build.kill()
    build.wait()
    assert psutil.wait_procs(workers, timeout=5)[1] == []
    folder = Scenes(num_train=100_000, num_validation=1, num_test=1, num_heldout=1).folder(tmp_path)
    assert folder.parent.exists() and not folder.exists()
