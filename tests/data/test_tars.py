"""Tars become the very examples that folders of the same files do, read in place; what is unsafe or damaged is refused.

Axes: C crops, T tokens.
"""

import io
import os
import pickle
import shutil
import subprocess
import tarfile
import threading

import numpy as np
import pytest
from test_folders import assert_same, everything, npy, picture, samples, write

from m4.data.sources import tars
from m4.data.sources.folders import Folders
from m4.data.sources.tars import Tars, expand
from m4.registry import from_json, to_json


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(data)


def write_tar(path, *members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, data)


def write_tars(root, files: dict[str, bytes], num_shards: int = 3, **options):
    """A tar per signal and shard; shards take the samples in turns, as they come."""
    by_signal = {}
    for path, data in files.items():
        signal, _, name = path.partition("/")
        by_signal.setdefault(signal, []).append((name, data))
    for signal, named in by_signal.items():
        for shard in range(num_shards):
            members = [member(name, data) for name, data in named[shard::num_shards]]
            write_tar(root / signal / f"shard-{shard:05d}.tar", *members, **options)
    return root


@pytest.mark.parametrize("options", [{"format": tarfile.PAX_FORMAT}, {"format": tarfile.GNU_FORMAT}])
def test_tars_and_folders_give_the_same_examples_in_the_same_order(tmp_path, options):
    files = samples()
    files |= {
        path.replace("007", "long" * 50): files[path] for path in list(files) if "/007" in path
    }  # pax, GNU headers
    write(tmp_path / "folders", files)
    write_tars(tmp_path / "tars", files, **options)
    shares = {"validation_share": 0.2, "test_share": 0.2}
    folders = Folders(root=tmp_path / "folders", **shares)
    source = Tars(root=tmp_path / "tars", **shares)
    source.prepare(tmp_path / "data")
    for name in source.splits:
        left, right = (s.split(name, tmp_path / "data") for s in (folders, source))
        assert len(left) == len(right) > 2
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
            assert f".tar/{other['id']}." in other["file"]
    sent = pickle.dumps(source.split("train", tmp_path / "data"))
    assert len(sent) < 1000
    assert_same(pickle.loads(sent)[3], folders.split("train", "")[3])
    assert from_json(to_json(source)) == source


def test_splits_are_folders_where_they_are_named_so(tmp_path):
    for split, num in {"train": 5, "test": 3}.items():
        write_tars(tmp_path / split, samples(num), num_shards=2)
    source = Tars(root=tmp_path)
    source.prepare(tmp_path / "data")
    assert [len(source.split(name, tmp_path / "data")) for name in ("train", "test")] == [5, 3]


def test_the_index_is_made_once_and_again_for_another_tar(tmp_path, monkeypatch):
    write_tars(tmp_path / "tars", samples(6, tokens=False), num_shards=2)
    source, data = Tars(root=tmp_path / "tars"), tmp_path / "data"
    source.prepare(data)
    assert len(os.listdir(data / "tar_indexes")) == 8 and not [n for n in os.listdir(data) if n.endswith(".tmp")]
    opened = []
    monkeypatch.setattr(tars, "members", lambda tar, original=tars.members: opened.append(tar.name) or original(tar))
    source.prepare(data)
    assert len(everything(source, data)) == 6 and opened == []
    first = source.signature(data)
    write_tar(tmp_path / "tars/caption/shard-00001.tar", member("new.txt", b"new"))
    assert source.signature(data) != first
    lenient = Tars(root=tmp_path / "tars", allow_missing=True)
    assert "new" in [e["id"] for e in everything(lenient, data)] and set(opened) == {"shard-00001.tar"}
    assert sorted(os.listdir(tmp_path)) == ["data", "tars"]  # nothing is extracted


def test_threads_read_the_same(tmp_path):
    write_tars(tmp_path, samples(30))
    split = Tars(root=tmp_path).split("train", tmp_path / "data")
    expected, failed = list(split), []

    def read(seed: int):
        try:
            for i in np.random.default_rng(seed).permutation(len(split)):
                assert_same(split[i], expected[i])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_shards_are_chosen_by_ranges(tmp_path):
    assert expand("{08..10}") == ["08", "09", "10"] and expand("{8..10}") == ["8", "9", "10"]
    assert expand("a-{0..1}-{x,y}") == ["a-0-x", "a-0-y", "a-1-x", "a-1-y"] and expand("plain") == ["plain"]
    for pattern in ("{1..}", "{3..1}", "{1..2", "1..2}", "{{1..2}}", "{x}"):
        with pytest.raises(ValueError, match="shards is .*; allowed: ranges like {00000..00009}"):
            Tars(root=tmp_path, shards=pattern)
    write_tars(tmp_path, samples(9), num_shards=3)
    data = tmp_path / "data"
    for shards, num in {"shard-{00000..00001}": 6, "shard-{00002..00002}.tar": 3, "shard-00001": 3, "": 9}.items():
        source = Tars(root=tmp_path, signals=("rgb", "tok"), shards=shards)
        source.prepare(data)
        assert len(everything(source, data)) == num
    with pytest.raises(ValueError, match="no signal of .* has the shard 'shard-00003.tar'; .*Did you mean 'shard-0000"):
        Tars(root=tmp_path, signals=("rgb",), shards="shard-{00000..00003}").prepare(data)


def test_missing_shards_are_told_before_any_work_and_missing_members_by_example(tmp_path):
    files, data = samples(6), tmp_path / "data"
    del files["depth/part1/004.x.npy"]
    write_tars(tmp_path / "tars", files, num_shards=2)
    source = Tars(root=tmp_path / "tars", validation_share=0, test_share=0)
    source.prepare(data)
    split = source.split("train", data)
    with pytest.raises(ValueError, match="00000.tar/part1/004.x.json: 'part1/004.x' has no depth; add it or set allow"):
        split[3]
    lenient = Tars(root=tmp_path / "tars", allow_missing=True, validation_share=0, test_share=0)
    assert "depth" not in lenient.split("train", data)[3] and len(list(lenient.split("train", data))) == 6
    (tmp_path / "tars/depth/shard-00001.tar").unlink()
    with pytest.raises(
        ValueError, match="depth has no shard-00001.tar, which .*boxes has; add it or set allow_missing"
    ):
        source.prepare(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "tars/depth/shard-00000.tar").unlink()
    with pytest.raises(ValueError, match="depth has no .tar files"):
        source.prepare(tmp_path / "new")


def test_an_id_in_two_shards_is_an_error(tmp_path):
    for shard in "01":
        write_tar(tmp_path / f"rgb/{shard}.tar", member("a.png", picture(np.zeros((2, 2, 3), np.uint8))))
    split = Tars(root=tmp_path, validation_share=0, test_share=0).split("train", tmp_path / "data")
    with pytest.raises(ValueError, match="1.tar/a.png: the rgb of 'a' is there twice, also as .*0.tar/a.png"):
        split[0]


@pytest.mark.parametrize(
    "info, reason",
    [
        (member("../a.txt", b"x"), "'../a.txt' points outside of the tar"),
        (member("a/../../b.txt", b"x"), "'a/../../b.txt' points outside of the tar"),
        (member("/etc/a.txt", b"x"), "'/etc/a.txt' points outside of the tar"),
        (member("a.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'a.txt' is a link; allowed: files"),
        (member("a.txt", type=tarfile.LNKTYPE, linkname="b.txt"), "'a.txt' is a link; allowed: files"),
        (member("a.txt", type=tarfile.CHRTYPE), "'a.txt' is a device; allowed: files"),
        (member("a.txt", type=tarfile.FIFOTYPE), "'a.txt' is a device; allowed: files"),
    ],
)
def test_members_that_are_no_plain_files_within_are_refused(tmp_path, info, reason):
    write_tar(tmp_path / "caption/0.tar", member("fine.txt", b"fine"), info)
    with pytest.raises(ValueError, match=f"^{tmp_path}/caption/0.tar: member {reason}"):
        Tars(root=tmp_path).prepare(tmp_path / "data")


def test_directories_dots_and_hidden_members_are_passed_over(tmp_path):
    write_tar(
        tmp_path / "caption/0.tar",
        member("./", type=tarfile.DIRTYPE),
        member("./sub", type=tarfile.DIRTYPE),
        member("./sub/._a.txt", b"hidden"),
        member("./sub/a.txt", b"fine"),
        member("Thumbs.db", b"junk"),
    )
    (example,) = everything(Tars(root=tmp_path), tmp_path / "data")
    assert (example["id"], example["caption"]) == ("sub/a", "fine")


def test_truncated_and_damaged_tars_are_named(tmp_path):
    path = tmp_path / "caption" / "0.tar"
    write_tar(path, *[member(f"{i}.txt", b"text" * 200) for i in range(4)])
    whole = path.read_bytes()
    block = 512
    cases = {
        "is empty": b"",
        "cut in a header": whole[: 3 * block + 100],
        "cut after a header": whole[: 4 * block],
        "cut in a member": whole[: 5 * block + 10],
        "cut between members": whole[: 6 * block],
        "has no end": whole[: 12 * block],
        "a damaged header": whole[: 3 * block] + b"\xff" * 20 + whole[3 * block + 20 :],
        "not a tar": b"text" * 1000,
        "compressed": b"\x1f\x8b\x08\x00" + bytes(1000),
    }
    for case, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{path}: (cannot be read as an uncompressed tar|truncated or damaged)"):
            Tars(root=tmp_path).prepare(tmp_path / "data")
            pytest.fail(case)
    path.write_bytes(whole)
    source = Tars(root=tmp_path, validation_share=0, test_share=0)
    split = source.split("train", tmp_path / "data")
    assert len(split) == 4
    os.truncate(path, 5 * block)
    with pytest.raises(ValueError, match="0.tar/1.txt: .* bytes instead of 800; the tar has changed"):
        split[1]


def test_each_crop_takes_its_row_of_tokens(tmp_path):
    tokens = np.arange(2 * 3 * 5, dtype=np.int16).reshape(2, 3, 5)
    files = {}
    for i, id in enumerate("ab"):
        files[f"tok_rgb/{id}.npy"] = npy(tokens[i])
        files[f"crop_settings/{id}.npy"] = npy(np.arange(15).reshape(3, 5) + i)
        files[f"caption/{id}.txt"] = id.encode()
        files[f"semseg/{id}.npy"] = npy(np.full((3, 4), i))  # a map is no tokens
    write_tars(tmp_path / "tars", files, num_shards=1)
    whole = {"validation_share": 0, "test_share": 0}
    cropped = {"num_crops": 3, "signals": ("tok_rgb", "crop_settings", "caption")}
    split = Tars(root=tmp_path / "tars", **cropped, **whole).split("train", tmp_path / "data")
    assert len(split) == 6
    for k, example in enumerate(split):
        i, crop = divmod(k, 3)
        np.testing.assert_array_equal(example["tok_rgb"], tokens[i, crop])
        np.testing.assert_array_equal(example["crop_settings"], np.arange(5) + 5 * crop + i)
        assert example["caption"] == example["id"] == "ab"[i]
    as_stored = Tars(root=tmp_path / "tars", **whole).split("train", tmp_path / "data")
    np.testing.assert_array_equal(as_stored[1]["tok_rgb"], tokens[1])
    assert as_stored[1]["semseg"].shape == (3, 4)
    uncropped = Tars(root=tmp_path / "tars", num_crops=3, **whole).split("train", tmp_path / "data")
    with pytest.raises(ValueError, match="semseg/.*a.npy: num_crops is 3, and this is neither tokens nor words"):
        uncropped[0]
    wrong = Tars(root=tmp_path / "tars", num_crops=4, **whole).split("train", tmp_path / "data")
    with pytest.raises(ValueError, match=r"a.npy: tokens of \[3, 5\], but num_crops is 4; allowed: \[4, num_tokens\]"):
        wrong[0]
    with pytest.raises(ValueError, match="num_crops is 0, but must be at least 1"):
        Tars(root=tmp_path, num_crops=0)


# ---- Whole or refused -----------------------------------------------------------------------------------------------

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
TEXTS = {"a/" + "x" * 90 + ".txt": b"hello", "b.txt": b"b" * 512, "empty.txt": b"", "c.txt": b"c" * 1000}


def archive(format: int, texts: dict[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, **options) as tar:
        for info, data in (member(name, data) for name, data in texts.items()):
            tar.addfile(info, data)
    return buffer.getvalue()


def read(path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {name: data[offset : offset + size] for name, offset, size in tars.members(path)}


@pytest.mark.parametrize("name", FORMATS)
def test_a_tar_cut_or_flipped_anywhere_gives_all_members_or_an_error(tmp_path, name):
    """No member is lost, or shifted; of flips within contents, which long names are too, tars know nothing."""
    path = tmp_path / "t.tar"
    texts = TEXTS | ({} if name == "ustar" else {"ü" * 120 + ".txt": b"long name"})
    whole = archive(FORMATS[name], texts)
    path.write_bytes(whole)
    assert read(path) == texts
    places, end = [place for _, *place in tars.members(path)], len(whole.rstrip(b"\0"))
    for cut in range(0, len(whole), 31):
        path.write_bytes(whole[:cut])
        try:
            assert read(path) == texts and cut >= end
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(250):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            assert [place for _, *place in tars.members(path)] == places
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 160


@pytest.mark.parametrize("name", FORMATS)
def test_what_follows_the_end_of_a_tar_is_never_lost_without_a_word(tmp_path, name):
    """Joined archives, lost headers, bytes behind the end, at any blocking factor; more zeros are no harm."""
    path, one = tmp_path / "t.tar", archive(FORMATS[name], TEXTS)
    two = archive(FORMATS[name], {"d.txt": b"d", "e.txt": b"e"})
    bare = one.rstrip(b"\0")
    bare += bytes(-len(bare) % 512)
    for num_blocks in (1, 2, 3, 20, 21, 4096):
        path.write_bytes(bare + bytes(512 * num_blocks))
        assert read(path) == TEXTS
        for rest in (two, b"\1", b"garbage", bytes(100) + b"x", bytes(2**20) + b"x"):
            path.write_bytes(bare + bytes(512 * num_blocks) + rest)
            with pytest.raises(ValueError, match=rf"^{path}: its end is marked at byte {len(bare)}, but more follows"):
                tars.members(path)
    path.write_bytes(one)
    headers = [offset - 512 for _, offset, _ in tars.members(path)]
    for header in headers[:-1]:
        for num_lost in (1, 2):
            changed = bytearray(one)
            changed[header : header + 512 * num_lost] = bytes(512 * num_lost)
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=rf"^{path}: "):
                tars.members(path)
    path.write_bytes(bytes(512) + one)
    with pytest.raises(ValueError, match=rf"^{path}: "):
        tars.members(path)
    shard = tmp_path / "root" / "caption" / "0.tar"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(one + two)
    with pytest.raises(ValueError, match="0.tar: its end is marked at byte .* archives that were joined"):
        Tars(root=tmp_path / "root").prepare(tmp_path / "data")


@pytest.mark.skipif(not shutil.which("tar"), reason="needs tar")
@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_tar_itself_writes_is_read_and_its_unusual_members_are_named(tmp_path, format):
    for name, data in TEXTS.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)

    def tar(*arguments):
        subprocess.run(["tar", *arguments], cwd=tmp_path / "in", check=True, capture_output=True)

    for blocking in ("1", "20", "77"):
        path = tmp_path / f"{blocking}.tar"
        tar("-c", f"--format={format}", "-b", blocking, "-f", path, *TEXTS)
        assert read(path) == TEXTS
    tar("-c", f"--format={format}", "-f", tmp_path / "joined.tar", "b.txt")
    tar("-A", "-f", tmp_path / "joined.tar", tmp_path / "20.tar")  # joined as it should be: b.txt is there twice
    assert [name for name, _, _ in tars.members(tmp_path / "joined.tar")] == ["b.txt", *TEXTS]
    (tmp_path / "in" / "link.txt").symlink_to("b.txt")
    os.mkfifo(tmp_path / "in" / "fifo.txt")
    for odd, kind in (("link.txt", "a link"), *([("fifo.txt", "a device")] if format != "v7" else [])):
        tar("-c", f"--format={format}", "-f", tmp_path / "odd.tar", odd)
        with pytest.raises(ValueError, match=f"odd.tar: member '{odd}' is {kind}; allowed: files"):
            tars.members(tmp_path / "odd.tar")
    if format in ("gnu", "oldgnu", "posix"):
        with open(tmp_path / "in" / "holes.txt", "wb") as file:
            file.seek(2**20)
            file.write(b"x")
        tar("-c", "-S", f"--format={format}", "-f", tmp_path / "sparse.tar", "holes.txt", "b.txt")
        with pytest.raises(ValueError, match="sparse.tar: member .* is a sparse file; allowed: files"):
            tars.members(tmp_path / "sparse.tar")


def test_what_only_looks_like_a_tar_is_named_and_never_waited_for(tmp_path):
    folder = tmp_path / "caption"
    folder.mkdir()
    os.mkfifo(folder / "0.tar")
    for kind in ("a FIFO", "a device", "a folder", "cannot be read"):
        with pytest.raises(ValueError, match=f"caption/0.tar: {kind}"):
            Tars(root=tmp_path).prepare(tmp_path / "data")
        (folder / "0.tar").unlink()
        if kind == "a FIFO":
            (folder / "0.tar").symlink_to("/dev/zero")
        elif kind == "a device":
            (folder / "0.tar").symlink_to(tmp_path)
        else:
            (folder / "0.tar").symlink_to("nowhere")


def test_a_damaged_or_stale_index_is_made_again(tmp_path, monkeypatch):
    write_tars(tmp_path / "tars", samples(6, tokens=False), num_shards=1)
    source, data = Tars(root=tmp_path / "tars"), tmp_path / "data"
    source.prepare(data)
    expected = everything(source, data)
    rng = np.random.default_rng(0)
    for index in [*(data / "tar_indexes").iterdir()] * 10:
        whole = index.read_bytes()
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        index.write_bytes(changed)
        for one, other in zip(everything(source, data), expected, strict=True):
            assert_same(one, other)
    for text in (b"", b"[]", b"{}", b'[["a.txt", 0, 5]]', b'{"members": [["a.txt", 0, 5]], "m4": 2}'):
        index.write_bytes(text)
        assert len(everything(source, data)) == 6
    known = sorted(path.name for path in (data / "tar_indexes").iterdir())
    monkeypatch.setattr(tars, "VERSION", tars.VERSION + 1)  # another rule: nothing that an older one found is taken
    source.prepare(data)
    assert len(list((data / "tar_indexes").iterdir())) == 2 * len(known)
