"""Two minutes of damaged files of every kind that people give m4: each is read, or refused by a ValueError that names
it; nothing hangs, eats the memory, or gives half of what is there. Counts: pytest -m slow tests/test_fuzz.py -s
"""

import collections
import dataclasses
import io
import json
import resource
import shutil
import signal
import tarfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import soundfile
from conftest import ROOT
from make_checkpoint import write_checkpoint
from PIL import Image

from m4.checkpoints.model_file import load_model
from m4.checkpoints.runs import load_run
from m4.config import load_config
from m4.data.samples import load_mask, read_sample
from m4.data.sources.files import decode
from m4.data.sources.tars import members
from m4.data.sources.texts import Texts
from m4.data.token_shards import TokenShards
from m4.in_context.shots import read_shots
from m4.in_context.tasks import vl_icl
from m4.in_context.tasks.vl_icl import VLICL
from m4.inference.inputs import read_inputs
from m4.inference.sampler import Sampler
from m4.interchange.fourm_convert import convert
from m4.masking.episodes import Episode
from m4.tensor_file import TensorFile
from m4.tokens.tokenizer import load_tokenizer
from m4_tokenizers.interchange import fourm_tokenizers as released
from m4_tokenizers.interchange.architectures import read_presets
from m4_tokenizers.modalities.answers import AnswerRecipe
from m4_tokenizers.modalities.metadata import MetadataRecipe

pytestmark = pytest.mark.slow
SECONDS = 120
LONGEST = 20  # seconds for one try
MEMORY = 6 << 30  # bytes that one try may take beyond what the process has


class Hangs(BaseException):
    """Not an Exception, for no reader to catch it."""


def with_limits(read: Callable[[], Any]) -> Any:
    def stop(*_):
        raise Hangs

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        return read()
    finally:
        signal.alarm(0)


# ---- What is damaged: bytes by the name of their kind --------------------------------------------------------------


def pictures() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8))
    modes = {m: colour.convert(m) for m in ("L", "P", "1", "RGBA", "LA", "CMYK", "RGB")}
    modes["I;16"] = Image.fromarray(rng.integers(0, 65536, (24, 32)).astype(np.uint16))
    modes["F"] = Image.fromarray(rng.random((24, 32)).astype(np.float32))
    for suffix, names in {
        "png": ("RGB", "L", "P", "1", "RGBA", "LA", "I;16"), "jpg": ("RGB", "L", "CMYK"), "webp": ("RGB", "RGBA"),
        "tif": ("RGB", "L", "I;16", "F", "CMYK", "1"), "bmp": ("RGB", "L", "P", "1"), "gif": ("P",), "ppm": ("RGB",),
    }.items():  # fmt: skip
        for mode in names:
            stream = io.BytesIO()
            modes[mode].save(stream, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
            yield f"{mode.replace(';', '')}.{suffix}", stream.getvalue()


def arrays() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(1)
    for dtype in ("uint8", "int32", "int64", "float16", "float32", "float64", "bool", "complex64", "U3", ">f4"):
        for shape in ((16, 16), (16, 16, 3), (7,)):
            stream = io.BytesIO()
            np.save(stream, rng.integers(0, 5, shape).astype(dtype), allow_pickle=False)
            yield f"{dtype.strip('>')}{len(shape)}.npy", stream.getvalue()


BOXES = json.dumps([{"bbox": [0.1, 0.2, 0.5, 0.75], "label": "cube"}, {"bbox": [0, 0, 1, 1], "label": "käse"}])
TABLE = '{"caption": "a red cube"}\n{"rgb": "a.png", "caption": "käse"}\n'
FACTS = '{"brightness": 120.5, "n_humans": 2}'
ANSWERS = json.dumps([{"concept": "a cube", "kind": "point", "target": [0.25, 0.75]}])
PLAN = """from m4.inference.sampler import Stage, default_scheme
from m4.inference.parallel import MaskGIT

plan = [Stage(target="depth", scheme=MaskGIT(steps=4, temperature=0.5))]
"""
SHOTS = json.dumps([{"inputs": {"rgb": "a.png"}, "outputs": {"caption": "dax"}}])


def sounds() -> Iterator[tuple[str, bytes]]:
    wave = np.sin(np.arange(800) / 7) / 2
    for suffix, subtype in (("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("ogg", "VORBIS")):
        stream = io.BytesIO()
        soundfile.write(stream, wave, 8000, format=suffix, subtype=subtype)
        yield f"{subtype}.{suffix}", stream.getvalue()


def a_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for i in range(4):
            info = tarfile.TarInfo(f"dir/{i}.txt")
            info.size = 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
    return stream.getvalue()


TINY = {f"vit_xs_{side}": {"dim_tokens": 64, "depth": n, "num_heads": 4} for side, n in (("enc", 3), ("dec", 2))}
WORDS = (
    b"null", b"-1", b"1e999", b"NaN", b"[" * 3000, b'"\\ud800"', b"99999999999999999999", b"{}", b"'", b"\xff", b"\n",
)  # fmt: skip


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes: bits, bytes, cuts, repeats, inserted bytes, swapped numbers in text."""
    for _ in range(int(rng.integers(1, 5))):
        if not data:
            return data
        at, how, size = int(rng.integers(len(data))), int(rng.integers(8)), int(rng.integers(1, 40))
        if how == 0:
            data = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        elif how == 1:
            data = data[:at] + rng.bytes(size) + data[at + size :]
        elif how == 2:
            data = data[:at]
        elif how == 3:
            data = data[:at] + data[at : at + size] * int(rng.integers(2, 5)) + data[at:]
        elif how == 4:
            data = data[:at] + data[at + size :]
        elif how == 5:
            data = data[:at] + bytes(size) + data[at + size :]
        elif how == 6:  # a word that parsers know, in the place of another
            data = data[:at] + WORDS[int(rng.integers(len(WORDS)))] + data[at + size :]
        else:  # a header's size or count
            data = data[:at] + int(rng.integers(2**62)).to_bytes(8, "little") + data[at + 8 :]
    return data


# ---- Who reads it ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """A file's content, and its reader, which gives all of it or a ValueError; `whole` says whether it is all."""

    file: Path
    data: bytes
    read: Callable[[Path], Any]
    whole: Callable[[Any], bool] = lambda value: True


def of_training(signal_name: str) -> Callable[[Path], Any]:
    return lambda p: decode(signal_name, str(p), p.read_bytes())


def kinds(root: Path, sampler: Sampler, stored: dict[str, Path]) -> dict[str, list[Kind]]:
    """By group, of which each is tried as often."""
    found = collections.defaultdict(list)
    for group, files in {"pictures": pictures(), "arrays": arrays()}.items():
        for name, data in files:
            for signal_name in ("rgb", "depth", "normals", "semseg", "instance", "thermal", "mask", "edges", "palette"):
                found[group].append(Kind(root / name, data, of_training(signal_name)))
            for signal_name in ("rgb", "depth"):
                read = lambda p, s=signal_name: sampler.read(s, p)  # noqa: E731
                found[group].append(Kind(root / name, data, read))
            found[group].append(Kind(root / name, data, load_mask))
    for name, data in sounds():
        found["sounds"].append(Kind(root / name, data, of_training("audio")))
    words = {"boxes.json": BOXES, "caption.txt": "a red cube", "caption.json": '["a", "b"]',
             "palette.json": "[[255, 0, 0], [0, 128, 255]]"}  # fmt: skip
    for name, data in words.items():
        found["words"].append(Kind(root / name, data.encode(), of_training(name.partition(".")[0])))
    facts = MetadataRecipe().fit([{"metadata": {"brightness": 3}}], seed=0)
    answers = AnswerRecipe(max_length=96).fit([{"boxes": {"bbox": np.zeros((1, 4)), "label": ["a cube"]}}], seed=0)
    readers = {"boxes": sampler.tokenizer("boxes"), "metadata": facts, "answer": answers}
    for name, data in {"boxes": BOXES, "metadata": FACTS, "answer": ANSWERS}.items():
        read = lambda p, t=readers[name], n=name: t.encode([read_sample({n: p}, {n: t})[n]])  # noqa: E731
        found["words"].append(Kind(root / f"{name}2.json", data.encode(), read))
    found["table"].append(Kind(root / "table.jsonl", TABLE.encode(), lambda p: read_inputs([str(p)])))
    found["shots"].append(Kind(root / "shots.json", SHOTS.encode(), read_shots))
    found["plan"].append(Kind(root / "plan.py", PLAN.encode(), lambda p: load_config(str(p), "plan")))
    found["tar"].append(Kind(root / "x.tar", a_tar(), lambda p: members(p), lambda value: len(value) in (4, 5)))
    for suffix, text in {"txt": "one\ntwo\nthree\n", "jsonl": '{"text": "one"}\n{"text": "two"}\n'}.items():
        found["texts"].append(Kind(root / f"texts.{suffix}", text.encode(), lambda p: read_texts(p, root)))
    convert_it = lambda p: convert(p, root / "converted")  # noqa: E731
    tokenizer_to_ours = lambda p: released.convert(p, root / "converted", signal="rgb", presets=TINY)  # noqa: E731
    readers = {"model": load_model, "tokenizer": load_tokenizer, "header": TensorFile.read, "original": convert_it,
               "released": tokenizer_to_ours}  # fmt: skip
    for name, file in stored.items():
        found[name.split()[0]].append(Kind(root / file.name, file.read_bytes(), readers[name.split()[0]]))
    found["presets"].append(Kind(root / "presets.json", json.dumps(TINY).encode(), read_presets))
    return dict(found)


def read_texts(path: Path, root: Path) -> list[Any]:
    texts = Texts(files=(str(path),), validation_share=0, test_share=0)
    texts.prepare(root / "data")
    split = texts.split("train", root / "data")
    return [split[i] for i in range(len(split))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A model's folder and token shards, of a tiny kind."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / "tokens").mkdir()
    return root


BENCH = {
    "operator_induction/support.json": [
        {"image": [f"operator_induction/{i}.png"], "question": "?", "answer": [1, 2, i]} for i in range(8)
    ],
    "operator_induction/query.json": [
        {"image": ["operator_induction/0.png"], "question": "?", "operator": "x", "answer": 3}
    ],
}


def a_bench(root: Path) -> Path:
    """A data set of VL-ICL Bench."""
    for name, entries in BENCH.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(entries))
    for i in range(8):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(root / f"operator_induction/{i}.png")
    return root


def from_bench(root: Path) -> Episode:
    vl_icl._read.cache_clear()
    return VLICL(folder=str(root), dataset="operator_induction", size=8).draw("test", 0, root)


def in_a_folder(root: Path, model: Path) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """Files that are read with others beside them: a run's config and tokenizers."""
    for name in ("config.json", "tokenizers/rgb.safetensors", "tokenizers/caption.safetensors"):
        yield model / name, lambda: load_run(model)
    yield root / "config.py", lambda: load_config(str(root / "config.py"))
    for name in (*BENCH, "operator_induction/0.png"):
        yield a_bench(root / "bench") / name, lambda: from_bench(root / "bench")


def test_whatever_is_read_is_whole_or_refused_by_name(tmp_path, folders, capsys):
    saved = ROOT / "tests/data/runs_0.1"
    model = folders / "run"
    shutil.copytree(saved / "run", model)
    (folders / "config.py").write_text("config = {'a': [1, 2]}\n")
    sampler = Sampler.load("scenes", batch_size=1)
    stored = {
        "model file": saved / "model.safetensors", "tokenizer rgb": model / "tokenizers/rgb.safetensors",
        "tokenizer text": model / "tokenizers/caption.safetensors", "header": saved / "model.safetensors",
        "original model": tmp_path / "original.safetensors", "released tokenizer": tmp_path / "vq.safetensors",
    }  # fmt: skip
    for name in ("fm_qknorm", "tokenizers/vq_euclidean"):
        spec = json.loads((ROOT / f"tests/parity/{name}/state_dict.json").read_text())
        write_checkpoint(spec, stored["original model" if name == "fm_qknorm" else "released tokenizer"])
    alone = kinds(tmp_path, sampler, stored)
    heavy = ["model", "original", "released", "with others"]  # a few tenths of a second each
    light = [group for group in alone if group not in heavy]
    rng, counts, start = np.random.default_rng(0), collections.Counter(), time.monotonic()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    problems, tried = [], collections.Counter()

    def check(group: str, file: Path, data: bytes, read: Callable[[], Any], whole: Callable[[Any], bool]) -> None:
        file.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = with_limits(read)
            counts["read"] += 1
            if not whole(value):
                problems.append((file.name, data[:200], "half of it was read"))
        except ValueError as error:
            counts["refused"] += 1
            if file.name not in str(error):
                problems.append((file.name, data[:200], f"not named: {error}"))
        except BaseException:
            problems.append((file.name, data[:200], traceback.format_exc()[-1500:]))
        tried[group] += 1

    try:
        together = [(file, file.read_bytes(), read) for file, read in in_a_folder(folders, model)]
        while time.monotonic() - start < SECONDS and len(problems) < 20:
            groups = heavy if tried.total() % 20 == 0 else light
            group = groups[int(rng.integers(len(groups)))]
            if group == "with others":
                file, data, read = together[int(rng.integers(len(together)))]
                check(group, file, mutated(data, rng), read, lambda value: True)
                file.write_bytes(data)
            else:
                kind = alone[group][int(rng.integers(len(alone[group])))]
                check(group, kind.file, mutated(kind.data, rng), lambda k=kind: k.read(k.file), kind.whole)
                kind.file.unlink()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    with capsys.disabled():
        print(f"\n{counts.total()} damaged files in {time.monotonic() - start:.0f} s: {dict(counts)}; of {dict(tried)}")
    assert not problems, "\n\n".join(f"{name} {data!r}\n{what}" for name, data, what in problems)


def test_damaged_token_shards(tmp_path, capsys):
    """Whole, or refused with the shard's name."""
    from m4.data.dataset import Dataset
    from m4.data.pretokenize import prepare
    from m4.data.sources.folders import Folders
    from m4_tokenizers.modalities.text import TextRecipe

    (tmp_path / "raw/caption").mkdir(parents=True)
    for i in range(40):
        (tmp_path / f"raw/caption/{i}.txt").write_text(f"a red cube and {i} spheres")
    source = Folders(root=str(tmp_path / "raw"), validation_share=0, test_share=0)
    (tokens,) = prepare([Dataset(source=source)], [TextRecipe()], tmp_path / "data", seed=0).tokens

    def read() -> list[dict[str, np.ndarray]]:
        shards = TokenShards(tokens, "train")
        return [shards[i] for i in range(len(shards))]

    expected, rng, counts = [safetensors.numpy.save(r) for r in read()], np.random.default_rng(0), collections.Counter()
    files = [p for p in tokens.iterdir() if p.is_file() and p.name.startswith("train")]
    originals = {p: p.read_bytes() for p in files}
    start = time.monotonic()
    while time.monotonic() - start < 20:
        file = files[int(rng.integers(len(files)))]
        file.write_bytes(mutated(originals[file], rng))
        try:
            assert [safetensors.numpy.save(r) for r in with_limits(read)] == expected
            counts["read"] += 1
        except ValueError as error:
            assert file.name in str(error), error
            counts["refused"] += 1
        file.write_bytes(originals[file])
    with capsys.disabled():
        print(f"\n{counts.total()} damaged shards and manifests: {dict(counts)}")
