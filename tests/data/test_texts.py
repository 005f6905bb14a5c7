"""Lines of text files come back as they stand there, in one split each, and bad ones are named."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m4.data.sources import texts
from m4.data.sources.texts import SPLITS, Texts
from m4.registry import from_json, to_json


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


# ---- Encodings and line ends ----------------------------------------------------------------------------------------

DOCUMENTS = ["ein Löwe", "two words", "獅子 και λιοντάρι", "the last"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("is_closed", [True, False])
def test_lines_end_as_on_any_system(tmp_path, monkeypatch, end, suffix, mark, is_closed):
    """LF, CR LF, and the CR of old Macs, also where a chunk that is read ends between or within them."""
    written = [json.dumps({"text": d}, ensure_ascii=False) if suffix == ".jsonl" else d for d in DOCUMENTS]
    file = tmp_path / f"a{suffix}"
    file.write_bytes(mark + (end.join(written) + end * is_closed).encode())
    for chunk in (1, 2, 7, 2**20):
        monkeypatch.setattr(texts, "CHUNK", chunk)
        assert [line.strip().removeprefix(mark) for _, line in texts.lines(str(file))] == [d.encode() for d in written]
    train = prepared(tmp_path, file, validation_share=0, test_share=0)["train"]
    assert captions(train) == DOCUMENTS
    assert [example["file"] for example in train] == [f"{file}:{i}" for i in range(1, 5)]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize(
    "encoding, reason",
    [
        ("utf-16", "is UTF-16, by its first bytes"),
        ("utf-32", "is UTF-32, by its first bytes"),
        ("utf-16-le", "is not UTF-8: byte 1 is NUL"),
        ("utf-16-be", "is not UTF-8: byte 0 is NUL"),
        ("utf-32-le", "is not UTF-8: byte 1 is NUL"),
        ("utf-32-be", "is not UTF-8: byte 0 is NUL"),
    ],
)
def test_wide_encodings_are_refused_by_file(tmp_path, suffix, encoding, reason):
    documents = ["a red cube", "a blue cube"]
    written = [json.dumps({"text": d}) if suffix == ".jsonl" else d for d in documents]
    file = tmp_path / f"a{suffix}"
    for end in ("\n", "\r\n", "\r"):
        file.write_bytes(end.join(written * 500).encode(encoding))
        with pytest.raises(ValueError, match=f"^{file} {reason}.*[Ss]ave it as UTF-8"):
            prepared(tmp_path, file)
    assert not list((tmp_path / "data").rglob("*.int64"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman", "cp437"])
def test_lines_of_other_encodings_are_errors_of_their_own(tmp_path, encoding):
    """Those of ASCII alone are the same in UTF-8."""
    file = tmp_path / "a.txt"
    file.write_bytes("plain\ncafé à gogo\nalso plain\n".encode(encoding))
    train = prepared(tmp_path, file, validation_share=0, test_share=0)["train"]
    assert [train[i]["caption"] for i in (0, 2)] == ["plain", "also plain"]
    with pytest.raises(ValueError, match=r"a\.txt:2: not UTF-8 at byte 4 of the line"):
        train[1]


def test_a_nul_far_into_a_file_is_an_error_of_its_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"word\n" * 1000 + b"w\0o\0\n" + b"word\n")
    train = prepared(tmp_path, file, validation_share=0, test_share=0)["train"]
    assert len(train) == 1002 and train[1001]["caption"] == "word"
    with pytest.raises(ValueError, match=r"a\.txt:1001: not a text: character 2 of the line is NUL"):
        train[1000]


def test_mixed_line_ends_are_refused_if_cr_prevails(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\rtwo\rthree\n")
    with pytest.raises(ValueError, match=rf"^{file} has 2 lines that end in CR, as on old Macs, and 1 that end in LF"):
        prepared(tmp_path, file)
    file.write_bytes(b"progress 1%\rprogress 2%\ntwo\nthree\n")  # a CR within a line is white space, as before
    train = prepared(tmp_path, file, validation_share=0, test_share=0)["train"]
    assert captions(train) == ["progress 1%\rprogress 2%", "two", "three"]


def test_a_key_that_is_there_twice_is_an_error(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "text": "two"}\n{"text": "three", "n": 1, "n": 2, "score": NaN}\n')
    train = prepared(tmp_path, file, validation_share=0, test_share=0)["train"]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not JSON: the key 'text' is there twice"):
        train[0]
    assert train[1]["caption"] == "three"  # what is not read may be as it likes


def test_damage_to_the_index_is_noticed_and_mended(tmp_path):
    """Every flip and cut, of the index or its digest: an error with its name, and `prepare` makes it again."""
    (tmp_path / "a.txt").write_text("".join(f"document {i}\n" for i in range(50)))
    source = Texts(files=(str(tmp_path / "a.txt"),), validation_share=0, test_share=0)
    source.prepare(tmp_path)
    expected, rng = captions(source.split("train", tmp_path)), np.random.default_rng(0)
    index = source.index(tmp_path)
    whole = {file: file.read_bytes() for file in (index, index.with_suffix(".json"))}
    for number in range(60):
        file = [*whole][number % 2]
        changed = bytearray(whole[file])
        if rng.random() < 0.2:
            del changed[rng.integers(len(changed)) :]
        else:
            changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        try:
            assert captions(source.split("train", tmp_path)) == expected
            assert file.suffix == ".json"  # white space
        except ValueError as error:
            assert index.stem in str(error)
            source.prepare(tmp_path)
            assert {file: file.read_bytes() for file in whole} == whole
        file.write_bytes(whole[file])
