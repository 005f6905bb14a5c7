"""Lines of text files come back as they stand there, in one split each, and bad ones are named."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m4.components import from_json, to_json
from m4.datasets import texts
from m4.datasets.texts import SPLITS, Texts


def prepared(tmp_path, *files, **fields) -> dict[str, list]:
    """All splits of freshly indexed files, as lists of examples."""
    source = Texts(files=tuple(str(file) for file in files), **fields)
    source.prepare(tmp_path / "data")
    return {name: source.split(name, tmp_path / "data") for name in SPLITS}


def captions(examples) -> list[str]:
    return [example["caption"] for example in examples]


def test_plain_and_json_lines(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_bytes("\ufeffein Löwe\r\n\n   \n  two words \n獅子".encode())
    lines.write_text('{"text": "a\\nb", "id": 1}\n\n{"id": 2, "text": "मेंढक "}\n')
    splits = prepared(tmp_path, plain, lines, validation_share=0, test_share=0)
    assert [len(splits[name]) for name in SPLITS] == [5, 0, 0]
    assert list(splits["train"]) == [
        {"caption": "ein Löwe", "file": f"{plain}:1"},
        {"caption": "two words", "file": f"{plain}:4"},
        {"caption": "獅子", "file": f"{plain}:5"},
        {"caption": "a\nb", "file": f"{lines}:1"},
        {"caption": "मेंढक", "file": f"{lines}:3"},
    ]
    assert splits["train"][-1] == splits["train"][np.int64(4)]
    with pytest.raises(IndexError, match="text 5 of 5"):
        splits["train"][5]
    assert list(pickle.loads(pickle.dumps(splits["train"]))) == list(splits["train"])


def test_signal_field_and_length(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one two three", "text": "x"}\n')
    splits = prepared(tmp_path, file, signal="t5", field="body", max_chars=8, validation_share=0, test_share=0)
    assert list(splits["train"]) == [{"t5": "one two", "file": f"{file}:1"}]
    source = splits["train"].texts
    assert from_json(to_json(source)) == source


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=30))
def test_any_text_comes_back(tmp_path_factory, documents):
    """Whatever the documents hold (line breaks of all kinds, quotes, any script), JSON lines give them in order."""
    tmp_path = tmp_path_factory.mktemp("texts")
    documents = [*documents, "the last"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": d}, ensure_ascii=len(d) % 2 == 0) + "\n" for d in documents))
    train = prepared(tmp_path, file, validation_share=0, test_share=0)["train"]
    assert len(train) == len(documents)
    for i, document in enumerate(documents):
        if document.strip():
            assert train[i]["caption"] == document.strip()
        else:
            with pytest.raises(ValueError, match=rf"a\.jsonl:{i + 1}: the text is empty"):
                train[i]


def test_splits_follow_the_text_alone(tmp_path):
    """Doubles, also those in the other format, share a split; reordering and joining files moves nothing."""
    rng = np.random.default_rng(0)
    documents = [f"document {i}" for i in rng.integers(0, 1500, 3000)]
    (tmp_path / "a.txt").write_text("\n".join(documents[:2000]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"id": i, "text": d}) for i, d in enumerate(documents)))
    (tmp_path / "c.txt").write_text("\n\n".join(documents[::-1]))
    shares = {"validation_share": 0.2, "test_share": 0.1}
    both = prepared(tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl", **shares)
    joined = prepared(tmp_path, tmp_path / "c.txt", **shares)
    sets = {name: set(captions(both[name])) for name in SPLITS}
    assert sets == {name: set(captions(joined[name])) for name in SPLITS}
    assert set.union(*sets.values()) == set(documents)
    assert sum(map(len, sets.values())) == len(set(documents))
    assert sum(len(both[name]) for name in SPLITS) == 5000
    for name, share in zip(SPLITS, (0.7, 0.2, 0.1), strict=True):
        assert abs(len(sets[name]) / len(set(documents)) - share) < 0.05


def test_patterns_give_each_file_once(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    files = (str(tmp_path / "c.txt"), str(tmp_path / "*.txt"))
    assert [os.path.basename(path) for path in Texts(files=files).paths()] == ["c.txt", "a.txt", "b.txt"]


def test_bad_lines_raise_when_they_are_read(tmp_path):
    """The rest of the file stays readable, and the message tells file, line and what is wrong."""
    file = tmp_path / "a.jsonl"
    bad = {
        1: (b'{"text": "caf\xe9"}', "not UTF-8 at byte 14 of the line"),
        2: (b'{"text": "a"', "not JSON: "),
        3: (b'["a"]', "must hold a JSON object, but this one is a list"),
        4: (b'{"txet": "a", "id": 1}', "no key 'text'; allowed: txet, id. Did you mean 'txet'?"),
        5: (b'{"text": 7}', "'text' has type int, but must be a string"),
        6: (b'{"text": " "}', "the text is empty"),
        7: (b'{"text": "\\ud83d"}', "'text' has half a surrogate pair"),
        8: (b"[" * 100_000, "not JSON: "),
    }
    file.write_bytes(b"\n".join(line for line, _ in bad.values()) + b'\n{"text": "good"}')
    train = prepared(tmp_path, file, validation_share=0, test_share=0)["train"]
    assert len(train) == 9 and train[8]["caption"] == "good"
    for line, (_, message) in bad.items():
        with pytest.raises(ValueError, match=re.escape(f"{file}:{line}: ") + ".*" + re.escape(message)):
            train[line - 1]


def test_bad_sources_raise_at_once(tmp_path):
    (tmp_path / "wiki.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no file .*wik\.txt\. Did you mean '.*wiki\.txt'"):
        Texts(files=(str(tmp_path / "wik.txt"),)).prepare(tmp_path)
    with pytest.raises(ValueError, match=r"no file .*\*\.jsonl"):
        Texts(files=(str(tmp_path / "*.jsonl"),)).prepare(tmp_path)
    with pytest.raises(ValueError, match="no file absent/x.txt$"):
        Texts(files=("absent/x.txt",)).prepare(tmp_path)
    for name, content, message in (
        ("a.csv", b"a", "has the ending '.csv'; allowed: .txt, .jsonl"),
        ("b.txt", b"", r"b\.txt:1: the file is empty"),
        ("c.txt", b"\n \n", r"c\.txt:2: the file has no line with text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Texts(files=(str(tmp_path / name),)).prepare(tmp_path)
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(ValueError, match=r"d\.txt is not a file"):
        Texts(files=(str(tmp_path / "d*"),)).prepare(tmp_path)
    with pytest.raises(ValueError, match=r"files is 'wiki\.txt', but must be one or more paths"):
        Texts(files="wiki.txt")
    with pytest.raises(ValueError, match="validation_share 0.5 and test_share 0.5 are given"):
        Texts(files=("a.txt",), validation_share=0.5, test_share=0.5)
    with pytest.raises(ValueError, match="max_chars is 0"):
        Texts(files=("a.txt",), max_chars=0)
    with pytest.raises(ValueError, match="signal must not be 'file'"):
        Texts(files=("a.txt",), signal="file")
    source = Texts(files=(str(tmp_path / "wiki.txt"),))
    with pytest.raises(ValueError, match="unknown split 'val'.*Did you mean 'validation'"):
        source.split("val", tmp_path)
    with pytest.raises(ValueError, match=r"no index .*; call Texts\.prepare"):
        len(source.split("train", tmp_path))


def test_the_index_is_made_once_and_anew_after_an_edit(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n")
    source = Texts(files=(str(file),), validation_share=0, test_share=0)
    source.prepare(tmp_path)
    before = source.signature(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", before)
    with monkeypatch.context() as patch:
        patch.setattr(texts, "parse", None)  # would fail if the file were read again
        source.prepare(tmp_path)
    os.utime(file, ns=(0, 0))
    assert source.signature(tmp_path) != before
    file.write_text("one\ntwo\nthree\n")
    assert source.signature(tmp_path) != before
    source.prepare(tmp_path)
    assert captions(source.split("train", tmp_path)) == ["one", "two", "three"]


def test_an_interrupted_index_is_absent(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    source = Texts(files=(str(tmp_path / "a.txt"),))

    def interrupt(data, where, field, parse=texts.parse):
        if data == b"three":
            raise KeyboardInterrupt
        return parse(data, where, field)

    with monkeypatch.context() as patch:
        patch.setattr(texts, "parse", interrupt)
        with pytest.raises(KeyboardInterrupt):
            source.prepare(tmp_path)
    assert list((tmp_path / "texts").iterdir()) == []
    source.prepare(tmp_path)
    assert sum(len(source.split(name, tmp_path)) for name in SPLITS) == 3
