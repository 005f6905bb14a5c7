"""The root config of a run, its JSON form, and the command line that overrides it."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tyro

from m4.checkpoints.hub import check_source
from m4.checkpoints.numbered import CheckpointConfig
from m4.data.dataset import Dataset
from m4.distributed.mesh import MeshConfig
from m4.errors import check_numbers, closest
from m4.field_help import first_screen, parse
from m4.files import locked, remove_leftovers, write_json
from m4.masking.dirichlet import Masking
from m4.model.config import ModelConfig
from m4.objectives.masked_modeling import MaskedModeling
from m4.registry import PACKAGES, RENAMED, RENAMED_FIELDS, REPLACED_FIELDS, FreeToChange, classes, config_in, to_json
from m4.tokens.modality import Modalities
from m4.training.metrics import MetricsConfig
from m4.training.optimizer import OptimizerConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. A config file exposes `config`; a variant is `dataclasses.replace(config, ...)`."""

    num_steps: int = 1000
    """Training steps (optimizer updates). A finished run goes on when it is given more."""
    batch_size: int = 64
    """Examples per step, over all devices."""
    seed: int = 0
    """Seed of all that is random: parameters, tokenizers, the order of examples, masks."""
    name: str
    """Name of the run, and of its folder under runs/."""
    workdir: str = ""
    """Folder of checkpoints, metrics and pictures; "" is runs/NAME. A run that is there is resumed."""
    data_dir: str = "data"
    """Folder of prepared data: raw examples, tokenizers and token shards."""
    init_from: str = ""
    """Run folder, model file or packaged model whose weights are loaded before the first step; "" starts from random
    ones."""
    objectives: tuple[Any, ...] = (MaskedModeling(),)
    """Summands of the loss, of different classes of m4.objectives."""
    average_decay: float = 0.0
    """Decay of a moving average of the parameters, in [0, 1), which is then what is evaluated; 0 is none."""
    model: ModelConfig = ModelConfig()
    """Sizes and options of the encoder-decoder."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule, and which parameters are trained."""
    mesh: MeshConfig = MeshConfig()
    """How batch and parameters are spread over devices."""
    masking: Masking
    """Which tokens go in, which are predicted, and how many of each."""
    datasets: tuple[Dataset, ...]
    """What is read, mixed by weight. Each evaluation scores the first data set that has its signals."""
    tokenizers: tuple[Any, ...]
    """Recipes of tokenizers, in the order of the model's modalities (m4.tokens.tokenizer.Recipe)."""
    evaluators: tuple[Any, ...] = ()
    """What is measured: ConditionalGeneration after training, all by `python -m m4 evaluate --suite NAME`, where a name
    that has none here stands for its class of m4.evaluation with default values."""
    micro_batches: int = 1
    """Parts of a batch that are computed one after the other, to save memory. The gradient is the same."""
    num_workers: int = 0
    """Processes per host that read and mask examples; 0 uses threads."""
    checkpoints: tyro.conf.OmitArgPrefixes[CheckpointConfig] = CheckpointConfig()
    """When it is saved, and which checkpoints stay."""
    metrics: tyro.conf.OmitArgPrefixes[MetricsConfig] = MetricsConfig()
    """What is shown of training, and how often."""
    max_skipped: int = 20
    """Steps in a row with gradients that are not finite, after which the run stops."""

    @property
    def folder(self) -> Path:
        return Path(self.workdir or f"runs/{self.name}")

    @property
    def modalities(self) -> Modalities:
        return Modalities([r.modality for r in self.tokenizers])

    def check(self) -> None:
        """All that can be known to be wrong before compute is spent."""
        check_numbers(self)
        for field in ("micro_batches", "num_steps", "max_skipped"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must be at least 0")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay={self.average_decay} must be at least 0 and less than 1")
        if self.init_from:
            check_source("init_from", self.init_from)
        if self.metrics.gallery_every and not (
            any(e.after_training for e in self.evaluators) and any(d.source is not None for d in self.datasets)
        ):
            raise ValueError("gallery_every needs ConditionalGeneration as evaluator, and a data set with raw examples")
        self.masking.check(self.modalities)
        kinds = [objective.name for objective in self.objectives]
        if not kinds or len({*kinds}) < len(kinds):
            raise ValueError(f"objectives={kinds} must be different ones, at least one")
        for objective in self.objectives:
            objective.check(self)
        labels = [d.label for d in self.datasets]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"a run needs data sets of different names, and has {labels}; set Dataset(name=...)")
        for evaluator in self.evaluators:
            evaluator.check_config(self)
        maskings = [dataset.masked_by(self.masking) for dataset in self.datasets]
        for masking in maskings:
            masking.check(self.modalities)
        if 1 < (most := max(masking.num_items for masking in maskings)) < self.model.max_items:
            raise ValueError(
                f"model.max_items={self.model.max_items} items have learned addresses, but those of the data sets are "
                f"numbered below {most}; set EpisodeMasking(max_items={self.model.max_items})"
            )


# What may differ between the config.json of a run and the config that it is resumed with, beside parts that are
# FreeToChange.
FREE_TO_CHANGE = ("batch_size", "workdir", "data_dir", "mesh", "num_workers", "micro_batches", "max_skipped")

# What is said of those that change what is learned; num_steps may only grow.
CHANGES = {
    "batch_size": "the run goes on at the same example of the stream, with batches of the new size",
    "num_steps": "the learning rate of each further step is that of a run of the new length",
}


# What `--help` shows first.
MOST_USED = (
    "num_steps", "batch_size", "seed", "workdir", "data_dir", "init_from", "model.width", "model.encoder_depth",
    "model.decoder_depth", "model.dtype", "optimizer.learning_rate", "optimizer.warmup_steps", "mesh.data", "mesh.fsdp",
    "mesh.tensor", "masking.num_inputs", "masking.num_targets",
)  # fmt: skip

# Of m4 0.1 -> of today.
MOVED_OPTIONS = {"--num-eval-samples": "--evaluators.0.num-samples", "--eval-splits": "--evaluators.0.splits"}


def load_config(path: str, attribute: str = "config") -> Any:
    """The object `config` (or another) of a Python file."""
    file = Path(path)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path("configs")
        raise ValueError(f"no config file {path!r}; {closest(path, sorted(str(p) for p in folder.glob('*.py')))}")
    # A loader of its own, for any extension to be read as Python.
    loader = importlib.machinery.SourceFileLoader(file.stem, str(file))
    spec = importlib.util.spec_from_loader(file.stem, loader)
    assert spec is not None, "a loader of source files always has a specification"
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a file does, SystemExit included
        words = error.msg if isinstance(error, SyntaxError) else str(error)
        words = words if isinstance(error, ValueError) else words.strip().partition("\n")[0]
        what = words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}".rstrip(": ")
        if isinstance(error, ImportError) and (lines := _moved(file)):
            what = "; ".join([what, "files have moved since m4 0.1, write", *lines])
        renamed = {old: new for fields in (*RENAMED_FIELDS.values(), REPLACED_FIELDS) for old, new in fields.items()}
        for old, new in renamed.items():
            if isinstance(error, TypeError) and f"'{old}'" in what:
                what += f"; since m4 0.2 it is {new}"
        raise ValueError(f"{path}{_line_in(file, error)}: {what}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{path} defines no `{attribute}`; it has {', '.join(n for n in vars(module) if n[0] != '_')}")
    return getattr(module, attribute)


def _moved(file: Path) -> list[str]:
    """Import lines for the classes of m4 that a file imports from where they no longer are."""
    nodes = [n for n in ast.walk(ast.parse(file.read_bytes())) if isinstance(n, ast.ImportFrom)]
    names = {(n.module, alias.name) for n in nodes for alias in n.names if (n.module or "").split(".")[0] in PACKAGES}
    now = {(module, name): RENAMED.get(name, name) for module, name in sorted(names)}
    return [
        f"from {classes()[new]} import {new}"
        for (module, _), new in now.items()
        if new in classes() and classes()[new] != module
    ]


def _line_in(file: Path, error: BaseException) -> str:
    """ ", line N" of a file, where an error came from it."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}" if error.filename == str(file) and error.lineno else ""
    lines = [
        number for frame, number in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(file)
    ]
    return f", line {lines[-1]}" if lines else ""


def from_cli(description: str, argv: list[str] | None = None) -> Any:
    """`CONFIG.py [--field value ...]` -> the config with its overrides; `--help` lists every field."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        wants_help = bool(argv) and argv[0] in ("-h", "--help")
        usage = f"{description}\n\nusage: CONFIG.py [--field value ...]   (CONFIG.py --help lists the fields)"
        print(usage, file=sys.stdout if wants_help else sys.stderr)
        raise SystemExit(0 if wants_help else 2)
    config = load_config(argv[0])
    if not isinstance(config, Config):
        raise ValueError(f"{argv[0]}: config must be an m4.config.Config, not {type(config).__name__}")
    for old, new in MOVED_OPTIONS.items():
        if any(arg.partition("=")[0].replace("_", "-") == old for arg in argv[1:]):
            raise ValueError(f"since m4 0.2 {old} is {new}")
    help_text = (
        f"{description}\n\nMost used, with their values here; all fields follow:\n{first_screen(config, MOST_USED)}"
    )
    return parse(config, argv[1:], prog=f"train.py {argv[0]}", description=help_text)


@contextlib.contextmanager
def use_workdir(config: Config) -> Iterator[None]:
    """The run's folder for this job alone (its process 0 holds the lock), without what killed jobs left. ValueError if
    another has it, or if nothing can be written there."""
    if jax.process_index():
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(config.folder / ".lock", f"workdir {config.folder}"))
        except OSError as error:
            raise ValueError(
                f"cannot write into workdir {config.folder}: {error.strerror}; give another --workdir"
            ) from error
        for folder in (config.folder, config.folder / "tokenizers"):
            remove_leftovers(folder)
        yield


def save_or_check(config: Config) -> None:
    """Writes config.json into the run's folder, or checks that the run there is the same one."""
    file = config.folder / "config.json"
    if file.exists():
        # A field that is newer than the run has its default.
        old, new = (to_json(c, without=FreeToChange) for c in (config_in(config.folder), config))
        for field in new:
            longer = field == "num_steps" and new[field] > old[field]
            if field not in FREE_TO_CHANGE and not longer and old[field] != new[field]:
                where, before, after = _first_difference(field, old[field], new[field])
                raise ValueError(
                    f"{config.folder} holds a run with {where}={before!r}, now {after!r}. Go on with the old value, or "
                    f"start another run with --workdir {config.folder}_2 (with these weights: --init-from "
                    f"{config.folder})"
                )
        for field, says in CHANGES.items():
            if old[field] != new[field]:
                logger.info(f"{field} was {old[field]} and is {new[field]}: {says}")
    try:
        write_json(file, to_json(config))
    except OSError as error:
        raise ValueError(
            f"cannot write into workdir {config.folder}: {error.strerror}; give another --workdir"
        ) from error


def _first_difference(where: str, before: Any, after: Any) -> tuple[str, Any, Any]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(set(before) | set(after)):
            a, b = (x[key] if key in x else None for x in (before, after))
            if a != b:
                return _first_difference(f"{where}.{key}", a, b)
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            if a != b:
                return _first_difference(f"{where}[{i}]", a, b)
    return where, before, after
