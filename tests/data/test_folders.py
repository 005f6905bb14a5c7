"""Files in folders become aligned examples: every kind as promised, everything else refused by name and reason.

Axes: H rows, W columns.
"""

import io
import json
import os
import pickle
import shutil
import socket
import struct
import tracemalloc
import unicodedata
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m4.data.sources.files import decode
from m4.data.sources.folders import Folders
from m4.data.sources.pictures import MAX_PIXELS
from m4.registry import from_json, to_json


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


def picture(array_or_image, kind="png", **options) -> bytes:
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


def write(root, files: dict[str, bytes]):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def samples(num: int = 40, tokens: bool = True) -> dict[str, bytes]:
    """Files of `num` aligned examples, by path under a root; also what the tests of tars are made of."""
    files = {}
    for i in range(num):
        id = f"part{i % 3}/{i:03d}.x"  # ids may have dots and subfolders
        files[f"rgb/{id}.png"] = picture(np.full((4, 6, 3), i, np.uint8))
        files[f"depth/{id}.npy"] = npy(np.full((4, 6), i / 10, np.float32))
        files[f"caption/{id}.txt"] = f"number {i}".encode()
        files[f"boxes/{id}.json"] = json.dumps([{"bbox": [0, 0, 0.5, i / 64], "label": str(i)}]).encode()
        if tokens:
            files[f"tok/{id}.npy"] = npy(np.arange(5, dtype=np.int16) + i)
    return files


def everything(source, data_dir="unused") -> list[dict]:
    return [e for split in ("train", "validation", "test") for e in source.split(split, data_dir)]


def assert_same(left: dict, right: dict):
    assert left.keys() == right.keys()
    for name in left.keys() - {"file"}:
        np.testing.assert_equal(left[name], right[name], err_msg=name)


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_pictures_of_any_mode_become_rgb():
    rgb, grey = noise(5, 7, 3), noise(5, 7)
    same = np.repeat(grey[..., None], 3, axis=-1)
    transparent = np.dstack([rgb, np.where(grey < 128, 0, 255).astype(np.uint8)])
    on_white = np.where(grey[..., None] < 128, 255, rgb)
    palette = Image.fromarray(grey % 2, "L")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    coloured = np.array([[10, 20, 30], [200, 100, 0]], np.uint8)[grey % 2]
    cases = {
        "rgb.png": (picture(rgb), rgb),
        "upper.PNG": (picture(rgb), rgb),
        "lossless.webp": (picture(rgb, "webp", lossless=True), rgb),
        "grey.png": (picture(grey), same),
        "bit.png": (picture(Image.fromarray(grey).point(lambda v: 255 * (v > 99), "1")), np.where(same > 99, 255, 0)),
        "rgba.png": (picture(transparent), on_white),
        "la.png": (picture(transparent[..., [0, 3]]), on_white[..., [0, 0, 0]]),
        "palette.png": (picture(palette), coloured),
        "clear.png": (picture(palette, transparency=b"\x00\xff"), np.where(grey[..., None] % 2, coloured, 255)),
        "deep.png": (picture(grey.astype(np.uint16) * 256 + 77), same),
        "tokens.npy": (npy(rgb), rgb),
    }
    for file, (data, expected) in cases.items():
        decoded = decode("rgb", file, data)
        assert decoded.dtype == np.uint8, file
        np.testing.assert_array_equal(decoded, expected, err_msg=file)
    cmyk = Image.new("CMYK", (16, 8), (0, 255, 255, 0))  # red
    red = decode("rgb", "cmyk.jpg", picture(cmyk, "jpeg"))
    assert red.shape == (8, 16, 3) and abs(red.mean((0, 1)) - [254, 0, 0]).max() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # PIL says so, and the picture is read
def test_exif_rotation_is_applied_and_damaged_exif_does_not_cost_the_picture():
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 16:] = 255  # white on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    upright = decode("rgb", "turned.jpeg", picture(wide, "jpeg", exif=exif))
    assert upright.shape == (32, 16, 3) and upright[:12].max() < 50 and upright[-12:].min() > 200
    damaged = picture(wide, "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    assert decode("rgb", "damaged.jpg", damaged).shape == wide.shape


def test_depth_normals_and_maps():
    millimetres = np.array([[0, 1, 1500], [65535, 2000, 3]], np.uint16)
    with pytest.warns(UserWarning, match="65535 in depth of 16 bits"):
        depth = decode("depth", "d.png", picture(millimetres))
    assert depth.dtype == np.float32
    known = np.where(millimetres == 65535, 0, millimetres / 1000)  # saturated: unknown
    np.testing.assert_allclose(depth, known, rtol=1e-6)
    big_endian = decode("depth", "d.npy", npy(known.astype(">f8")))
    assert big_endian.dtype == np.float32 and big_endian.flags.writeable
    np.testing.assert_allclose(big_endian, depth, rtol=1e-6)
    vectors = np.random.default_rng(1).normal(size=(5, 7, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    colours = np.round((vectors + 1) * 127.5).astype(np.uint8)
    colours[0, 0], colours[0, 1] = 0, 128  # black and grey: unknown
    for file, data, tolerance in (("n.png", picture(colours), 0.02), ("n.npy", npy(vectors), 1e-6)):
        normals = decode("normals", file, data)
        assert normals.dtype == np.float32 and normals.shape == (5, 7, 3)
        np.testing.assert_allclose(normals[1:], vectors[1:], atol=tolerance)
        np.testing.assert_allclose(np.linalg.norm(normals[1:], axis=-1), 1, atol=1e-6)
    assert not decode("normals", "n.png", picture(colours))[0, :2].any()
    palette = Image.fromarray(noise(5, 7) % 3, "L")
    palette.putpalette([9, 9, 9] * 3)
    for signal in ("semseg", "instance"):
        for file, data in {"m.png": picture(palette), "m.npy": npy((noise(5, 7) % 3).astype(np.int64))}.items():
            classes = decode(signal, file, data)
            assert classes.dtype == np.int32
            np.testing.assert_array_equal(classes, noise(5, 7) % 3)
    np.testing.assert_array_equal(decode("semseg", "m.png", picture(millimetres)), millimetres)


def bits(depth: int, colour: int, channels: int) -> bytes:
    """A png of 4 x 2 pixels of so many bits a channel."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    rows = (b"\0" + bytes(range(4 * channels * depth // 8))) * 2
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 2, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_numbers_are_as_stored_or_refused():
    """What PIL stretches, inverts, halves or drops is no class and no number of a map; as an image it is fine."""
    deep = picture(noise(5, 7, dtype=np.uint16))
    for kind in ("classes", "map", ""):
        np.testing.assert_array_equal(decode("x", "a.png", deep, kind), noise(5, 7, dtype=np.uint16))
    high_first = picture(Image.frombytes("I;16B", (7, 5), noise(5, 7, dtype=np.uint16).byteswap().tobytes()), "tiff")
    numbers = decode("x", "a.tif", high_first, "map")
    assert numbers.dtype.isnative and (numbers == noise(5, 7, dtype=np.uint16)).all()
    inverted = picture(noise(5, 7), "tiff", tiffinfo={262: 0})
    signed = picture(noise(5, 7), "tiff", tiffinfo={339: 2})
    spare = picture(Image.fromarray(noise(5, 7, 3)).convert("RGBX"), "tiff")
    cases = {
        "L;2": bits(2, 0, 1), "L;4": bits(4, 0, 1), "RGB;16B": bits(16, 2, 3), "LA;16B": bits(16, 4, 2),
        "RGBA;16B": bits(16, 6, 4), "L;I": inverted, "8 bits with a sign": signed, "RGBX": spare,
    }  # fmt: skip
    for how, data in cases.items():
        file = "a.png" if data.startswith(b"\x89") else "a.tif"
        assert decode("rgb", file, data).dtype == np.uint8
        for kind in ("classes", "instances", "map", *[""] * (file == "a.png")):
            with pytest.raises(ValueError, match=f"{file}: its pixels are stored as {how}"):
                decode("x", file, data, kind)


def test_texts_boxes_tokens_and_other_signals():
    assert decode("caption", "c.txt", "\ufeff  Ein Würfel \n".encode()) == "Ein Würfel"
    assert decode("caption", "c.json", b'"a cube"') == "a cube"
    assert decode("caption", "c.json", b'["first ", "second"]') == "first"
    boxes = decode("boxes", "b.json", b'[{"bbox": [0, 0.25, 1, 0.5], "label": "cube"}]')
    assert boxes["label"] == ["cube"] and boxes["bbox"].dtype == np.float32
    np.testing.assert_array_equal(boxes["bbox"], [[0, 0.25, 1, 0.5]])
    assert decode("boxes", "b.json", b"[]")["bbox"].shape == (0, 4)
    for signal in ("rgb", "depth", "caption", "boxes", "tok_clip"):
        for tokens in (np.arange(5, dtype=np.int16), np.ones((10, 5), np.uint16)):
            np.testing.assert_array_equal(decode(signal, "t.npy", npy(tokens)), tokens)
    np.testing.assert_array_equal(decode("semseg", "t.npy", npy(np.arange(5))), np.arange(5))
    features = np.asfortranarray(np.random.default_rng(2).normal(size=(2, 3, 4)))
    np.testing.assert_array_equal(decode("clip", "f.npy", npy(features)), features)
    np.testing.assert_array_equal(decode("thermal", "e.png", picture(noise(5, 7))), noise(5, 7))
    assert decode("meta", "m.json", b'{"a": [1]}') == {"a": [1]} and decode("notes", "n.txt", b" x ") == " x "


def box(*bbox) -> bytes:
    return json.dumps([{"bbox": [0, 0, 1, 1], "label": "fine"}, {"bbox": list(bbox), "label": "bad"}]).encode()


@pytest.mark.parametrize(
    "signal, file, data, reason",
    [
        ("rgb", "a.psd", b"8BPS", "rgb has the extension 'psd'; allowed: png, jpg, jpeg, webp, tif, .* npy"),
        ("rgb", "a.png", b"8BPS\0\1", r"no picture that can be read: it begins with b'8BPS.*allowed: png, jpeg, webp"),
        ("depth", "a.npz", b"PK", "depth has the extension 'npz'; allowed: png, tif, tiff, npy. Did you mean 'npy'?"),
        ("clip", "a", b"x", "clip has the extension ''; allowed: npy, png, json, txt"),
        ("rgb", "a.png", b"", r"it is empty \(0 bytes\)"),
        ("rgb", "a.png", b"hello", "no picture that can be read: it begins with b'hello'"),
        ("rgb", "a.webp", b"RIFF\0\0\0\0WAVE", "damaged, or not what its extension says"),
        ("semseg", "a.png", picture(noise(5, 7), "jpeg"), "its content is jpeg; allowed: png, tiff, bmp"),
        ("semseg", "a.gif", picture(noise(5, 7) % 2 * 7, "gif"), "semseg has the extension 'gif'; allowed: png, tif"),
        ("depth", "a.npy", npy(np.zeros((5, 7), "m8[s]")), r"timedelta64\[s\] \[5, 7\]; allowed: floats"),
        ("normals", "a.png", picture(noise(5, 7, 3), "webp"), "its content is webp; allowed: png, tiff"),
        ("rgb", "a.png", picture(noise(50, 70))[:900], "damaged, or not what its extension says .*truncated"),
        ("rgb", "a.jpg", picture(noise(50, 70), "jpeg")[:900], "damaged, or not what its extension says .*truncated"),
        ("rgb", "a.npy", npy(np.zeros((5, 7, 3))), r"float64 \[5, 7, 3\]; allowed: uint8 \[H W 3\], or tokens"),
        ("rgb", "a.npy", npy(noise(5, 7, 4)), r"uint8 \[5, 7, 4\]; allowed: uint8 \[H W 3\], or tokens"),
        ("depth", "a.png", picture(noise(5, 7)), "depth from a picture of mode L; allowed: I;16, I;16B, I"),
        ("depth", "a.npy", npy([[1.0, np.nan], [np.nan, -1]]), "2 NaN, 1 negative of 4 depths; unknown depth is 0"),
        ("depth", "a.npy", npy([[1.0, np.inf]]), "1 infinite of 2 depths"),
        ("depth", "a.npy", npy([[1.0, 1e300]]), "1 infinite of 2 depths"),
        (
            "depth",
            "a.npy",
            npy(np.zeros((2, 2, 1))),
            r"float64 \[2, 2, 1\]; allowed: floats \[H W\] in metres, or tokens",
        ),
        ("depth", "a.npy", npy(np.zeros((5, 7)))[:-8], r"float64 \[5, 7\] takes 280 bytes, but 272 follow"),
        ("depth", "a.npy", npy(np.array([None])), "it holds pickled objects, which are never read"),
        ("depth", "a.npy", b"PK\x03\x04" + bytes(9), "the magic string is not correct"),
        ("normals", "a.npy", npy(np.full((1, 2, 3), 127.0)), "2 of 2 normals are longer than 1.1 or not finite"),
        ("normals", "a.npy", npy([[[np.nan, 0, 1], [0, 0, 1]]]), "1 of 2 normals are longer than 1.1 or not finite"),
        ("normals", "a.png", picture(noise(5, 7)), "normals from a picture of mode L; allowed: RGB"),
        ("semseg", "a.png", picture(noise(5, 7, 3)), "semseg from a picture of mode RGB; allowed: L, P, 1"),
        ("semseg", "a.npy", npy(np.zeros((5, 7))), r"float64 \[5, 7\]; allowed: integers \[H W\], or tokens"),
        ("instance", "a.npy", npy([[2**40]]), "1099511627776 are given; allowed: what int32 holds"),
        ("caption", "a.txt", b"caf\xe9", "not UTF-8: byte 3 is 0xe9"),
        ("caption", "a.txt", b" \n", "the caption is empty"),
        ("caption", "a.json", b'[" "]', "the caption is empty"),
        ("caption", "a.json", b"[1]", "a caption is a string or a list of strings, not '.1.'"),
        ("caption", "a.json", b"[]", "a caption is a string or a list of strings"),
        ("caption", "a.json", b'"cut', "not JSON: Unterminated string"),
        ("caption", "a.npy", npy([1.5]), r"float64 \[1\]; allowed: tokens"),
        ("boxes", "a.json", b'{"bbox": []}', "boxes are a list of objects with bbox and label"),
        ("boxes", "a.json", b'[{"bbox": [0, 0, 1, 1]}]', "box 0 needs a bbox and a label"),
        ("boxes", "a.json", box(0, 0, 1, 1.5), r"box 1 lies outside \[0, 1\]: \[0, 0, 1, 1.5\]"),
        ("boxes", "a.json", box(0.5, 0, 0.25, 1), r"box 1 is inverted: \[0.5, 0, 0.25, 1\]"),
        ("boxes", "a.json", box(0, 0, 1, float("nan")), "NaN is not a JSON number"),
        ("boxes", "a.json", box(0, 0, 1), r"box 1 has the bbox \[0, 0, 1\]; allowed: four numbers"),
        ("boxes", "a.json", box(0, 0, 1, "1"), r"box 1 has the bbox .* allowed: four numbers"),
    ],
)
def test_what_is_refused_is_told_with_file_and_reason(signal, file, data, reason):
    with pytest.raises(ValueError, match=f"^some/{file}: .*{reason}"):
        decode(signal, f"some/{file}", data)


def test_a_picture_of_100_megapixels_costs_no_memory():
    bomb = picture(Image.new("1", (10_001, 10_000)))
    assert len(bomb) < 100_000 and MAX_PIXELS < 10_001 * 10_000
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"^bomb.png: a picture of 10000 x 10001 pixels was given; .* 64,000,000 pixels"
    ):
        decode("rgb", "bomb.png", bomb)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000), }".ljust(117) + b"\n"
    with pytest.raises(ValueError, match=r"^bomb.npy: .*takes 8000000000000 bytes, but 0 follow"):
        decode("depth", "bomb.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@given(st.data())
def test_damage_anywhere_is_a_value_error_of_that_file(data):
    kind, whole = data.draw(st.sampled_from(sorted(DAMAGED.items())))
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, max(len(broken) - 1, 0)), max_size=3)):
        if broken:
            broken[place] ^= data.draw(st.integers(1, 255))
    try:
        decode(kind.split(".")[0], kind, bytes(broken))
    except ValueError as error:
        assert str(error).startswith(f"{kind}: ")


DAMAGED = {
    "rgb.png": picture(noise(5, 7, 3)),
    "rgb.jpg": picture(noise(5, 7, 3), "jpeg"),
    "rgb.webp": picture(noise(5, 7, 3), "webp"),
    "depth.npy": npy(np.ones((3, 4))),
    "boxes.json": box(0, 0, 1, 1),
    "caption.txt": "Würfel".encode(),
}


# ---- Folders --------------------------------------------------------------------------------------------------------


def test_examples_are_aligned_by_path_and_sorted_by_id(tmp_path):
    write(tmp_path, samples())
    junk = ("rgb/.hidden.png", "rgb/Thumbs.db", "rgb/part0/desktop.ini", ".git/x", "__MACOSX/rgb/a.png", "README.md")
    write(tmp_path, dict.fromkeys(junk, b"junk"))
    source = Folders(root=tmp_path, validation_share=0.3, test_share=0.2)
    source.prepare("unused")
    splits = {name: source.split(name, "unused") for name in source.splits}
    assert sum(map(len, splits.values())) == 40 and min(map(len, splits.values())) > 2
    for split in splits.values():
        examples = list(split)
        assert [e["id"] for e in examples] == sorted(e["id"] for e in examples)
        for e in examples:
            i = int(e["id"][-5:-2])
            assert e["id"] == f"part{i % 3}/{i:03d}.x" and e["file"].endswith(f"/{e['id']}.json")
            assert (e["rgb"] == i).all() and (e["depth"] == np.float32(i / 10)).all() and e["rgb"].shape == (4, 6, 3)
            assert (
                e["caption"] == f"number {i}"
                and e["boxes"]["label"] == [str(i)]
                and list(e["tok"]) == [*range(i, i + 5)]
            )
        assert_same(split[-1], examples[-1])
        assert_same(split[np.int64(1)], examples[1])
        with pytest.raises(IndexError, match=f"example {len(split)} of {len(split)}"):
            split[len(split)]
    assert set(Folders(root=tmp_path, signals=("rgb",)).split("train", "unused")[0]) == {"rgb", "file", "id"}
    assert from_json(to_json(source)) == source
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("rgb", "tok"):
        (linked / name).symlink_to(tmp_path / name)
    assert_same(
        Folders(root=linked, signals=("tok", "rgb")).split("train", "")[0], Folders(root=linked).split("train", "")[0]
    )


def test_a_split_is_light_to_send_and_reads_the_same_elsewhere(tmp_path):
    write(tmp_path, samples())
    split = Folders(root=tmp_path).split("train", "unused")
    before, sent = list(split), pickle.dumps(split)
    assert len(sent) < 1000
    for left, right in zip(pickle.loads(sent), before, strict=True):
        assert_same(left, right)


def test_new_files_move_no_example_to_another_split(tmp_path):
    files = samples(200, tokens=False)
    caption = {name: data for name, data in files.items() if name.startswith("caption")}
    write(tmp_path, dict(list(caption.items())[::2]))
    source = Folders(root=tmp_path, validation_share=0.1, test_share=0.2)
    before = {e["id"]: name for name in source.splits for e in source.split(name, "unused")}
    write(tmp_path, caption)
    after = {e["id"]: name for name in source.splits for e in source.split(name, "unused")}
    assert len(before) == 100 and len(after) == 200 and before.items() <= after.items()
    counts = [list(after.values()).count(name) for name in source.splits]
    np.testing.assert_allclose(counts, [140, 20, 40], atol=15)


def test_folders_named_after_splits_are_the_splits(tmp_path):
    for split, num in {"train": 5, "validation": 3}.items():
        write(tmp_path / split, samples(num))
    source = Folders(root=tmp_path)
    source.prepare("unused")
    assert [len(source.split(name, "unused")) for name in ("train", "validation")] == [5, 3]
    with pytest.raises(ValueError, match="unknown split 'test'; allowed: train, validation"):
        source.split("test", "unused")
    shutil.rmtree(tmp_path / "validation" / "tok")
    with pytest.raises(ValueError, match="validation lacks 'tok'; add it or set allow_missing=True"):
        source.prepare("unused")
    assert "tok" not in Folders(root=tmp_path, allow_missing=True).split("validation", "unused")[0]
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="has val beside the splits train, validation; keep one or the other"):
        source.prepare("unused")


def test_a_missing_signal_is_an_error_unless_it_is_allowed(tmp_path):
    write(tmp_path, samples(3))
    (tmp_path / "depth/part1/001.x.npy").unlink()
    (tmp_path / "rgb/part2/002.x.png").unlink()
    split = Folders(root=tmp_path, validation_share=0, test_share=0).split("train", "unused")
    assert split[0]["id"] == "part0/000.x" and len(split) == 3
    with pytest.raises(
        ValueError, match="part1/001.x.json: 'part1/001.x' has no depth; add it or set allow_missing=True"
    ):
        split[1]
    with pytest.raises(ValueError, match="part2/002.x.json: 'part2/002.x' has no rgb"):
        split[2]
    lenient = Folders(root=tmp_path, allow_missing=True, validation_share=0, test_share=0).split("train", "unused")
    assert {"rgb", "depth"} - set(lenient[1]) == {"depth"} and {"rgb", "depth"} - set(lenient[2]) == {"rgb"}


def test_doubles_unequal_sizes_and_damage_name_the_file(tmp_path):
    write(tmp_path, samples(5))
    write(tmp_path, {"rgb/part0/000.x.jpg": picture(np.zeros((4, 6, 3), np.uint8), "jpeg")})
    write(tmp_path, {"depth/part1/001.x.npy": npy(np.ones((4, 5), np.float32))})
    write(tmp_path, {"rgb/part2/002.x.png": b""})
    write(tmp_path, {"depth/part0/003.x.npy": npy(np.arange(5))})  # tokens need no size
    (tmp_path / "rgb/part1/004.x.png").unlink()
    (tmp_path / "rgb/part1/004.x.png").symlink_to("nowhere")
    split = Folders(root=tmp_path, validation_share=0, test_share=0).split("train", "unused")
    with pytest.raises(ValueError, match=r"000.x.(jpg|png): the rgb of 'part0/000.x' is there twice, also as .*000.x"):
        split[0]
    with pytest.raises(ValueError, match="001.x.*'part1/001.x' have unequal sizes .*depth 4 x 5, rgb 4 x 6"):
        split[2]
    with pytest.raises(ValueError, match="/rgb/part2/002.x.png: it is empty"):
        split[4]
    assert split[1]["depth"].shape == (5,)
    with pytest.raises(ValueError, match="/rgb/part1/004.x.png: cannot be read .*No such file"):
        split[3]


def test_wrong_roots_and_names_are_told_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist"):
        Folders(root=tmp_path / "absent").prepare("unused")
    with pytest.raises(ValueError, match="has no folders of signals"):
        Folders(root=tmp_path).prepare("unused")
    write(tmp_path, samples(2))
    write(tmp_path, {"README": b""})
    with pytest.raises(ValueError, match="README is not a folder"):
        Folders(root=tmp_path / "README").prepare("unused")
    with pytest.raises(
        ValueError, match="has no signal 'dept'; allowed: boxes, caption, depth, .*Did you mean 'depth'"
    ):
        Folders(root=tmp_path, signals=("rgb", "dept")).prepare("unused")
    with pytest.raises(ValueError, match="unknown split 'trian'.*Did you mean 'train'"):
        Folders(root=tmp_path).split("trian", "unused")
    with pytest.raises(ValueError, match="root and data_dir are both .*; choose another data_dir"):
        Folders(root=tmp_path).prepare(tmp_path)
    (tmp_path / "normals").mkdir()
    with pytest.raises(ValueError, match="normals has no files"):
        Folders(root=tmp_path).prepare("unused")
    (tmp_path / "normals" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="loop is a link to a folder that it is in"):
        Folders(root=tmp_path).prepare("unused")
    (tmp_path / "id").mkdir()
    with pytest.raises(ValueError, match="must not be named 'id'"):
        Folders(root=tmp_path).prepare("unused")
    with pytest.raises(ValueError, match="signals is 'rgb', but must be a tuple"):
        Folders(root=tmp_path, signals="rgb")
    with pytest.raises(ValueError, match="validation_share 0.5 and test_share 0.5 are given; allowed"):
        Folders(root=tmp_path, validation_share=0.5, test_share=0.5)


def test_the_signature_follows_the_files(tmp_path):
    write(tmp_path, samples(3))
    source = Folders(root=tmp_path)
    first = source.signature("unused")
    assert first == source.signature("elsewhere") and len(first) == 12
    os.utime(tmp_path / "rgb/part0/000.x.png", ns=(1, 1))
    second = source.signature("unused")
    write(tmp_path, {"rgb/new.png": b""})
    third = source.signature("unused")
    assert len({first, second, third, Folders(root=tmp_path, signals=("rgb",)).signature("unused")}) == 4
    write(tmp_path, {"rgb/.hidden": b""})
    assert source.signature("unused") == third


# ---- Odd names and odd files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other, what",
    [
        (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café"), "Unicode's normal form"),
        (unicodedata.normalize("NFC", "a/각하"), unicodedata.normalize("NFD", "a/각하"), "Unicode's normal form"),
        ("\u212b", "\u00c5", "Unicode's normal form"),  # the sign of Angstrom, and the letter
        ("IMG_1", "img_1", "upper and lower case"),
        ("part/Ärger", "part/ärger", "upper and lower case"),
        ("A/1", "a/1", "upper and lower case"),
    ],
)
@pytest.mark.parametrize("allow_missing", [True, False])
def test_halves_of_an_example_with_names_that_look_alike_are_named(tmp_path, one, other, what, allow_missing):
    """Wherever their hashes would split them; a pair that is whole on its own stays two examples."""
    pixels = picture(np.zeros((2, 2, 3), np.uint8))
    write(tmp_path, {f"rgb/{one}.png": pixels, f"caption/{other}.txt": b"a word"})
    write(tmp_path, {"rgb/fine.png": pixels, "caption/fine.txt": b"a word"})
    source, errors = Folders(root=tmp_path, allow_missing=allow_missing, validation_share=0.3, test_share=0.3), []
    for split in (source.split(name, "unused") for name in source.splits):
        for i in range(len(split)):
            try:
                assert split[i]["id"] == "fine"
            except ValueError as error:
                errors.append(str(error))
    assert len(errors) == 2
    for error in errors:
        assert f"rgb/{one}.png" in error and f"caption/{other}.txt" in error and f"differ in {what} alone" in error
    write(tmp_path, {f"rgb/{other}.png": pixels, f"caption/{one}.txt": b"another"})
    assert len(everything(source)) == 3
    if allow_missing:
        (tmp_path / f"caption/{one}.txt").unlink()  # the other one has a picture of its own
        assert len(everything(source)) == 3


NOT_UTF8 = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    write(tmp_path, {f"rgb/{NOT_UTF8}/a.png": picture(np.zeros((2, 2, 3), np.uint8)), f"rgb/{NOT_UTF8}.png": b"bad"})
    split = Folders(root=tmp_path, validation_share=0, test_share=0).split("train", "unused")
    example = next(split[i] for i in (0, 1) if "/" in split._examples[i][0])
    assert example["id"] == r"caf\xe9/a" and example["file"] == rf"{tmp_path}/rgb/caf\xe9/a.png"
    with pytest.raises(ValueError, match=r"rgb/caf\\xe9.png: damaged") as error:
        list(split)
    str(error.value).encode()


def test_what_is_no_ordinary_file_is_named_and_never_waited_for(tmp_path):
    """A FIFO, a socket, a device, folders in files' places, links to nothing and in circles."""
    ids = ("circle", "device", "fifo", "fine", "folder", "link", "nowhere", "socket")
    write(tmp_path, {f"caption/{id}.txt": b"a word" for id in ids})
    write(tmp_path, {"rgb/fine.png": picture(np.zeros((2, 2, 3), np.uint8))})
    rgb = tmp_path / "rgb"
    os.mkfifo(rgb / "fifo.png")
    (rgb / "device.png").symlink_to("/dev/zero")
    (rgb / "folder.png").mkdir()
    (rgb / "nowhere.png").symlink_to("absent")
    (rgb / "circle.png").symlink_to("circle.png")
    (rgb / "link.png").symlink_to("fine.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(rgb / "socket.png"))
        source = Folders(root=tmp_path, validation_share=0, test_share=0)
        source.prepare("unused")
        assert len(source.signature("unused")) == 12
        split = source.split("train", "unused")
        kinds = {
            "circle": r"cannot be read \(Too many levels of symbolic links\)",
            "device": "a device; allowed: files",
            "fifo": "a FIFO; allowed: files",
            "folder": "a folder; allowed: files",
            "nowhere": r"cannot be read \(No such file or directory\)",
            "socket": "a socket; allowed: files",
        }
        assert len(split) == len(ids)
        for i, id in enumerate(ids):
            if id in kinds:
                with pytest.raises(ValueError, match=f"/rgb/{id}.png: {kinds[id]}"):
                    split[i]
            else:
                assert split[i]["id"] == id


def test_names_of_signals_are_safe_in_paths(tmp_path):
    for name in ("a\\b", "con", "x" * 201, "tab\t", NOT_UTF8):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match="a signal in .* which is not safe in a path"):
            Folders(root=tmp_path).prepare("unused")
        (tmp_path / name).rmdir()
