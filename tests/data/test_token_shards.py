"""Token shards are what was written, or are refused by name: flips, cuts, swaps, wrong counts, impossible ids."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from test_data import write_shards

from m4.data import token_shards
from m4.data.dataset import Dataset
from m4.data.stream import Stream
from m4.data.token_shards import TokenShards
from m4.files import digest, read_json, write_json


def sealed(folder, split="train"):
    """The manifest with the SHA-256 of each shard, as this version writes it."""
    manifest = read_json(folder / f"{split}.json")
    for name, shard in manifest["shards"].items():
        shard["sha256"] = digest(folder / name)
    write_json(folder / f"{split}.json", manifest)
    return folder


@pytest.fixture
def folder(tmp_path, make_example):
    return sealed(write_shards(tmp_path / "scenes", [make_example(i) for i in range(48)]))


def contents(folder):
    shards = TokenShards(folder, "train")
    return [safetensors.numpy.save(shards[i]) for i in range(len(shards))]


def change(folder, **fields):
    write_json(folder / "train.json", {**read_json(folder / "train.json"), **fields})


def test_every_flip_and_cut_is_noticed_with_the_files_name_or_changes_nothing(folder):
    """With digests before anything is read. 120 tries over shards, manifest and the note of what was verified."""
    expected, rng, noticed = contents(folder), np.random.default_rng(0), 0
    files = [*sorted(folder.glob("*.array_record")), folder / "train.json", folder / ".train.verified.json"]
    assert len(files) == 5
    for number in range(120):
        file = files[number % len(files)]
        whole = file.read_bytes()
        changed = bytearray(whole)
        if rng.random() < 0.2:
            del changed[rng.integers(len(whole)) :]
        else:
            changed[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        try:
            assert contents(folder) == expected, file
        except ValueError as error:
            assert file.name in str(error) and file.suffix in str(error)
            noticed += 1
        else:
            assert file.suffix == ".json"  # white space, or a note that was made again
        file.write_bytes(whole)
    assert noticed >= 90


def swap(folder, one, other):
    (folder / one).rename(folder / "x")
    (folder / other).rename(folder / one)
    (folder / "x").rename(folder / other)


def test_swapped_and_foreign_shards_of_one_size_are_refused(folder, tmp_path, make_example):
    names = sorted(path.name for path in folder.glob("*.array_record"))
    assert len({(folder / name).stat().st_size for name in names}) == 1
    for path in folder.glob("*.array_record"):
        os.utime(path, ns=(0, 0))  # as files from an archive have them
    contents(folder)
    for one, other in itertools.combinations(names, 2):
        (
            (folder / one).rename(folder / "x"),
            (folder / other).rename(folder / one),
            (folder / "x").rename(folder / other),
        )
        with pytest.raises(ValueError, match=f"token shard .*/{one} is damaged or not that of this place"):
            TokenShards(folder, "train")
        (
            (folder / one).rename(folder / "x"),
            (folder / other).rename(folder / one),
            (folder / "x").rename(folder / other),
        )
    contents(folder)
    foreign = write_shards(tmp_path / "foreign", [make_example(i) for i in range(48, 96)])
    shutil.copy(foreign / "train-00001.array_record", folder / names[1])
    with pytest.raises(ValueError, match=f"{names[1]} is damaged or not that of this place"):
        TokenShards(folder, "train")


def test_files_are_verified_once_and_again_after_a_change(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(token_shards, "digest", lambda path: seen.append(path.name) or digest(path))
    contents(folder), contents(folder)
    assert sorted(seen) == sorted(path.name for path in folder.glob("*.array_record"))
    token_shards._verified.clear()  # another process reads the note
    contents(folder)
    assert len(seen) == 3
    os.utime(folder / seen[0])
    contents(folder)
    assert len(seen) == 4
    moved = shutil.copytree(folder, folder.with_name("moved"))
    contents(moved)
    assert len(seen) == 7


def test_a_manifest_whose_numbers_are_wrong_is_refused(folder):
    whole = read_json(folder / "train.json")
    name = next(iter(whole["shards"]))

    def shards(**fields):
        return {"shards": {**whole["shards"], name: {**whole["shards"][name], **fields}}}

    for fields, message in (
        ({"num_examples": 47}, "train.json is wrong: 47 examples, but its shards have 48"),
        (shards(num_examples=17), "48 examples, but its shards have 49"),
        ({**shards(num_examples=17), "num_examples": 49}, "49 examples, but its sets of modalities have 48"),
        (
            {**shards(num_examples=17), "num_examples": 49, "sets": [{**whole["sets"][0], "num_examples": 49}]},
            f"{name} has 16 records instead of 17",
        ),
        (shards(num_examples=-1), f"num_examples of shard {name} must be a whole number of at least 0"),
        (shards(num_examples=16.0), f"num_examples of shard {name} must be a whole number"),
        (shards(num_examples=True), f"num_examples of shard {name} must be a whole number"),
        (shards(bytes=0), f"bytes of shard {name} must be a whole number of at least 1"),
        (shards(bytes=7), f"{name} has 131072 bytes instead of 7"),
        ({"shards": {}}, "train.json names no shards"),
        ({"shards": {"../other": whole["shards"][name]}}, r"has the name '\.\./other', which is not safe in a path"),
        ({"shards": []}, "is no manifest of token shards: shards is not there, or no dict"),
        ({"sets": [{"modalities": [3]}]}, "sets is no list of modalities and numbers"),
        ({"version": 1}, "was written by another version"),
        ({"tokenizers": {"../../x": "0"}}, "not safe in a path"),
    ):
        write_json(folder / "train.json", {**whole, **fields})
        with pytest.raises(ValueError, match=message):
            TokenShards(folder, "train")
        (folder / "train.json").write_text(json.dumps({**whole, **fields}))  # of an older version, without a digest
        with pytest.raises(ValueError, match=message):
            TokenShards(folder, "train")
    (folder / "train.json").write_text(json.dumps(whole))
    assert len(contents(folder)) == 48


def test_manifests_of_older_versions_are_read(tmp_path, make_example):
    """Without digests: by sizes, numbers of records and the hashes within the shards."""
    old = write_shards(tmp_path / "old", [make_example(i) for i in range(40)])
    assert contents(old) == [safetensors.numpy.save(make_example(i)) for i in range(40)]
    shard = old / "train-00001.array_record"
    writer = ArrayRecordWriter(str(shard), "group_size:1")  # as large, since files are padded
    writer.close()
    assert shard.stat().st_size == 131072
    with pytest.raises(ValueError, match="train-00001.array_record has 0 records instead of 16"):
        TokenShards(old, "train")
    shard.write_bytes(bytes(131072))
    with pytest.raises(ValueError, match="train-00001.array_record cannot be read"):
        TokenShards(old, "train")


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("depth_tokens", np.full(12, 7, np.uint8), r"depth_tokens: ids 7..7 outside \[0, 7\)"),
        ("depth_tokens", np.arange(-1, 11, dtype=np.int16) % 7 - 1, r"depth_tokens: ids -1..5 outside \[0, 7\)"),
        ("depth_tokens", np.zeros(11, np.uint8), "depth_tokens: 11 ids, the grid has 12"),
        ("depth_tokens", np.zeros(12, np.float32), r"depth_tokens: float32 \[12\] is stored, but ids are integers"),
        ("depth_tokens", np.zeros((3, 4), np.uint8), r"depth_tokens: uint8 \[3, 4\] is stored, but ids are integers"),
        ("depth_tokens", np.zeros(12, bool), r"depth_tokens: bool \[12\] is stored"),
        ("caption", np.array([30, 3], np.uint8), r"caption: ids 3..30 outside \[0, 30\)"),
        ("caption", np.full(11, 20, np.uint8), "caption: 11 ids, the sequence holds 1 to 10"),
        ("caption", np.zeros(0, np.uint8), "caption: 0 ids, the sequence holds 1 to 10"),
        (
            "rgb_pixels",
            np.zeros((12, 5), np.uint8),
            r"rgb_pixels: uint8 \[12, 5\] is stored, but must be uint8 \[12, 6\]",
        ),
        ("rgb_pixels", np.zeros((12, 6)), r"rgb_pixels: float64 \[12, 6\] is stored, but must be uint8 \[12, 6\]"),
        ("rgb_pixels", np.zeros((13, 6), np.uint8), r"rgb_pixels: uint8 \[13, 6\] is stored"),
    ],
)
def test_arrays_that_cannot_be_a_modalitys_stop_the_stream_with_their_record(
    tmp_path, make_example, masking, modalities, name, array, message
):
    records = [make_example(i) for i in range(20)]
    records[18][name] = array
    folder = sealed(write_shards(tmp_path / "bad", records))
    stream = Stream(
        [TokenShards(folder, "train")], [Dataset(tokens=str(folder))], masking, modalities, batch_size=10, seed=0
    )
    with pytest.raises(ValueError, match=f"record 2 of token shard .*bad/train-00001.array_record: {message}"):
        for _ in range(2):
            next(stream)
    stream.close()
