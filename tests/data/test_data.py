"""The stream: exactly resumable, exactly mixed, the same for any number of processes and workers, killed or not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import environment

from m4.data import stream as data
from m4.data.dataset import Dataset
from m4.data.stream import Stream
from m4.data.token_shards import VERSION, TokenShards
from m4.files import fingerprint
from m4.masking.dirichlet import DirichletMasking, Strategy


def write_shards(folder, records, *, per_shard=16, split="train", hashes=None):
    """Token shards as pretokenization leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for i, first in enumerate(range(0, len(records), per_shard)):
        path = folder / f"{split}-{i:05d}.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        part = records[first : first + per_shard]
        for record in part:
            writer.write(safetensors.numpy.save(record))
        writer.close()
        shards[path.name] = {"num_examples": len(part), "bytes": path.stat().st_size}
    sets = Counter(tuple(record) for record in records)
    manifest = {
        "version": VERSION,
        "num_examples": len(records),
        "shards": shards,
        "tokenizers": hashes or {},
        "sets": [{"modalities": list(names), "num_examples": count} for names, count in sets.items()],
    }
    (folder / f"{split}.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(tmp_path, make_example):
    return write_shards(tmp_path / "scenes", [make_example(i) for i in range(50)])


@pytest.fixture
def make_stream(folder, masking, modalities):
    def make(folders=(folder,), datasets=None, **options):
        shards = [TokenShards(f, "train") for f in folders]
        datasets = datasets or [Dataset(tokens=str(f)) for f in folders]
        return Stream(shards, datasets, masking, modalities, **{"batch_size": 8, "seed": 3, **options})

    return make


def take(stream, count):
    return [next(stream) for _ in range(count)]


def leaves(batches):
    return [np.asarray(x) for b in batches for x in (*b.inputs, *b.targets, *b.features.values())]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_shards_hold_what_was_written(folder, make_example):
    stored = TokenShards(folder, "train")
    assert len(stored) == 50
    for i in (0, 15, 16, 49):
        assert {k: v.tolist() for k, v in stored[i].items()} == {k: v.tolist() for k, v in make_example(i).items()}
    with pytest.raises(IndexError):
        stored[50]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_resumes_exactly(make_stream, num_workers):
    """From a saved position the same batches follow, in this process and in workers."""
    one = make_stream()
    take(one, 5)
    position = json.loads(json.dumps(one.get_state()))
    expected = take(one, 4)
    again = make_stream(num_workers=num_workers)
    again.set_state(position)
    assert same(expected, take(again, 4)) and again.get_state()["next_example"] == 72
    again.set_state(position)  # a stream that has run may be set back
    assert same(expected, take(again, 4))
    one.close(), again.close()


@pytest.mark.parametrize("before,after", [(1, 2), (4, 2), (2, 1)])
def test_another_number_of_processes_goes_on_with_the_same_examples(make_stream, before, after):
    """Nothing repeated, nothing dropped: row r of process p of P is row r P + p of the whole batch."""
    whole = make_stream()
    expected = take(whole, 6)
    first = [make_stream(process_index=p, process_count=before) for p in range(before)]
    rows = [take(stream, 3) for stream in first]
    second = [make_stream(process_index=p, process_count=after) for p in range(after)]
    for stream in second:
        stream.set_state(first[0].get_state())
    rows2 = [take(stream, 3) for stream in second]
    for parts, expected_part in ((rows, expected[:3]), (rows2, expected[3:])):
        for step, batch in enumerate(expected_part):
            for p, part in enumerate(parts):
                for x, y in zip(leaves([batch]), leaves([part[step]]), strict=True):
                    np.testing.assert_array_equal(x[p :: len(parts)], y)
    for stream in (whole, *first, *second):
        stream.close()


def test_another_batch_size_goes_on_with_the_same_examples(make_stream):
    a, b = make_stream(batch_size=8), make_stream(batch_size=4)
    b.set_state({**a.get_state(), "next_example": 8})
    expected = take(a, 3)[1:]
    for x, (y, z) in zip(expected, [take(b, 2), take(b, 2)], strict=True):
        for p, q, r in zip(leaves([x]), leaves([y]), leaves([z]), strict=True):
            np.testing.assert_array_equal(p, np.concatenate([q, r]))
    a.close(), b.close()


def test_each_epoch_reads_every_example_once_in_another_order(folder):
    stored = TokenShards(folder, "train")
    stream = data.examples([stored], [1.0], seed=0)
    rows = [tuple(stream[i][1][1]["rgb_tokens"]) for i in range(100)]
    everything = [tuple(stored[i]["rgb_tokens"]) for i in range(50)]
    assert sorted(rows[:50]) == sorted(rows[50:]) == sorted(everything)
    assert rows[:50] != everything and rows[:50] != rows[50:]


def test_the_shuffle_is_global(folder):
    """The first examples come from all shards: no buffer, no order of files."""
    stored = TokenShards(folder, "train")
    index = {tuple(stored[i]["rgb_tokens"]): i for i in range(50)}
    stream = data.examples([stored], [1.0], seed=0)
    first = [index[tuple(stream[i][1][1]["rgb_tokens"])] // 16 for i in range(20)]
    assert set(first) >= {0, 1, 2} and len(set(first[:5])) > 1


def test_a_mixture_keeps_its_weights_and_each_its_strategies(tmp_path, folder, make_stream, make_example, modalities):
    """3 : 1 to within one example at any time; each data set is masked by its own mixture, and knows no other."""
    words = write_shards(tmp_path / "words", [{"caption": make_example(i)["caption"]} for i in range(7)])
    datasets = [
        Dataset(tokens=str(folder), weight=3.0),
        Dataset(
            tokens=str(words),
            weight=1.0,
            masking=DirichletMasking(strategies=(Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0}),)),
        ),
    ]
    stream = data.examples([TokenShards(f, "train") for f in (folder, words)], [3.0, 1.0], seed=3)
    which = np.array([stream[i][1][0] for i in range(400)])
    assert np.abs(np.cumsum(which == 1) - np.arange(1, 401) / 4).max() <= 1
    batches = take(make_stream((folder, words), datasets), 10)
    caption, rows = modalities.index("caption"), np.concatenate([b.inputs.modality for b in batches])
    valid = np.concatenate([b.inputs.valid for b in batches])
    only_caption = np.array([(m[v] == caption).all() for m, v in zip(rows, valid, strict=True)])
    assert only_caption[which[:80] == 1].all() and not only_caption[which[:80] == 0].all()


def test_batches_are_placed_before_they_are_asked_for(make_stream):
    """What becomes of a batch happens in the background, in order; an error in it is not swallowed."""
    placed = []
    stream = make_stream(place=lambda batch: placed.append(len(placed)) or len(placed))
    assert [next(stream), next(stream)] == [1, 2]
    for _ in range(100):
        if len(placed) > 2:
            break
        time.sleep(0.05)
    assert len(placed) > 2
    stream.close()

    def fail(batch):
        raise RuntimeError("no room")

    stream = make_stream(place=fail)
    with pytest.raises(RuntimeError, match="no room"):
        next(stream)
    stream.close()


def test_missing_truncated_and_damaged_shards_are_named(folder):
    """Before any reading where that can be seen; a flipped bit with its shard and record where it is read."""
    shard = sorted(folder.glob("*.array_record"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"{shard.name} has .* bytes instead of"):
        TokenShards(folder, "train")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        TokenShards(folder, "train")
    with pytest.raises(ValueError, match="no finished split 'trian'; allowed: train. Did you mean 'train'"):
        TokenShards(folder, "trian")


def test_no_flipped_bit_is_read_as_data(folder):
    """Wherever a bit of a shard is flipped, a record is read as it was or is an error that names shard and record."""
    shard = sorted(folder.glob("*.array_record"))[1]
    whole, original = shard.read_bytes(), [TokenShards(folder, "train")[i] for i in range(16, 32)]
    rng, noticed = np.random.default_rng(0), 0
    for place in rng.integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        shard.write_bytes(bytes(damaged))
        for i in range(16):
            try:
                record = TokenShards(folder, "train")[16 + i]
            except ValueError as error:
                assert f"record {i} of token shard {shard} cannot be read" in str(error)
                noticed += 1
            else:
                assert {k: v.tobytes() for k, v in record.items()} == {k: v.tobytes() for k, v in original[i].items()}
    assert noticed


def test_a_damaged_shard_stops_the_stream_with_its_name(folder, make_stream):
    shard = sorted(folder.glob("*.array_record"))[1]
    original = shard.read_bytes()
    whole = bytearray(original)
    whole[len(whole) // 2 :] = bytes(len(whole) - len(whole) // 2)
    shard.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match=f"token shard .*{shard.name} cannot be read"):
        make_stream()
    shard.write_bytes(bytes(original))
    for num_workers in (0, 1):  # damaged after it was verified
        stream = make_stream(num_workers=num_workers)
        shard.write_bytes(bytes(whole))
        with pytest.raises(Exception, match=f"token shard .*{shard.name} cannot be read"):
            take(stream, 8)
        stream.close()
        shard.write_bytes(bytes(original))


def test_a_position_in_another_stream_is_refused(tmp_path, make_stream, make_example, folder):
    """Another seed, weight or data set; the same shards elsewhere are the same stream."""
    stream = make_stream()
    take(stream, 2)
    moved = shutil.copytree(folder, tmp_path / "moved")
    other = write_shards(tmp_path / "other", [make_example(i) for i in range(49)])
    make_stream((moved,)).set_state(stream.get_state())
    for changed in (make_stream(seed=4), make_stream((other,)), make_stream((folder, other))):
        with pytest.raises(ValueError, match="the saved position is one in another stream"):
            changed.set_state(stream.get_state())
    stream.close()


def test_an_error_of_a_batch_does_not_skip_it(make_stream):
    """The position stays at the batch that failed, which is made again."""
    room = [True, False, True, True, True, True, True, True]

    def place(batch):
        if not room.pop(0):
            raise RuntimeError("no room")
        return batch

    whole, stream = make_stream(), make_stream(place=place)
    expected = take(whole, 3)
    found = take(stream, 1)
    with pytest.raises(RuntimeError, match="no room"):
        next(stream)
    assert stream.get_state()["next_example"] == 8
    assert same(expected, [*found, *take(stream, 2)])
    whole.close(), stream.close()


def test_bad_numbers_are_named_before_any_reading(folder, make_stream):
    with pytest.raises(ValueError, match="50 examples are fewer than one batch of 64"):
        make_stream(batch_size=64)
    with pytest.raises(ValueError, match="batch_size=9 must be a multiple of the number of processes, 2"):
        make_stream(batch_size=9, process_count=2)
    for fields, message in (
        ({}, "needs a source or tokens"),
        ({"tokens": "x", "weight": 0.0}, "weight=0.0 must be positive"),
        ({"tokens": "x", "skip_bad": 1.0}, "skip_bad=1.0 must be at least 0 and less than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset(**fields)


def test_fingerprint_sees_every_change():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


# A consumer that notes the digest of every batch, and saves its position now and then, as a run does.
CONSUMER = """
import hashlib, json, os, sys, time
import numpy as np
from m4.registry import from_json
from m4.files import write_atomically
from m4.data.dataset import Dataset
from m4.data.stream import Stream
from m4.data.token_shards import TokenShards
from m4.tokens.modality import Modalities
from pathlib import Path

def main(folder, index, count, workers, num_batches):
    folder = Path(folder)
    masking, modalities = (from_json(x) for x in json.loads((folder / "setting.json").read_text()))
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and (p / "train.json").exists())
    datasets = [Dataset(tokens=str(folder / n), weight=1.0 + k) for k, n in enumerate(names)]
    stream = Stream([TokenShards(folder / n, "train") for n in names], datasets, masking, Modalities(modalities),
                    batch_size=8, seed=3, process_index=index, process_count=count, num_workers=workers)
    saved = folder / f"position-{index}-of-{count}.json"
    if saved.exists():
        stream.set_state(json.loads(saved.read_text()))
    while stream.get_state()["next_example"] < 8 * num_batches:
        number = stream.get_state()["next_example"]
        batch = next(stream)
        arrays = (*batch.inputs, *batch.targets, *batch.features.values())
        for row in range(len(arrays[0])):
            digest = hashlib.sha256(b"".join(np.ascontiguousarray(a[row]).tobytes() for a in arrays)).hexdigest()[:16]
            with open(folder / f"digests-{index}-of-{count}.txt", "a") as file:
                file.write(f"{number + row * count + index} {digest}\\n")
        if number % 24 == 0:
            write_atomically(saved, json.dumps(stream.get_state()).encode())
        time.sleep(0.01)
    write_atomically(saved, json.dumps(stream.get_state()).encode())
    stream.close()

if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
"""


@pytest.fixture
def consumer(tmp_path, folder, masking, modalities, make_example):
    from m4.registry import to_json

    write_shards(tmp_path / "words", [{"caption": make_example(i)["caption"]} for i in range(30)])
    (tmp_path / "setting.json").write_text(json.dumps([to_json(masking), [to_json(m) for m in modalities]]))
    (tmp_path / "consumer.py").write_text(CONSUMER)

    def start(index=0, count=1, workers=0, num_batches=60):
        arguments = [sys.executable, "consumer.py", str(tmp_path), *map(str, (index, count, workers, num_batches))]
        with open(tmp_path / "stderr.txt", "w") as errors:
            return subprocess.Popen(arguments, cwd=tmp_path, env=environment(), start_new_session=True, stderr=errors)

    return start


def digests(tmp_path, index=0, count=1):
    """{example number: digest}; an example that was read twice must be the same both times."""
    found = {}
    for line in (tmp_path / f"digests-{index}-of-{count}.txt").read_text().splitlines():
        number, digest = line.split()
        assert found.setdefault(int(number), digest) == digest, f"example {number} changed after a restart"
    return found


def expected_digests(tmp_path, consumer, num_batches=60):
    assert consumer(num_batches=num_batches).wait(timeout=100) == 0
    found = digests(tmp_path)
    (tmp_path / "digests-0-of-1.txt").unlink()
    (tmp_path / "position-0-of-1.json").unlink()
    return found


def kill_at_random(tmp_path, consumer, count, workers, *, kills, rng, num_batches):
    """Runs `count` processes to the end, each killed with its workers `kills` times at random moments."""
    for index in range(count):
        for _ in range(kills):
            process = consumer(index, count, workers, num_batches)
            log = tmp_path / f"digests-{index}-of-{count}.txt"
            before, deadline = log.stat().st_size if log.exists() else 0, time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:  # until it has started to read
                if log.exists() and log.stat().st_size > before:
                    break
                time.sleep(0.01)
            time.sleep(rng.random() * 0.3)
            if workers and rng.random() < 0.5:  # the process alone: its workers must not live on
                children = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                _, alive = psutil.wait_procs(children, timeout=30)
                assert not alive, "workers outlive their killed parent"
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process = consumer(index, count, workers, num_batches)
        assert process.wait(timeout=200) == 0, (tmp_path / "stderr.txt").read_text()


def test_a_killed_stream_goes_on_with_the_same_examples(tmp_path, consumer):
    expected = expected_digests(tmp_path, consumer)
    assert sorted(expected) == list(range(480))
    kill_at_random(tmp_path, consumer, 1, 0, kills=2, rng=random.Random(0), num_batches=60)
    assert digests(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("count,workers", [(1, 2), (2, 1)])
def test_twenty_kills_change_nothing(tmp_path, consumer, count, workers):
    """SIGKILL at random moments, of the process alone or with its workers; one process and two."""
    expected = expected_digests(tmp_path, consumer, num_batches=240)
    rng = random.Random(1)
    kill_at_random(tmp_path, consumer, count, workers, kills=20 // count, rng=rng, num_batches=240)
    assert union(tmp_path, [(i, count) for i in range(count)]) == expected


@pytest.mark.slow
def test_twenty_kills_of_four_processes_then_two(tmp_path, consumer):
    expected = expected_digests(tmp_path, consumer, num_batches=240)
    rng = random.Random(2)
    kill_at_random(tmp_path, consumer, 4, 1, kills=3, rng=rng, num_batches=120)
    for index in range(2):
        (tmp_path / f"position-{index}-of-2.json").write_bytes((tmp_path / "position-0-of-4.json").read_bytes())
    kill_at_random(tmp_path, consumer, 2, 1, kills=4, rng=rng, num_batches=240)
    assert union(tmp_path, [(0, 4), (1, 4), (2, 4), (3, 4), (0, 2), (1, 2)]) == expected


def union(tmp_path, parts):
    """Digests of several processes, which share no example."""
    found = {}
    for index, count in parts:
        part = digests(tmp_path, index, count)
        assert not part.keys() & found.keys()
        found.update(part)
    return found


def test_four_processes_then_two(tmp_path, consumer):
    """Two go on from where four had saved, and together read what one would."""
    expected = expected_digests(tmp_path, consumer)
    for index in range(4):
        assert consumer(index, 4, 0, 30).wait(timeout=100) == 0
    for index in range(2):
        (tmp_path / f"position-{index}-of-2.json").write_bytes((tmp_path / "position-0-of-4.json").read_bytes())
        assert consumer(index, 2, 0, 60).wait(timeout=100) == 0
    assert union(tmp_path, [(0, 4), (1, 4), (2, 4), (3, 4), (0, 2), (1, 2)]) == expected


def test_a_dead_worker_is_an_error_not_a_hang(make_stream):
    stream = make_stream(num_workers=1)
    take(stream, 2)
    workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 1
    workers[0].kill()
    with pytest.raises(Exception, match="(?i)worker|process"):
        take(stream, 50)
    stream.close()


def test_another_batch_size_goes_on_at_the_next_example(make_stream):
    """Examples are those that come next in the stream, whatever the sizes of the batches before and after."""
    sizes, position, rows = [(8, 3), (2, 5), (6, 2), (8, 1)], None, []
    for batch_size, count in sizes:
        stream = make_stream(batch_size=batch_size)
        if position:
            stream.set_state(position)
        rows += [row for batch in take(stream, count) for row in by_row(batch)]
        position = stream.get_state()
        stream.close()
    whole = make_stream(batch_size=1)
    expected = [by_row(batch)[0] for batch in take(whole, len(rows))]
    whole.close()
    assert len(rows) == sum(size * count for size, count in sizes) == position["next_example"]
    for a, b in zip(rows, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def by_row(batch):
    return [*zip(*leaves([batch]), strict=True)]
