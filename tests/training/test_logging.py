"""What the library logs, and where it appears."""

import ast
import logging
import subprocess
import sys

from conftest import ROOT, environment

SCRIPT = """
import sys
from m4.command_line import log_to_output
from m4.distributed.workers import pool
import ast
import logging

def speak(where):
    logger = logging.getLogger("m4.somewhere")
    logger.info(f"{where} informs")
    logger.warning(f"{where} warns")

if __name__ == "__main__":
    if "configured" in sys.argv:
        log_to_output()
        log_to_output()  # which changes nothing
    speak("parent")
    with pool(1) as workers:
        workers.submit(speak, "worker").result()
"""


def speak(tmp_path, *args):
    (tmp_path / "speaks.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "speaks.py"), *args]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_commands_write_what_is_logged_once_and_so_do_their_workers(tmp_path):
    done = speak(tmp_path, "configured")
    assert done.stdout.splitlines() == ["parent informs", "worker informs"], done.stderr
    assert done.stderr.splitlines() == ["parent warns", "worker warns"]


def test_programs_that_import_m4_configure_logging_themselves(tmp_path):
    done = speak(tmp_path)
    assert not done.stdout


def test_characters_that_the_output_lacks_are_escaped(capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "encoding", "ascii")
    logging.getLogger("m4.somewhere").info("käse\n犬")
    assert capsys.readouterr().out == "k\\xe4se\n\\u72ac\n"


def test_the_library_does_not_print():
    """What commands show, and how they end, is theirs: the library logs."""
    own = {"m4/command_line.py", "m4/__main__.py", "m4/config.py"}  # errors, and the help of commands
    own |= {f"tokenizers/m4_tokenizers/{name}.py" for name in ("__main__", "train")}
    for file in sorted([*ROOT.glob("m4/**/*.py"), *ROOT.glob("tokenizers/m4_tokenizers/**/*.py")]):
        name = file.relative_to(ROOT).as_posix()
        if name in own or name.startswith("m4/commands/"):
            continue
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], name
