"""Damage to what is stored: flipped bits and cut files of every kind are noticed by name, or change nothing that is
read. pytest -m slow tests/checkpoints/test_flips.py -s prints the shares and what checking costs."""

import collections
import contextlib
import dataclasses
import io
import json
import pickle
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from m4 import files
from m4.adaptation.adapter_files import load_adapter, save_adapter
from m4.adaptation.lora import LoRA
from m4.checkpoints.model_file import load_model, save_model
from m4.checkpoints.numbered import Checkpoints
from m4.checkpoints.runs import export, load_run
from m4.config import load_config
from m4.data.pretokenize import prepare
from m4.data.sources.tars import Tars
from m4.data.sources.texts import Texts
from m4.data.token_shards import TokenShards
from m4.distributed.mesh import MeshConfig
from m4.model.encoder_decoder import Model
from m4.tokens.tokenizer import load_tokenizer
from m4.training.trainer import Trainer

NUM_TRIES = 620


def plain(value: Any) -> list[Any]:
    """Something to compare: arrays and values of any object that is read."""
    if isinstance(value, nnx.Module):
        value = nnx.state(value, nnx.Param)
    return [np.asarray(x) for x in jax.tree.leaves(value)]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Kind:
    """Files of one kind, and what is read of them."""

    folder: Path
    read: Callable[[], list[Any]]
    pattern: str = "*"

    @property
    def files(self) -> list[Path]:
        return sorted(p for p in self.folder.rglob(self.pattern) if p.is_file() and p.stat().st_size)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Kind]:
    """All that m4 keeps and reads again."""
    root = tmp_path_factory.mktemp("stored")
    config = dataclasses.replace(
        load_config(str(ROOT / "tests/tiny_config.py")), workdir=str(root / "run"), data_dir=str(root / "data")
    )
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, width=16, hidden=16), average_decay=0.9
    )
    return {**of_run(root, config), **of_sources(root)}


def of_run(root: Path, config: Any) -> dict[str, Kind]:
    """Its data, checkpoint, config, tokenizers; the exported folder, a model file, small parameters."""
    from m4.config import save_or_check
    from train import main

    with contextlib.ExitStack() as end:
        main(dataclasses.replace(config, evaluators=(), num_steps=2), end)
    prepared = prepare(config.datasets, config.tokenizers, config.data_dir, seed=config.seed)
    (tokens,) = prepared.tokens
    trainer = Trainer(config, MeshConfig(data=1).make(jax.devices()[:1]))
    trained = load_run(root / "run")
    export(root / "run", root / "exported")
    (root / "file").mkdir()
    save_model(trained.model, root / "file" / "model.safetensors")
    small = dataclasses.replace(trained.model.config, extensions=(LoRA(rank=2),))
    (root / "small").mkdir()
    save_adapter(Model(small, trained.model.modalities, rngs=nnx.Rngs(0)), root / "small" / "lora.safetensors")

    def read_shards() -> list[Any]:
        shards = TokenShards(tokens, "train")
        return plain([shards[i] for i in range(len(shards))])

    def read_scenes() -> list[Any]:
        (source,) = {d.source for d in config.datasets}
        splits = [source.split(name, root / "data") for name in ("train", "test")]
        examples = [split[i] for split in splits for i in range(len(split))]
        return [np.frombuffer(pickle.dumps(sorted(example.items())), np.uint8) for example in examples]

    def restore() -> list[Any]:
        with contextlib.closing(Checkpoints(root / "run" / "checkpoints")) as saved:
            return plain(saved.restore(trainer.abstract_state.parts()))

    def read_run() -> list[Any]:
        save_or_check(dataclasses.replace(config, evaluators=(), num_steps=2))
        run = load_run(root / "run")
        return [*plain(run.model), *plain([list(t.state()[1].values()) for t in run.tokenizers.values()])]

    def read_tokenizers() -> list[Any]:
        found = [load_tokenizer(p).state() for p in sorted((root / "data" / "tokenizers").iterdir())]
        return [np.array(json.dumps([s[0] for s in found], sort_keys=True)), *plain([s[1] for s in found])]

    def read_small() -> list[Any]:
        fresh = Model(small, trained.model.modalities, rngs=nnx.Rngs(0))
        return plain(load_adapter(fresh, root / "small" / "lora.safetensors"))

    return {
        "rendered scenes": Kind(root / "data" / "scenes", read_scenes),
        "checkpoint": Kind(root / "run" / "checkpoints", restore),
        "config.json": Kind(root / "run", read_run, "config.json"),
        "tokenizers of a run": Kind(root / "run" / "tokenizers", read_run),
        "tokenizers": Kind(root / "data" / "tokenizers", read_tokenizers, "*.safetensors"),
        "token shards": Kind(tokens, read_shards, "train*"),
        "exported": Kind(root / "exported", lambda: plain(load_run(root / "exported").model)),
        "model file": Kind(root / "file", lambda: plain(load_model(root / "file" / "model.safetensors"))),
        "small parameters": Kind(root / "small", read_small),
    }


def of_sources(root: Path) -> dict[str, Kind]:
    """Indexes of tars and texts."""
    (root / "tars" / "caption").mkdir(parents=True)
    with tarfile.open(root / "tars" / "caption" / "0.tar", "w") as tar:
        for i in range(20):
            info, text = tarfile.TarInfo(f"{i:03d}.txt"), f"caption {i}".encode()
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    (root / "texts.txt").write_text("".join(f"document {i}\n" for i in range(50)))
    tars = Tars(root=str(root / "tars"), validation_share=0, test_share=0)
    texts = Texts(files=(str(root / "texts.txt"),), validation_share=0, test_share=0)

    def read(source: Any, data_dir: Path) -> list[Any]:
        source.prepare(data_dir)
        split = source.split("train", data_dir)
        return [np.array(split[i]["caption"]) for i in range(len(split))]

    read(tars, root / "tar_data"), read(texts, root / "text_data")
    return {
        "index of tars": Kind(root / "tar_data", lambda: read(tars, root / "tar_data")),
        "index of texts": Kind(root / "text_data", lambda: read(texts, root / "text_data")),
    }


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One flipped bit; or cut, emptied, zeroed from some place on, or with another's bytes in the middle."""
    how, at = rng.random(), int(rng.integers(len(data)))
    if how < 0.7:
        return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
    if how < 0.9:
        return data[:at]
    block = data[at : at + 512]
    return data[:at] + bytes(len(block)) + data[at + len(block) :]


@pytest.mark.slow
def test_damage_is_noticed_or_harmless(kinds, capsys):
    rng, counts = np.random.default_rng(0), collections.defaultdict(collections.Counter)
    expected = {name: kind.read() for name, kind in kinds.items()}
    names = list(kinds)
    for i in range(NUM_TRIES):
        name = names[i % len(names)]
        kind = kinds[name]
        chosen = kind.files
        file = chosen[int(rng.integers(len(chosen)))]
        original = file.read_bytes()
        data = damaged(original, rng)
        if data == original:
            continue
        there = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in kind.files}
        file.write_bytes(data)
        try:
            found = kind.read()
        except ValueError as error:
            counts[name]["noticed"] += 1
            where = str(error)
            assert file.name in where or str(file.relative_to(kind.folder)) in where, f"{file} is not named: {where}"
        else:
            counts[name]["harmless"] += 1
            assert same(found, expected[name]), f"{name}: {file} at {len(data)} of {len(original)} bytes"
        finally:
            file.write_bytes(original)
        made = [p for p in kind.files if p not in there]  # an index that was made anew
        for path in made:
            path.unlink()
    total = sum(counts.values(), collections.Counter())
    with capsys.disabled():
        print(f"\n{'kind':<24}{'noticed':>8}{'harmless':>9}")
        for name, count in {**counts, "all": total}.items():
            print(f"{name:<24}{count['noticed']:>8}{count['harmless']:>9}")
    assert total.total() >= 600


@pytest.mark.slow
def test_what_checking_costs(tmp_path, capsys):
    """Seconds a GiB; printed, not judged."""
    path = tmp_path / "a"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 28))
    files.digest(path)
    start = time.monotonic()
    files.digest(path)
    with capsys.disabled():
        print(f"\nSHA-256: {4 * (time.monotonic() - start):.2f} s a GiB")
    shutil.rmtree(tmp_path)
