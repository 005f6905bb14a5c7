"""What the library logs, and where it appears."""

import logging
import subprocess
import sys

from conftest import ROOT, environment

SCRIPT = """
import sys
from m4.command_line import log_to_output
from m4.distributed.workers import pool
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
