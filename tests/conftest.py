"""Eight simulated devices, checked shapes and a compilation cache for every test."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"  # 8 devices on few cores can deadlock otherwise
# Devices that share busy cores wait longer for each other than XLA's 40 s.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
if "optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # compiles in half the time
os.environ.setdefault("NPROC", "16")  # XLA's threads: with few, 8 devices can wait for each other for ever
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "m4_jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # hundreds of small programs a test

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain reads absl flags in worker processes
from jaxtyping import install_import_hook  # noqa: E402

# Every function of both packages is called with what its annotations say, shapes of arrays included.
install_import_hook(["m4", "m4_tokenizers"], "checked_types.checked_types")

import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import io  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

import m4.__main__  # noqa: E402
import train  # noqa: E402
from m4.command_line import ends_with_a_sentence, log_to_output  # noqa: E402
from m4.config import from_cli  # noqa: E402
from m4.files import locked  # noqa: E402
from m4.masking.dirichlet import Masking, Strategy  # noqa: E402
from m4.model.config import ModelConfig  # noqa: E402
from m4.tokens.batch import normalized  # noqa: E402
from m4.tokens.modality import Features, Grid, Modalities, Sequence  # noqa: E402

log_to_output()  # as commands do, for tests to see what is said


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs of a module's tests are let go: those of all exceed Linux's number of memory maps (65,530),
    and XLA then ends with a segmentation fault."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def modalities():
    """One of each kind, small."""
    return Modalities(
        [
            Features(
                name="rgb_pixels",
                signal="rgb",
                shape=(3, 4),
                size=6,
                scale=255.0,
                mean=(0.5,),
                std=(0.25,),
                dtype="uint8",
            ),
            Grid(name="rgb_tokens", signal="rgb", vocab_size=11, shape=(3, 4)),
            Grid(name="depth_tokens", signal="depth", vocab_size=7, shape=(3, 4)),
            Sequence(
                name="caption",
                signal="caption",
                vocab_size=30,
                max_length=10,
                first_sentinel=5,
                num_sentinels=8,
                end_id=3,
            ),
        ]
    )


@pytest.fixture(scope="session")
def small_model():
    return ModelConfig(width=16, num_heads=2, encoder_depth=2, decoder_depth=2, hidden=24)


@pytest.fixture(scope="session")
def masking(modalities):
    anything = Strategy(
        inputs={m.name: 0.5 for m in modalities},
        targets={m.name: 0.5 for m in modalities if not isinstance(m, Features)},
    )
    return Masking(num_inputs=16, num_targets=14, strategies=(anything, dataclasses.replace(anything, keep="all")))


@pytest.fixture(scope="session")
def make_example(modalities):
    """Stored arrays of example i."""

    def make(i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(i)
        return {
            "rgb_pixels": rng.integers(0, 256, (12, 6)).astype(np.uint8),
            "rgb_tokens": rng.integers(0, 11, 12).astype(np.uint8),
            "depth_tokens": rng.integers(0, 7, 12).astype(np.uint8),
            "caption": np.append(rng.integers(14, 30, rng.integers(1, 9)), 3).astype(np.uint8),
        }

    return make


def mask_keys(count: int, seed: int = 0) -> np.ndarray:
    """What decides the masks of `count` examples of a stream."""
    return np.stack([np.full(count, seed), np.arange(count)], axis=1).astype(np.uint64)


@pytest.fixture(scope="session")
def make_batch(modalities, masking, make_example):
    def make(size: int, seed: int = 0):
        examples = [make_example(i) for i in range(size)]
        return jax.tree.map(np.asarray, normalized(masking(examples, modalities, mask_keys(size, seed)), modalities))

    return make


ROOT = Path(__file__).parent.parent
PARITY = Path(os.environ.get("M4_PARITY", ROOT.parent / "shared" / "parity"))


def documents() -> dict[str, str]:
    """README.md and all pages of docs/: path from the root -> text."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


class Block(NamedTuple):
    """A fenced block of a document. `reason`: what the comment before it says about why it is not executed."""

    document: str
    line: int
    language: str
    text: str
    reason: str

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block without comments, continuation lines joined."""
        lines = (line.partition("  #")[0].strip() for line in self.text.replace("\\\n", " ").splitlines())
        return [line for line in lines if line]


def code_blocks(*languages: str) -> list[Block]:
    """Fenced blocks of the README and of docs/, in order."""
    fence = re.compile(r"^(?:<!-- not executed: (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [
        Block(document, text[: m.start(2)].count("\n") + 1, m[2], m[3], m[1] or "")
        for document, text in documents().items()
        for m in fence.finditer(text)
        if m[2] in languages
    ]


def executed_commands() -> list[str]:
    """Shell lines of the documents, each once, that tests execute."""
    return list(dict.fromkeys(line for b in code_blocks("bash") if not b.reason for line in b.commands))


def pytest_terminal_summary(terminalreporter):
    if not any("test_docs.py" in report.nodeid for report in terminalreporter.stats.get("passed", [])):
        return
    shell, python = code_blocks("bash"), code_blocks("python")
    terminalreporter.write_line(
        f"README and docs: {len(executed_commands())} commands and {sum(not b.reason for b in python)} Python examples "
        f"are executed by tests; {sum(len(b.commands) for b in shell if b.reason)} commands and "
        f"{sum(bool(b.reason) for b in python)} examples are not, each with its reason"
    )


def command(*args: str, config: str | Path = "tests/tiny_config.py") -> list[str]:
    return [sys.executable, "train.py", str(config), *args]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])
    return {**os.environ, "PYTHONPATH": path, "JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"}


def run(*args: str, config: str | Path = "tests/tiny_config.py") -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*args, config=config), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500
    )


def called(main, *args: str) -> subprocess.CompletedProcess:
    """A command in this process, which is sooner: for those that end before they compute."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), contextlib.chdir(ROOT):
        try:
            with ends_with_a_sentence():
                main(list(args))
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(args, code, out.getvalue(), errors.getvalue())


def call_train(*args: str) -> subprocess.CompletedProcess:
    def main(argv: list[str]) -> None:
        with contextlib.ExitStack() as end:
            train.main(from_cli("", ["tests/tiny_config.py", *argv]), end)

    return called(main, *args)


def call_m4(*args: str) -> subprocess.CompletedProcess:
    return called(m4.__main__.main, *args)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder of all worker processes of this session."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def data_dir(shared):
    return shared / "data"


@pytest.fixture(scope="session")
def whole_run(shared, data_dir, tmp_path_factory):
    """An uninterrupted run with evaluation, made once; each worker process has a copy."""
    workdir = shared / "whole"
    with locked(shared / "whole.lock", "the run", wait=True):
        if not (workdir / "gallery.png").exists():
            done = run("--workdir", str(workdir), "--data-dir", str(data_dir))
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Path(shutil.copytree(workdir, tmp_path_factory.mktemp("runs") / "whole"))
