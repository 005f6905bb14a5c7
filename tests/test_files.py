"""Files that are written whole or not at all, with digests; strict JSON; names; locks."""

import json
import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from m4 import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a[*].json"
    files.write_atomically(path, b"old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_leftovers_of_dead_writers_are_removed_and_those_of_living_ones_stay(tmp_path):
    dies = "import os, sys\nfrom m4.files import replacing\nwith replacing(sys.argv[1]) as t: os._exit(9)"
    subprocess.run([sys.executable, "-c", dies, str(tmp_path / "dead")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with files.replacing(tmp_path / "alive") as temporary:
        temporary.write_bytes(b"x")
        removed = files.remove_leftovers(tmp_path)
        assert [p.name.split(".")[1] for p in removed] == ["dead"] and temporary.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["alive"]


def test_every_flipped_bit_and_cut_of_a_json_file_is_noticed_or_harmless(tmp_path):
    path, value = tmp_path / "config.json", {"a": [1, 2.5, None], "name": "käse", "inf": float("inf")}
    files.write_json(path, value)
    assert files.read_json(path) == value
    data = path.read_bytes()
    rng, harmless = np.random.default_rng(0), 0
    for _ in range(400):
        changed = bytearray(data)
        if rng.random() < 0.2:
            del changed[rng.integers(len(data)) :]
        else:
            changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            assert files.read_json(path) == value  # white space alone
            harmless += 1
        except ValueError as error:
            assert "config.json" in str(error)
    assert harmless < 60


def test_json_without_a_digest_is_read(tmp_path):
    (tmp_path / "old.json").write_text('{"a": 1}')
    assert files.read_json(tmp_path / "old.json") == {"a": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 5000, "deep|JSON"),
        ("[" * 200_000, "deep"),
        ("NaN", "not a JSON number"),
        ("1e400", "beyond"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("1" * 5000, "JSON|digits"),
        ("'a'", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_json_of_users_is_refused_with_a_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        files.parse_json(text.encode())


def test_text_is_utf8_alone():
    assert files.decode_text("\ufeffä".encode()) == "ä" and files.parse_json("\ufeff[1]".encode()) == [1]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1"):
        with pytest.raises(ValueError, match="not (UTF-8|a text)"):
            files.decode_text("ab ä".encode(encoding))


BAD = ["../x", "a/b", "", ".", "..", ".hidden", "a\\b", "a\nb", "a\tb", "CON", "nul.txt", "c:", " a",
       "a" * 201, None, 3]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_names_that_are_not_safe_in_a_path_are_refused(name):
    with pytest.raises(ValueError, match="not safe"):
        files.check_name(name, "a signal")


@pytest.mark.parametrize("name", ["rgb", "tok_rgb@224", "sam_instance", "käse", "a b", "x.y", "depth+1", "日本"])
def test_usual_names_are_allowed(name):
    files.check_name(name, "a signal")


def test_what_is_not_utf8_is_shown():
    assert files.shown(os.fsdecode(b"caf\xe9\t\n")) == "caf\\xe9\\t\\n"
    files.shown(os.fsdecode(bytes(range(1, 256)))).encode()


def test_files_are_replaced_together(tmp_path):
    (tmp_path / "README.md").write_text("the user's")

    def export(value: str, *, dies: bool = False):
        with files.replacing_together(tmp_path) as new:
            (new / "tokenizers").mkdir()
            (new / "tokenizers" / "rgb").write_text(value)
            (new / "model").write_text(value)
            if dies:
                raise RuntimeError

    assert not files.check_digests(tmp_path)
    export("one")
    assert files.check_digests(tmp_path)
    with pytest.raises(RuntimeError):
        export("two", dies=True)
    assert files.check_digests(tmp_path) and (tmp_path / "model").read_text() == "one"
    export("three")
    assert files.check_digests(tmp_path, ["model", "tokenizers/rgb"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "digests.json", "model", "tokenizers"]
    (tmp_path / "model").write_text("thref")
    with pytest.raises(ValueError, match="model is damaged"):
        files.check_digests(tmp_path)
    with pytest.raises(ValueError, match="README.md is not in"):
        files.check_digests(tmp_path, ["README.md"])
    (tmp_path / "model").unlink()
    with pytest.raises(ValueError, match="model is missing"):
        files.check_digests(tmp_path)


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    holds = "import sys\nfrom m4.files import locked\nwith locked(sys.argv[1], 'x'): print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path / "lock")], stdin=-1, stdout=-1, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        message = f"runs/a is in use by process {holder.pid} on "
        with pytest.raises(ValueError, match=message), files.locked(tmp_path / "lock", "runs/a"):
            pass
        holder.kill()
    with files.locked(tmp_path / "lock", "runs/a"):
        pass


def test_json_round_trip_of_plain_values(tmp_path):
    value = {"component": "x", "list": [1, "a", {"b": False}]}
    files.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text())["list"] == value["list"]


def test_a_lock_is_waited_for_until_its_holder_ends_however_it_does(tmp_path):
    holds = "import sys, time\nfrom m4.files import locked\n"
    holds += "with locked(sys.argv[1], 'x'): print('mine', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", holds, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "mine\n"
        held = pytest.raises(ValueError, match=f"the folder is in use by process {holder.pid} on ")
        with held, files.locked(tmp_path / ".lock", "the folder"):
            pass
        threading.Timer(0.5, holder.kill).start()
        with files.locked(tmp_path / ".lock", "the folder", wait=True) as is_mine:
            assert is_mine and holder.wait() == -9


def test_anything_can_be_said(capsys):
    logging.getLogger("m4.files").info(files.shown("fine: käse \udce9 \n end"))
    assert capsys.readouterr().out == "fine: käse \\xe9 \\n end\n"
