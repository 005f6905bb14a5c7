"""The original's tokenizers: every stage within rounding, files there and back with equal bytes, clear refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import parity_run
import pytest
from conftest import PARITY, ROOT, environment
from make_checkpoint import make_tensors, metadata_of, write_checkpoint
from test_convert import fixture

from m4.tensor_file import TensorFile, make_header, write
from m4.tokens.tokenizer import load_tokenizer, save_tokenizer
from m4_tokenizers.__main__ import main
from m4_tokenizers.interchange import architectures
from m4_tokenizers.interchange import fourm_tokenizers as released

VQVAES = [
    "vq_rgb_cosine", "vq_euclidean", "vq_featmap", "vq_global_memcodes", "vq_official_vit_s", "vq_poses_memcodes",
    "vq_sam_mask", "vq_semseg",
]  # fmt: skip
DIVAES = ["divae_unet", "divae_unet_rgb_clip", "divae_uvit", "divae_uvit_xattn_longskip"]
OTHERS = ["diffusion_schedules", "quantizer_train_cosine", "quantizer_train_euclidean"]
MANIFESTS = [
    "tok_ImageBind-H14-global_8k_16_224", "tok_ImageBind-H14_8k_224-448", "tok_depth_8k_224-448",
    "tok_human-poses_1k_8", "tok_rgb_16k_224-448", "tok_rgb_uvit_b", "tok_sam-instance_1k_64",
    "tok_semseg_4k_224-448",
]  # fmt: skip


QUICK = {"vq_euclidean", "vq_semseg", "vq_poses_memcodes", "divae_unet", *OTHERS}


def but_slow(names: list[str], quick: set[str]) -> list:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", but_slow(VQVAES + DIVAES + OTHERS, QUICK))
def test_parity_of_every_array(name):
    """Ids equal; arrays within 3 times the rounding that the fixture's README measured."""
    folder = fixture(f"tokenizers/{name}")
    meta, expected = json.loads((folder / "meta.json").read_text()), np.load(folder / "outputs.npz")
    tolerance = meta["tolerance"] if "tolerance" in meta else {}
    out = parity_run.run(folder)
    for key in expected.files:
        assert out[key].shape == expected[key].shape, key
        if np.issubdtype(expected[key].dtype, np.integer):
            np.testing.assert_array_equal(out[key], expected[key], err_msg=key)
            continue
        measured = tolerance[key]["max_abs_diff_f32_f64"] if key in tolerance else 0.0
        allowed = max(3 * measured, 4e-6)
        np.testing.assert_allclose(out[key], expected[key], rtol=0, atol=allowed, err_msg=key)


@pytest.mark.parametrize("name", but_slow(VQVAES + DIVAES, QUICK - {"divae_unet"}))
def test_there_and_back_with_equal_bytes(name, tmp_path):
    folder = fixture(f"tokenizers/{name}")
    spec, meta = (json.loads((folder / f"{f}.json").read_text()) for f in ("state_dict", "meta"))
    config = {**architectures.DEFAULTS, **spec["config"]}
    signal = next(n for n, recipe in released.RECIPES.items() if released.fits(recipe, config))
    source, ours, again, back = (tmp_path / f"{n}.safetensors" for n in ("original", "m4", "again", "back"))
    write_checkpoint(spec, source)
    released.convert(source, ours, signal=signal, presets=meta["presets"])
    save_tokenizer(load_tokenizer(ours), again)
    assert ours.read_bytes() == again.read_bytes()
    released.convert(again, back)
    assert source.read_bytes() == back.read_bytes()


def small(tmp_path: Path, change) -> Path:
    """A fixture's checkpoint after `change(tensors, config)`."""
    folder = fixture("tokenizers/vq_poses_memcodes")
    spec = json.loads((folder / "state_dict.json").read_text())
    tensors, config = make_tensors(spec), dict(spec["config"])
    change(tensors, config)
    path = tmp_path / "changed.safetensors"
    header = make_header({n: ("F32", x.shape) for n, x in tensors.items()}, metadata_of(config))
    write(path, header, ([x] for x in tensors.values()))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.pop("encoder.linear_in.bias"), "1 missing: encoder.linear_in.bias"),
        (lambda t, c: t.update({"extra.weight": np.zeros(3, np.float32)}), r"1 unknown: extra.weight \[3\]"),
        (lambda t, c: t.update({"quant_proj.bias": np.zeros(3, np.float32)}), r"quant_proj.bias \[3\] instead of"),
        (lambda t, c: c.update(enc_type="vit_q_enc"), "does not fit|unknown architecture"),
        (lambda t, c: c.update(quant_type="fsq"), "quant_type='fsq'"),
        (lambda t, c: c.update(patch_sice=8), "unknown config key 'patch_sice'.*patch_size"),
        (lambda t, c: c.update(n_channels="many"), "config n_channels='many' is no (int|Python literal)"),
        (lambda t, c: c.update(codebook_size=0), "config is of no tokenizer|changed.safetensors"),
        (lambda t, c: c.update(enc_type="BottleneckMLP/B_9999999-Wi_16"), "depth = 9,999,999, which no file"),
        (lambda t, c: c.clear(), "holds no tokenizer's config"),
    ],
)
def test_what_does_not_fit_is_named(change, words, tmp_path):
    path = small(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        released.convert(path, tmp_path / "out.safetensors", signal="pose")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 5000, "nested too deeply"),
        ("[1]", "an object of architectures"),
        ('{"unet_x": {"patch_size": 4}}', "model_channels of 'unet_x' is missing"),
        ('{"a": {"dim_tokens": 64, "depth": 10000000, "num_heads": 4}}', "depth of 'a' is 10000000"),
    ],
)
def test_a_file_of_architectures_is_named(text, words, tmp_path):
    (tmp_path / "presets.json").write_text(text)
    with pytest.raises(ValueError, match=rf"presets\.json: .*{words}"):
        architectures.read_presets(tmp_path / "presets.json")


def test_command_says_what_a_checkpoint_may_be(tmp_path, capsys):
    folder = fixture("tokenizers/vq_sam_mask")
    write_checkpoint(json.loads((folder / "state_dict.json").read_text()), tmp_path / "some.safetensors")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "some.safetensors"), str(tmp_path / "out.safetensors")])
    assert "Say --signal, one of depth, edges, sam_edges, mask" in capsys.readouterr().err


def test_encoder_decoder_command_points_here(tmp_path):
    folder = fixture("tokenizers/vq_semseg")
    write_checkpoint(json.loads((folder / "state_dict.json").read_text()), tmp_path / "some.safetensors")
    command = [sys.executable, "-m", "m4", "convert", str(tmp_path / "some.safetensors"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "python -m m4_tokenizers convert" in done.stderr


def test_converted_tokenizer_runs_as_any_other(tmp_path):
    """At another resolution too: the position table is interpolated."""
    folder = fixture("tokenizers/vq_rgb_cosine")
    spec, meta = (json.loads((folder / f"{f}.json").read_text()) for f in ("state_dict", "meta"))
    write_checkpoint(spec, tmp_path / "a.safetensors")
    rng = np.random.default_rng(0)
    for size, grid in ((0, 8), (96, 12)):
        out = tmp_path / f"{size}.safetensors"
        released.convert(tmp_path / "a.safetensors", out, signal="rgb", image_size=size, presets=meta["presets"])
        tokenizer = load_tokenizer(out)
        assert tokenizer.modality.shape == (grid, grid) and tokenizer.modality.name == f"tok_rgb@{8 * grid}"
        images = list(rng.integers(0, 256, (3, 8 * grid, 8 * grid, 3)).astype(np.uint8))
        ids = tokenizer.encode(images)
        assert ids[0].shape == (grid * grid,) and tokenizer.decode(ids)[0].dtype == np.uint8
        np.testing.assert_array_equal(tokenizer.encode(images[1:2])[0], ids[1])


def real_size(manifest: dict, path: Path) -> None:
    """A checkpoint of the real size with random numbers."""
    tensors = {name: tuple(shape) for name, shape, *_ in manifest["tensors"]}
    aliases = {name: tag[0].removeprefix("alias:") for name, _, *tag in manifest["tensors"] if tag and ":" in tag[0]}

    def value(name: str) -> np.ndarray:
        name = aliases.get(name, name)
        seed = int.from_bytes(name.encode()[-8:], "little")
        return np.random.default_rng(seed).standard_normal(tensors[name], np.float32)

    header = make_header({n: ("F32", s) for n, s in tensors.items()}, metadata_of(manifest["config"]))
    write(path, header, ([value(name)] for name in tensors))


@pytest.mark.slow
@pytest.mark.parametrize("name", MANIFESTS)
def test_official_tokenizers_at_their_real_size(name, tmp_path):
    manifest = json.loads((fixture("official_manifests") / f"{name}.json").read_text())
    source, ours, back = (tmp_path / f"{n}.safetensors" for n in (name, "m4", "back"))
    real_size(manifest, source)
    print(released.convert(source, ours))  # the file's name says of what
    released.convert(ours, back)
    tokenizer = load_tokenizer(ours)
    numbers = sum(int(np.prod(e.shape)) for e in TensorFile.read(source).entries.values())
    assert numbers >= manifest["num_parameters"]
    assert tokenizer.modality.vocab_size == manifest["config"]["codebook_size"]
    with source.open("rb") as a, back.open("rb") as b:
        assert os.path.getsize(source) == os.path.getsize(back)
        while block := a.read(2**26):
            assert block == b.read(2**26)
    for path in (source, ours, back):
        path.unlink()


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory):
    """A diffusion tokenizer of two channels, between those of depth and of normals: 4M's file, ours, the way back."""
    root = tmp_path_factory.mktemp("channels")
    folders = [PARITY / "pipeline/models" / name for name in ("tok_depth", "tok_normal")]
    if not folders[0].is_dir():
        pytest.skip("no fixture pipeline/models: set M4_PARITY to the folder of parity fixtures")
    one, three = (json.loads((folder / "state_dict.json").read_text()) for folder in folders)
    for a, b in zip(one["tensors"], three["tensors"], strict=True):
        a["shape"] = [(m + n) // 2 for m, n in zip(a["shape"], b["shape"], strict=True)]
    spec = {**one, "config": {**one["config"], "n_channels": 2}}
    original, ours, back = (root / f"{name}.safetensors" for name in ("wind", "ours", "back"))
    write_checkpoint(spec, original)
    released.convert(original, ours, image_size=32, presets=spec["presets"])
    released.convert(ours, back)
    return original, ours, back


def test_tokenizers_of_any_number_of_channels_convert(two_channels):
    original, _, back = two_channels
    assert back.read_bytes() == original.read_bytes()


@pytest.mark.slow  # compiles a diffusion decoder
def test_tokenizers_of_any_number_of_channels_run(two_channels):
    tokenizer = load_tokenizer(two_channels[1])
    maps = list(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 2)).astype(np.float32))
    ids = tokenizer.encode(maps)
    assert [x.shape for x in ids] == [(4,)] * 2 and [x.shape for x in tokenizer.decode(ids)] == [(32, 32, 2)] * 2
