"""Tars become the very examples that folders of the same files do, read in place; what is unsafe or damaged is refused.

Axes: C crops, T tokens.
"""

import io
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
from test_folders import assert_same, everything, npy, picture, samples, write

from m4.components import from_json, to_json
from m4.datasets import tars
from m4.datasets.folders import Folders
from m4.datasets.tars import Tars, expand


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
