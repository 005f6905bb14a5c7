"""Numbered checkpoints of a run, with digests of all files: each is complete and unchanged, or reported as damaged.

WORKDIR/checkpoints/STEP/{params, optimizer, average, counters}   arrays (Orbax); average: if the run has one
WORKDIR/checkpoints/STEP/{data, config}                           JSON: position of the example stream, the run's config
WORKDIR/checkpoints/STEP/digests.json                             written last (a step of version 0.1 has none)

A step gets its name when all its files and their digests are on disk. A damaged step is never used, and an older
one is taken only with `skip_damaged`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import glob
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.path import atomicity

from m4.checkpoints.renamed_parameters import old_names, renamed
from m4.command_line import system_error
from m4.files import DIGESTS, check_digests, naming, read_json, shown, sync, write_digests
from m4.registry import FreeToChange

logger = logging.getLogger(__name__)

DAMAGED = ".damaged"  # suffix of a damaged step's folder, until the step is saved again


_EPath: Any = type(epath.Path("/"))  # its class is private


class LiteralPath(_EPath):
    """A local path in which [ ] ? * are literal: Orbax globs for files with patterns that begin with its folder."""

    def glob(self, pattern: str):
        return (self._new(p) for p in glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


class StepWithDigests(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder of a step, which is renamed when its files have their digests and are on disk."""

    async def finalize(self) -> None:
        final = self._final_path
        assert self._tmp_path is not None, "create() comes first"
        if atomicity.TMP_DIR_SUFFIX in final.parent.name:  # an item of a step
            return await super().finalize()
        self._final_path = final.parent / f"{self._tmp_path.name}.written"
        try:
            await super().finalize()  # Orbax's own last files
            await asyncio.to_thread(_finish, Path(os.fspath(self._final_path)), Path(os.fspath(final)))
        finally:
            self._final_path = final


def _finish(written: Path, final: Path) -> None:
    """Files to disk, digests to disk, folders to disk, and only then the final name: a named step is complete."""
    files = [p for p in written.rglob("*") if p.is_file()]
    for path in files:
        sync(path)
    write_digests(written, [p.relative_to(written).as_posix() for p in files])
    for folder in (*(p for p in written.rglob("*") if p.is_dir()), written):
        sync(folder)
    written.rename(final)
    sync(final.parent)


def steps_in(folder: Path) -> list[int]:
    """Steps that are complete, in order."""
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and int(name) > 0)


def check_step(folder: Path, items: tuple[str, ...] = ()) -> bool:
    """Whether a step has digests; ValueError names a file of it that has changed.

    `items`: those that are about to be read (default: all).
    """
    if not (folder / DIGESTS).exists():
        for item in items:  # a step of version 0.1
            if not (folder / item).is_dir() or not any((folder / item).iterdir()):
                raise ValueError(f"{shown(folder / item)} is missing")
        return False
    listed = read_json(folder / DIGESTS)["files"]
    wanted = [name for name in listed if not items or "/" not in name or name.split("/")[0] in items]
    for item in items:
        if not any(name.startswith(f"{item}/") for name in wanted):
            present = sorted({n.split("/")[0] for n in listed if "/" in n})
            raise ValueError(f"{shown(folder)} has no {item}; it has: {', '.join(present)}")
    return check_digests(folder, wanted)


def explain(folder: Path, step: int, error: Exception, items: tuple[str, ...] = ()) -> ValueError:
    """The error about a damaged step, which names the newest older step that is whole."""
    text = f"{shown(folder.parent)}: its checkpoint of step {step} is damaged or incomplete: {_first_line(error)}"
    for older in reversed([s for s in steps_in(folder) if s < step]):
        try:
            checked = check_step(folder / str(older), items)
        except ValueError:
            continue
        state = "whole" if checked else "older, of version 0.1 and without digests"
        return ValueError(
            f"{text}. Step {older} is {state}: train.py goes on from it with --skip-damaged, and "
            f"{shown(folder / str(older))} names it for generation, evaluation and export"
        )
    return ValueError(f"{text}. No other step of this run is whole: move {shown(folder)} away to begin again")


def _is_own_error(error: Exception) -> bool:
    return isinstance(error, ValueError) and "\n" not in str(error) and "tensorstore" not in str(error)


def _first_line(error: Exception) -> str:
    """The text of m4's own errors (one sentence), or the first line of others."""
    lines = str(error).strip().splitlines() or [""]
    return (
        lines[0]
        if _is_own_error(error) or isinstance(error, RuntimeError)
        else f"{type(error).__name__}: {lines[0][:200]}"
    )


def read_step(folder: Path, step: int, args: Mapping[str, Any]) -> Any:
    """Items of a step (which `check_step` has passed), by name. ValueError if they cannot be read."""
    options = ocp.CheckpointManagerOptions(
        create=False, save_root_metadata=False, temporary_path_class=StepWithDigests, lightweight_initialize=True
    )
    manager = ocp.CheckpointManager(LiteralPath(folder.absolute()), options=options)
    restored, error = _restore(manager, step, args)
    manager.close()
    if error:
        raise explain(folder, step, error, tuple(args))
    return restored


def _restore(manager: ocp.CheckpointManager, step: int, args: Mapping[str, Any]) -> tuple[Any, Exception | None]:
    """What Orbax restores, or its one error that matters.

    For a damaged step without digests it raises errors of every kind (TensorStore's, JSON's, KeyError), and leaves
    tasks behind whose own tracebacks would be printed when they are deleted.
    """
    _silence_tasks()
    old = {item: old_names(Path(manager.directory) / str(step) / item) for item in args}
    args = {
        item: ocp.args.StandardRestore(renamed(arg.item, names)) if (names := old[item]) else arg
        for item, arg in args.items()
    }
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**args))
        back = {item: {name: new for new, name in names.items()} for item, names in old.items()}
        return {item: renamed(restored[item], back[item]) if old[item] else restored[item] for item in args}, None
    except Exception as error:
        return None, error if _is_own_error(error) else RuntimeError(_first_line(error))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Translates errors of a save, which Orbax writes in the background: OSError if it was the system's (a full disk),
    else ValueError, both with the folder of the checkpoints."""
    _silence_tasks()
    try:
        with naming(folder):  # errors of writing to an open file, such as Orbax's JSON, name none
            yield
    except OSError:
        raise
    except Exception as error:  # whatever Orbax and TensorStore raise
        if (cause := system_error(error, str(folder))) is not None:
            raise cause from error
        raise ValueError(f"a checkpoint could not be written into {shown(folder)}: {_first_line(error)}") from error


@functools.cache
def _silence_tasks() -> None:
    """Silences tracebacks of Orbax's tasks, which would hide the sentence that says what is wrong: those of tasks that
    nobody waits for, and logs of those that are raised anyway."""
    for name in ("asyncio", "absl"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        is_task = code is not None and "orbax" in code.co_filename
        if not is_task and str(unraisable.exc_value) != "Event loop is closed":  # TensorStore's answer to such a task
            before(unraisable)

    sys.unraisablehook = hook


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(FreeToChange):
    """When a run is saved, and which checkpoints stay."""

    save_every: int = 200
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good; 0 keeps only the newest."""
    skip_damaged: bool = False
    """Resume from the newest whole checkpoint where a newer one is damaged, instead of stopping."""

    def __post_init__(self):
        if self.keep_last < 1 or self.keep_every < 0:
            raise ValueError(
                f"keep_last={self.keep_last} must be at least 1, and keep_every={self.keep_every} at least 0"
            )


class Checkpoints:
    """Numbered checkpoints in a folder, written in the background, complete or not at all. Call `close` when done.

    With `skip_damaged`, damaged steps are put aside and the newest whole one is taken; without it, ValueError names the
    file, the step and the newest one that is whole.
    """

    def __init__(self, folder: Path, config: CheckpointConfig = CheckpointConfig()):
        self.folder, self.config = folder.absolute(), config
        self._choose()
        self._open()
        self._batches: list[list[int]] = []  # [number of steps, batch size] of all steps so far
        self._first: tuple[int, str, Any] | None = None  # a part of the first save, until it is read back
        self._is_read_back = False

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.config.keep_last, keep_period=self.config.keep_every or None, cleanup_tmp_directories=True,
            temporary_path_class=StepWithDigests, lightweight_initialize=True,
        )  # fmt: skip
        self.manager = ocp.CheckpointManager(LiteralPath(self.folder), options=options)

    def _choose(self) -> None:
        """Checks the newest step (process 0 does), and puts it aside if it is damaged and `skip_damaged` is set."""
        failure = None
        if jax.process_index() == 0:
            while steps := steps_in(self.folder):
                try:
                    check_step(self.folder / str(steps[-1]))
                    break
                except ValueError as error:
                    if not self.config.skip_damaged or len(steps) == 1:
                        failure = explain(self.folder, steps[-1], error)
                        break
                    self._put_aside(steps[-1], error)
        if jax.process_count() > 1:
            failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failure is not None)))
            if failed and failure is None:
                failure = ValueError(f"{self.folder}: the newest checkpoint is damaged; process 0 says how")
        if failure is not None:
            raise failure

    def _put_aside(self, step: int, why: Exception) -> None:
        folder, aside = self.folder / str(step), self.folder / f"{step}{DAMAGED}"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        logger.info(
            f"the checkpoint of step {step} is damaged and skipped: {_first_line(why)}\n"
            f"it is put aside as {shown(aside)} until step {step} is saved again"
        )

    @property
    def latest(self) -> int:
        """The last complete step, 0 without any."""
        return self.manager.latest_step() or 0

    def save(self, step: int, parts: Mapping[str, Any], data: dict[str, Any], config: dict[str, Any]) -> None:
        """Copies the arrays of each part's tree, then writes them while training goes on.

        OSError or ValueError if this save or the one before has failed by now.
        """
        if step == self.latest:
            return
        if "next_example" in data and "batch_size" in config:
            done = sum(count for count, _ in self._batches)
            if not self._batches or self._batches[-1][1] != config["batch_size"]:
                self._batches.append([0, config["batch_size"]])
            self._batches[-1][0] += step - done
            data = {**data, "batches": [[*pair] for pair in self._batches]}
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
        texts = {"data": ocp.args.JsonSave(data), "config": ocp.args.JsonSave(config)}
        with _writing(self.folder):
            self.manager.save(step, args=ocp.args.Composite(**arrays, **texts))
        if not self._is_read_back and self._first is None and jax.process_count() == 1:
            smallest = min(parts, key=lambda name: sum(x.nbytes for x in jax.tree.leaves(parts[name])))
            self._first = step, smallest, jax.device_get(parts[smallest])
        self._delete_put_aside()

    def check(self) -> None:
        """Raises the error of the last save, once it has failed. Does not wait for it."""
        if not self.manager.is_saving_in_progress():
            self.finish()

    def finish(self) -> None:
        """Waits for the save in progress, if any; raises its error."""
        with _writing(self.folder):
            self.manager.wait_until_finished()
        self._read_back()

    def _read_back(self) -> None:
        """ValueError unless a small part of a job's first save can be read again: an unreadable folder is reported
        now, not after the last step."""
        if self._first is None:
            return
        (step, name, saved), self._first, self._is_read_back = self._first, None, True
        if step not in steps_in(self.folder):  # fast saves: newer ones have taken its place already
            return
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=device), saved)
        restored = read_step(self.folder, step, {name: ocp.args.StandardRestore(like), "data": ocp.args.JsonRestore()})
        for x, y in zip(jax.tree.leaves(saved), jax.tree.leaves(restored[name]), strict=True):
            if not np.array_equal(x, y, equal_nan=True):
                raise explain(self.folder, step, ValueError(f"{name} is read back as something else"))

    def _delete_put_aside(self) -> None:
        """Deletes damaged steps that were put aside and have been saved again."""
        for aside in self.folder.glob(f"*{DAMAGED}") if jax.process_index() == 0 else ():
            if (self.folder / aside.name.removesuffix(DAMAGED)).is_dir():
                shutil.rmtree(aside, ignore_errors=True)

    def restore(
        self, parts: Mapping[str, Any], tokenizers: Mapping[str, str] = {}
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The last step's arrays with the given shapes and shardings, and the position of the example stream.

        ValueError if they cannot be read, if the position is not that of this step, or if the run's `tokenizers`
        (hashes by modality) are not those that it was saved with.
        """
        step = self.latest
        args = {name: ocp.args.StandardRestore(tree) for name, tree in parts.items()}
        texts = {"data": ocp.args.JsonRestore(), "config": ocp.args.JsonRestore()}
        try:
            if not (self.folder / str(step) / DIGESTS).exists():  # else all of it is checked already
                check_step(self.folder / str(step), (*args, *texts))
            restored, error = _restore(self.manager, step, {**args, **texts})
            if error:
                raise error
            self._batches = _batches(step, restored["data"], restored["config"])
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            if not self.config.skip_damaged or len(steps_in(self.folder)) == 1 or jax.process_count() > 1:
                raise explain(self.folder, step, error) from error
            self.manager.close()
            self._put_aside(step, error)
            self._choose()
            self._open()
            return self.restore(parts, tokenizers)
        known = restored["data"]["tokenizers"] if "tokenizers" in restored["data"] else {}  # not in version 0.1
        if changed := [name for name, saved in known.items() if name in tokenizers and tokenizers[name] != saved]:
            raise ValueError(
                f"{shown(self.folder.parent)} was trained with other tokenizers of {', '.join(changed)} than those of "
                "its data folder now, for which its weights mean nothing; go on with the data folder that it began with"
            )
        return {name: restored[name] for name in parts}, restored["data"]

    def kept(self) -> str:
        """A sentence that lists the complete checkpoints."""
        steps = ", ".join(map(str, steps_in(self.folder))) or "none"
        return f"complete checkpoints in {shown(self.folder.parent)}: {steps}"

    def close(self) -> None:
        self.finish()
        self.manager.close()
        self._delete_put_aside()


def _batches(step: int, data: Any, config: Any) -> list[list[int]]:
    """[number of steps, batch size] of a run up to a step. ValueError unless the saved position agrees."""
    if "next_example" not in data or not ("batches" in data or "batch_size" in config):
        return []  # not saved by a run
    batches = data["batches"] if "batches" in data else [[step, config["batch_size"]]]  # version 0.1 had one size
    read = sum(count * size for count, size in batches)
    if sum(count for count, _ in batches) != step or read != data["next_example"]:
        raise ValueError(
            f"the saved position in the stream of examples, {data['next_example']}, is not that of step {step}, "
            f"{read} (steps x batch size: {batches})"
        )
    return batches
