"""Token shards and the stream: whole or absent, exactly resumable, the same for any number of processes."""

import numpy as np
import pytest

from m4 import data
from m4.components import fingerprint


class Identity:
    """A tokenizer of stored arrays, which counts its calls."""

    def __init__(self, modality):
        self.modality, self.num_calls = modality, 0

    def signal_of(self, example):
        return example[self.modality.signal] if self.modality.signal in example else None

    def encode(self, signals):
        self.num_calls += 1
        return list(signals)


@pytest.fixture
def tokenizers(modalities):
    return {m.name: Identity(m) for m in modalities}


@pytest.fixture
def examples(make_example):
    """Raw examples by signal; rgb is stored twice, as pixels by one tokenizer and as ids by another: keep one."""
    return [{k.replace("_tokens", ""): v for k, v in make_example(i).items() if k != "rgb_pixels"} for i in range(50)]


@pytest.fixture
def shards(tmp_path, tokenizers, examples, monkeypatch):
    monkeypatch.setattr(data, "EXAMPLES_PER_SHARD", 16)
    tokenizers = {k: v for k, v in tokenizers.items() if k != "rgb_pixels"}
    data.pretokenize(examples, tokenizers, tmp_path, "train", tokenizer_hashes={})
    return tmp_path, tokenizers


def test_shards_hold_the_examples_in_the_smallest_type(shards, examples):
    stored = data.TokenShards(shards[0], "train")
    assert len(stored) == 50
    for i in (0, 15, 16, 49):
        record = stored[i]
        assert set(record) == {"rgb_tokens", "depth_tokens", "caption"}
        np.testing.assert_array_equal(record["caption"], examples[i]["caption"])
        assert record["caption"].dtype == np.uint8


def test_a_missing_signal_leaves_its_modality_out(tmp_path, tokenizers):
    tokenizers = {"caption": tokenizers["caption"], "depth_tokens": tokenizers["depth_tokens"]}
    rows = [{"caption": np.array([20, 3])}, {"depth": np.zeros(12, int)}]
    data.pretokenize(rows, tokenizers, tmp_path, "train", tokenizer_hashes={})
    stored = data.TokenShards(tmp_path, "train")
    assert [set(stored[i]) for i in range(2)] == [{"caption"}, {"depth_tokens"}]


def test_pretokenization_goes_on_where_it_was_killed(shards, examples):
    """Finished shards are kept as they are, half-written ones are never seen, and the result has the same bytes."""
    folder, tokenizers = shards
    files = sorted(folder.glob("*.array_record"))
    assert len(files) == 4
    content = {f.name: f.read_bytes() for f in files}
    files[1].unlink()
    (folder / "train.json").unlink()
    (folder / f".{files[1].name}.77.tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match="no finished split"):
        data.TokenShards(folder, "train")
    for t in tokenizers.values():
        t.num_calls = 0
    data.pretokenize(examples, tokenizers, folder, "train", tokenizer_hashes={})
    assert {t.num_calls for t in tokenizers.values()} == {1}
    assert {f.name: f.read_bytes() for f in folder.glob("*.array_record")} == content


def test_missing_truncated_and_damaged_shards_are_named(shards):
    folder, _ = shards
    shard = sorted(folder.glob("*.array_record"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"{shard.name} has .* bytes instead of"):
        data.TokenShards(folder, "train")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        data.TokenShards(folder, "train")
    with pytest.raises(ValueError, match="no finished split 'trian'; allowed: train. Did you mean 'train'"):
        data.TokenShards(folder, "trian")


def test_ids_outside_the_vocabulary_are_refused(modalities):
    with pytest.raises(ValueError, match=r"depth_tokens: ids 0..7 outside \[0, 7\)"):
        data.compact(np.arange(8), modalities.named("depth_tokens"))


def take(stream, count):
    return [next(stream) for _ in range(count)]


def leaves(batches):
    return [np.asarray(x) for b in batches for x in (*b.inputs, *b.targets, *b.features.values())]


def test_the_stream_resumes_exactly_and_for_any_number_of_processes(shards, masking, modalities):
    """From a saved position the same batches follow; two processes read the halves of what one process reads."""
    strategies = masking.strategies
    make = lambda **k: data.batches(shards[0], "train", masking, modalities, batch_size=8, seed=3, **k)  # noqa: E731
    one = make()
    take(one, 5)
    position = one.get_state()
    expected = take(one, 4)
    again = make()
    again.set_state(position)
    for a, b in zip(leaves(expected), leaves(take(again, 4)), strict=True):
        np.testing.assert_array_equal(a, b)
    halves = [make(process_index=i, process_count=2) for i in range(2)]
    for h in halves:
        h.set_state(position)
    rows = [take(h, 4) for h in halves]
    for step in range(4):
        whole = {tuple(r) for r in expected[step].inputs.ids}
        parts = {tuple(r) for half in rows for r in half[step].inputs.ids}
        assert whole == parts
    for stream in (one, again, *halves):
        stream.close()
    assert strategies == masking.strategies


def test_each_epoch_reads_every_example_once(shards, masking, modalities, monkeypatch):
    monkeypatch.setattr(data.Mask, "__call__", lambda self, example, rng: np.resize(example["rgb_tokens"], 12))
    stream = data.batches(shards[0], "train", masking, modalities, batch_size=10, seed=0)
    rows = [tuple(row) for batch in take(stream, 10) for row in batch]
    stream.close()
    stored = data.TokenShards(shards[0], "train")
    everything = [tuple(stored[i]["rgb_tokens"]) for i in range(50)]
    assert sorted(rows[:50]) == sorted(rows[50:]) == sorted(everything)
    assert rows[:50] != everything and rows[:50] != rows[50:]


def test_batch_larger_than_the_data_is_refused(shards, masking, modalities):
    with pytest.raises(ValueError, match="50 examples, fewer than one batch of 64"):
        data.batches(shards[0], "train", masking, modalities, batch_size=64, seed=0)


def test_fingerprint_sees_every_change():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
