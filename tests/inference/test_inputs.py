"""Samples from --inputs: pairs by name, tables of prompts, names of folders that are safe and differ."""

import json
import os
import unicodedata

import pytest

from m4.files import check_name
from m4.inference.inputs import TAKEN, beside, read_inputs, sample_names


def fill(folder, *names: str):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def values(samples) -> dict[str, dict[str, str]]:
    return {s.name: {n: os.path.basename(v) for n, v in s.values.items()} for s in samples}


def test_folders_are_paired_by_the_names_of_their_files(tmp_path):
    """In any number, whatever the extensions and the order in which they are listed; single values stand in each."""
    rgb = fill(tmp_path / "rgb", "10.png", "2.jpg", "a.b.png", ".hidden")
    depth = fill(tmp_path / "depth", "2.npy", "a.b.npy", "10.npy")
    boxes = fill(tmp_path / "boxes", "a.b.json", "10.json", "2.json")
    samples, table = read_inputs([f"rgb={rgb}", "caption=a cube", f"depth={depth}", f"boxes#2={boxes}"])
    assert table is None and [*values(samples)] == ["10", "2", "a.b"]
    for stem, row in values(samples).items():
        assert row == {"rgb": f"{stem}.{'jpg' if stem == '2' else 'png'}", "caption": "a cube",
                       "depth": f"{stem}.npy", "boxes#2": f"{stem}.json"}  # fmt: skip


@pytest.mark.parametrize(
    "first,second,messages",
    [
        (["1", "2", "3"], ["1", "3", "4"], ["lacks 4 (", "lacks 2 (", "2.png", "4.npy"]),
        (["1", "2"], ["1"], ["depth=", "lacks 2 ("]),
        (["1"], ["1", "2"], ["rgb=", "lacks 2 ("]),
        (["IMG_1"], ["img_1"], ["IMG_1", "img_1", "another case"]),
        (["café"], [unicodedata.normalize("NFD", "café")], [r"caf\xe9", r"cafe\u0301", "another Unicode form"]),
        (["CAFÉ"], [unicodedata.normalize("NFD", "café")], [r"CAF\xc9", r"cafe\u0301", "another case"]),
        ([f"{i}" for i in range(9)], [f"{i}" for i in range(1)], ["and 3 more"]),
    ],
)
def test_what_has_no_partner_is_named(first, second, messages, tmp_path):
    a = fill(tmp_path / "a", *(f"{stem}.png" for stem in first))
    b = fill(tmp_path / "b", *(f"{stem}.npy" for stem in second))
    for items in ([f"rgb={a}", f"depth={b}"], [f"depth={b}", f"rgb={a}"]):
        with pytest.raises(ValueError, match="paired by their names") as error:
            read_inputs(items)
        assert all(m in str(error.value) for m in messages), error.value


def test_two_files_of_one_name_are_refused_in_pairs_and_kept_apart_alone(tmp_path):
    rgb, depth = fill(tmp_path / "rgb", "a.png", "a.jpg", "b.png"), fill(tmp_path / "depth", "a.npy", "b.npy")
    with pytest.raises(ValueError, match=r"two files of one name, .*a\.jpg and .*a\.png"):
        read_inputs([f"rgb={rgb}", f"depth={depth}"])
    assert values(read_inputs([f"rgb={rgb}"])[0]) == {
        "a.jpg": {"rgb": "a.jpg"}, "a.png": {"rgb": "a.png"}, "b": {"rgb": "b.png"},
    }  # fmt: skip


def test_folders_within_folders_are_said_and_what_is_no_file_is_not_left_out(tmp_path, capsys):
    folder = fill(tmp_path / "rgb", "a.png")
    (folder / "more").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    (folder / "zero.png").symlink_to("/dev/zero")
    assert [*values(read_inputs([f"rgb={folder}"])[0])] == ["a", "gone", "pipe", "zero"]
    assert "1 folder(s) in it are not read: more" in capsys.readouterr().err
    with pytest.raises(ValueError, match="empty folder"):
        read_inputs([f"rgb={folder / 'more'}"])


def table(tmp_path, data: bytes):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(data)
    samples, path = read_inputs([str(file)])
    assert path == file
    return samples


KINDS = {"rgb": "image", "caption": "text", "boxes": "boxes"}
LINES = [{"caption": "a red cube"}, {"caption": "käse \U0001f9c0", "boxes": "[]"}, {"caption": 'the "x"\\n'}]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_every_line_of_a_table_is_a_sample(end, mark, is_ascii, tmp_path):
    text = end.join(json.dumps(line, ensure_ascii=is_ascii) for line in LINES)
    for last in ("", end):
        samples = table(tmp_path, mark + (text + last).encode())
        assert [dict(s.values) for s in samples] == LINES and not any(s.error for s in samples)


BAD_LINES = {
    b'{"caption": "a \\ud83d cube"}': "half a surrogate pair",
    b'{"caption": "caf\xe9"}': "not UTF-8: byte",
    b'{"caption": "a"': "not JSON",
    b'{"caption": 1}': "a line must be like",
    b'["caption"]': "a line must be like",
    b"{}": "a line must be like",
    b'{"caption": "a", "caption": "b"}': "there twice",
    b"[" * 5000: "nested too deeply",
    b'{"caption": "\xff\xfe"}': "not UTF-8",
    b'{"caption": "a\0"}': "NUL",
    b'{"caption": NaN}': "NaN is not a JSON number",
    b'{"caption": "a"} {"caption": "b"}': "not JSON: Extra data",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_the_others_are_samples(line, tmp_path):
    good = b'{"caption": "a cube"}'
    samples = table(tmp_path, b"\n".join([good, line, b"", good]))
    assert [s.name for s in samples] == ["0000", "0001", "0002"]
    assert [bool(s.error) for s in samples] == [False, True, False]
    assert "prompts.jsonl, line 2: " in samples[1].error and BAD_LINES[line] in samples[1].error
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1: "):
        table(tmp_path, line)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_tables_of_other_encodings_are_refused_by_name(encoding, tmp_path):
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1: .*UTF-(8|16)"):
        table(tmp_path, "".join(json.dumps(line) + "\n" for line in LINES).encode(encoding))


@pytest.mark.parametrize("what,message", [("pipe", "a FIFO; allowed: files"), ("zero", "a device; allowed"),
                                          ("folder", "a folder; allowed"), ("gone", r"cannot be read \(No such"),
                                          ("empty", "is empty")])  # fmt: skip
def test_tables_that_are_none(what, message, tmp_path):
    file = tmp_path / "prompts.jsonl"
    {"pipe": os.mkfifo, "folder": os.mkdir, "empty": lambda f: f.write_bytes(b"\n \n"), "gone": lambda f: None,
     "zero": lambda f: f.symlink_to("/dev/zero")}[what](file)  # fmt: skip
    with pytest.raises(ValueError, match=message):
        read_inputs([str(file)])


def test_paths_of_a_table_are_those_beside_it(tmp_path, monkeypatch):
    """Then those of the working folder; a text is never a path, whatever files there are."""
    fill(tmp_path / "there", "a.png", "both.png", "a cube")
    fill(tmp_path / "here", "b.png", "both.png", "a cube")
    rows = [{"rgb": "a.png", "caption": "a cube"}, {"rgb": "b.png"}, {"rgb": "both.png"}, {"rgb": "none.png"}]
    (tmp_path / "there/p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path / "here")
    samples, path = read_inputs(["../there/p.jsonl"])
    samples = beside(samples, path, {"rgb": "image", "caption": "text"})
    assert [str(s.values["rgb"]) for s in samples] == ["../there/a.png", "b.png", "../there/both.png", "none.png"]
    assert samples[0].values["caption"] == "a cube"
    assert [s.name for s in samples] == ["a", "b", "both", "none"]


def test_lines_are_named_by_the_files_that_differ_or_by_number(tmp_path):
    def names(*rows):
        samples = table(tmp_path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return [s.name for s in beside(samples, tmp_path / "x.jsonl", KINDS)]

    assert names({"rgb": "a.png", "caption": "v1.txt"}, {"rgb": "b.png", "caption": "v2.png"}) == ["a", "b"]
    assert names({"rgb": "a.png"}, {"rgb": "a.png"}) == ["0000", "0001"]
    assert names({"rgb": "a.png"}, {"caption": "b.png"}) == ["0000", "0001"]
    assert names({"boxes": '[{"bbox": 1.5}]'}, {"boxes": "b.json"}) == ["0000", "0001"]
    assert names({"rgb": "a.png"}, {}, {"rgb": "b.png"}) == ["a", "0001", "b"]  # a bad line has no file


ODD = [
    *(
        "..",
        "...",
        ".",
        ".hidden",
        "~",
        "a/b",
        "a\\b",
        "a b",
        "a\tb",
        "a\nb",
        "a:b",
        "*",
        "a?",
        "a<",
        " ",
        "\0",
        "\u202e",
    ),
    *("con", "AUX", "nul.x", "com1", "sheet.png", "failed.tsv", "Sheet.PNG", "caf\udce9", "caf\udce8"),
    *("x" * 300, "x" * 299 + "y", "ä" * 200, "日本", "cafe\u0301", "-", "--out", "0000", "a_b", "a_b-2", "a@b", "a+b"),
]


def test_names_are_safe_and_differ_and_safe_ones_stay():
    for stems in (ODD, ODD[::-1], [*ODD, *ODD], [""] * 3 + ODD):
        names = sample_names(stems)
        assert len({*names}) == len(stems) and not {*names} & {*TAKEN}
        for name in names:
            check_name(name, "a sample")
            assert os.path.dirname(os.path.normpath(f"out/{name}")) == "out"
            name.encode()
        for stem in ("日本", "cafe\u0301", "-", "0000", "a_b", "a_b-2", "a@b", "a+b"):
            assert names[stems.index(stem)] == stem
    assert sample_names(ODD) == sample_names(ODD)
    assert sample_names(["a b", "c"]) == ["a_b", "c"] and sample_names(["", "", "x"]) == ["0000", "0001", "x"]
    assert sample_names(["a b", "a_b", "a\tb"]) == ["a_b-2", "a_b", "a_b-3"]
