"""Learned tokenizers: quantizers, every kind of signal, losses, diffusion decoders, training that resumes exactly."""

import dataclasses
import json
import shutil
import signal as signals_of_the_system
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, environment
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizers import EXAMPLES

from m4.config import load_config
from m4.registry import classes
from m4.tokens.tokenizer import load_tokenizer, save_tokenizer
from m4_tokenizers import losses
from m4_tokenizers.modalities.edges import EdgesRecipe, canny
from m4_tokenizers.modalities.features import FeatureMapRecipe, PoseRecipe, VectorRecipe
from m4_tokenizers.modalities.image import ImageRecipe, structural_similarity
from m4_tokenizers.modalities.instances import MaskRecipe
from m4_tokenizers.modalities.normals import NormalsRecipe
from m4_tokenizers.modalities.semseg import SemanticRecipe
from m4_tokenizers.networks.diffusion import DiffusionDecoder, Schedule
from m4_tokenizers.networks.patch_mixing import PatchDecoder, PatchEncoder
from m4_tokenizers.networks.unet import UNet, UViT
from m4_tokenizers.networks.vectors import VectorDecoder, VectorEncoder
from m4_tokenizers.networks.vit import ViTDecoder, ViTEncoder
from m4_tokenizers.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer, Memcodes, VectorQuantizer

QUANTIZERS = {
    "cosine": VectorQuantizer(num_codes=24, latent_size=6),
    "euclidean": VectorQuantizer(num_codes=24, latent_size=6, cosine=False),
    "product": VectorQuantizer(num_codes=12, latent_size=6, num_codebooks=3, cosine=False),
    "learned": LearnedVectorQuantizer(num_codes=24, latent_size=6),
    "memcodes": Memcodes(num_codes=12, latent_size=6, num_codebooks=2),
    "fsq": FiniteScalarQuantizer(levels=(5, 4, 3)),
    "lookup_free": LookupFreeQuantizer(num_bits=5),
}


def latents(size: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (3, 4, 5, size)) * 1.5


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_share_one_interface(name):
    c = QUANTIZERS[name]
    module, x = c.make(rngs=nnx.Rngs(0)), latents(c.latent_size)
    out = module(x)
    last = (c.num_codebooks,) if c.num_codebooks > 1 else ()
    assert out.codes.shape == x.shape and out.ids.shape == (*x.shape[:-1], *last) and out.ids.dtype == jnp.int32
    assert int(out.ids.min()) >= 0 and int(out.ids.max()) < c.num_codes and out.loss.shape == ()
    np.testing.assert_allclose(module.look_up(out.ids), out.codes, atol=1e-6)  # ids say all that codes say
    np.testing.assert_array_equal(module(x[1:2]).ids[0], out.ids[1])  # a batch as its rows
    # Gradients reach the latents; in training the draw of Memcodes has a key.
    gradient = jax.grad(lambda x: jnp.sum(module(x, jax.random.key(1)).codes ** 2))(x)
    assert bool(jnp.isfinite(gradient).all()) and float(jnp.abs(gradient).max()) > 0


def test_finite_scalars_reach_every_code_and_come_back():
    module = QUANTIZERS["fsq"].make(rngs=nnx.Rngs(0))
    every = jnp.arange(QUANTIZERS["fsq"].num_codes)
    codes = module.look_up(every)
    assert len(np.unique(np.asarray(codes), axis=0)) == len(every) and float(jnp.abs(codes).max()) <= 1
    # Latents far out give the outermost levels.
    np.testing.assert_array_equal(module(jnp.full((1, 3), 9.0)).ids, [module.config.num_codes - 1])
    drawn = module(jax.random.normal(jax.random.key(0), (4000, 3)) * 2).ids
    assert len(np.unique(drawn)) == len(every)


def test_lookup_free_loss_prefers_sure_and_even_choices():
    module = QUANTIZERS["lookup_free"].make(rngs=nnx.Rngs(0))
    every = module.look_up(jnp.arange(32))
    even, same, unsure = module(every).loss, module(every[:1] * jnp.ones((32, 1))).loss, module(every * 0.05).loss
    assert float(even) < float(same) and float(even) < float(unsure)


@pytest.mark.parametrize("name", ["cosine", "euclidean", "product"])
def test_moving_averages_follow_the_latents_and_dead_codes_return(name):
    c = dataclasses.replace(QUANTIZERS[name], decay=0.7)
    module = c.make(rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(c.num_codes, c.latent_size)).astype(np.float32) * 3
    module.codes[...] = module.codes[...] + 100 * (jnp.arange(c.num_codes)[None, :, None] > 2)  # most are far away
    sizes = []
    for step in range(60):
        x = jnp.asarray(centres[rng.integers(0, len(centres), 400)] + rng.normal(size=(400, c.latent_size)) * 0.05)
        out = module(x.astype(jnp.float32))
        sizes.append(len(np.unique(out.ids)))
        module.update(x.astype(jnp.float32), out.ids, jax.random.key(step))
    assert sizes[-1] > 0.7 * c.num_codes > sizes[0]
    error = (
        jnp.mean(jnp.square(module.look_up(out.ids) - x))
        if not c.cosine
        else 1
        - jnp.mean(
            jnp.sum(module.look_up(out.ids) * x, -1)
            / jnp.linalg.norm(x, axis=-1)
            / jnp.linalg.norm(module.look_up(out.ids), axis=-1)
        )
    )
    assert float(error) < 0.5


def test_k_means_start_uses_all_codes():
    x = np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float32)
    for name in ("cosine", "euclidean", "learned", "product"):
        module = QUANTIZERS[name].make(rngs=nnx.Rngs(0))
        module.start_from(x, seed=0)
        ids = np.asarray(module(jnp.asarray(x)).ids).reshape(len(x), -1)
        assert all(len(np.unique(column)) == QUANTIZERS[name].num_codes for column in ids.T)


PATCHES = dict(
    encoder=PatchEncoder(width=18, num_blocks=1),
    decoder=PatchDecoder(width=18, num_blocks=1),
    quantizer=LearnedVectorQuantizer(num_codes=32, latent_size=8),
    num_held_out=16,
    num_steps=8,
)
VIT = dict(encoder=ViTEncoder(width=32, depth=1, num_heads=2), decoder=ViTDecoder(width=32, depth=1, num_heads=2))


def extended(i: int) -> dict:
    """A raw example with every signal."""
    example, rng = dict(EXAMPLES[i]), np.random.default_rng(i)
    normals = rng.normal(size=(64, 64, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    rotations = np.linalg.qr(rng.normal(size=(4, 3, 3)))[0].astype(np.float32)
    rotations *= np.linalg.det(rotations)[:, None, None]
    return {
        **example,
        "normals": np.where(example["depth"][..., None] > 0, normals, 0).astype(np.float32),
        "semseg": (example["instance"] + (example["depth"] > 0)).astype(np.int32),
        "clip": rng.normal(size=(4, 4, 12)).astype(np.float32),
        "clip_global": rng.normal(size=20).astype(np.float32),
        "human_pose": rotations,
        "file": f"picture_{i}.png",
    }


ALL = [extended(i) for i in range(64)]
RECIPES = {
    "normals": NormalsRecipe(**PATCHES),
    "semseg": SemanticRecipe(num_classes=3, **PATCHES),
    "edges": EdgesRecipe(**PATCHES),
    "mask": MaskRecipe(**PATCHES),
    "clip": FeatureMapRecipe(
        num_features=12,
        image_size=4,
        encoder=ViTEncoder(patch_size=1, width=32, depth=1, num_heads=2),
        decoder=ViTDecoder(patch_size=1, width=32, depth=1, num_heads=2),
        quantizer=VectorQuantizer(num_codes=32, latent_size=8),
        num_steps=8,
        num_held_out=16,
    ),
    "vectors": VectorRecipe(
        num_features=20,
        encoder=VectorEncoder(width=16, depth=1),
        decoder=VectorDecoder(width=16, depth=1),
        quantizer=Memcodes(num_codes=16, latent_size=16, num_codebooks=4),
        num_steps=8,
        num_held_out=16,
    ),
    "pose": PoseRecipe(
        signal="human_pose",
        num_features=36,
        encoder=VectorEncoder(width=16, depth=1),
        decoder=VectorDecoder(width=16, depth=1),
        quantizer=Memcodes(num_codes=16, latent_size=16, num_codebooks=4),
        num_steps=8,
        num_held_out=16,
    ),
    "convolved": MaskRecipe(
        **{**PATCHES, **VIT, "decoder": ViTDecoder(width=32, depth=1, num_heads=2, num_convolutions=2)}
    ),
}


@pytest.fixture(scope="module", params=RECIPES)
def tokenizer(request):
    return RECIPES[request.param].fit(ALL, seed=0)


def test_every_signal_has_a_tokenizer_that_keeps_the_contract(tokenizer, tmp_path):
    recipe, given = tokenizer.recipe, [tokenizer.signal_of(example) for example in ALL[:20]]
    ids = tokenizer.encode(given)
    assert all(row.shape == (recipe.modality.max_tokens,) for row in ids)
    assert all(row.min() >= 0 and row.max() < recipe.modality.vocab_size for row in ids)
    order = np.random.default_rng(0).permutation(20)
    for place, row in zip(order, tokenizer.encode([given[i] for i in order]), strict=True):
        np.testing.assert_array_equal(row, ids[place])
    np.testing.assert_array_equal(tokenizer.encode(given[7:8])[0], ids[7])
    decoded = tokenizer.decode(ids)
    assert all(np.shape(d) == np.shape(g) and d.dtype == g.dtype for d, g in zip(decoded, given, strict=True))
    np.testing.assert_allclose(tokenizer.decode(ids[3:4])[0], decoded[3], atol=1e-5)
    tokenizer.encode(decoded)  # what comes out is a signal again
    save_tokenizer(tokenizer, tmp_path / "a")
    save_tokenizer(load_tokenizer(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for picture in (tokenizer.draw(given[0], image=None), tokenizer.draw(decoded[0], image=ALL[0]["rgb"])):
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    tokenizer.write(given[0], tmp_path / "files", image=None)
    written = sorted((tmp_path / "files").iterdir())
    assert written and all(path.stat().st_size for path in written)
    stored = next((p for p in written if p.suffix == ".npy"), None) or tmp_path / "files" / f"{recipe.signal}.png"
    np.testing.assert_allclose(tokenizer.read(str(stored)), given[0], atol=0.01)
    card = tokenizer.card
    assert {"values", "tokens_per_sample", "vocab_size", "codes_used", "perplexity", "encoded_per_second"} <= set(card)
    assert any(f"{key}_of_mean" in card for key in card) and json.dumps(card)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("normals", np.full((64, 64, 3), 2, np.float32), "length 3.46"),
        ("normals", np.zeros((32, 64, 3), np.float32), r"\[32, 64, 3\] was given; allowed: \[64, 64, 3\]"),
        ("semseg", np.full((64, 64), 3, np.int32), "class ids 3 to 3 were given; allowed: 0 to 2"),
        ("semseg", np.zeros((64, 64), np.float32), "float32 was given; allowed: integers"),
        ("edges", np.full((64, 64), 1.5, np.float32), "edges from 1.5 to 1.5"),
        ("mask", np.zeros((64, 64), np.uint8), "uint8 was given; allowed: bool"),
        ("clip", np.full((4, 4, 12), np.nan, np.float32), "192 values that are not finite"),
        ("vectors", np.zeros(21, np.float32), r"\[21\] was given; allowed: \[20\]"),
    ],
)
def test_bad_signals_are_named(name, bad, words):
    tokenizer = dataclasses.replace(RECIPES[name], num_steps=0).fit(ALL[:40], seed=0)
    with pytest.raises(ValueError, match=words):
        tokenizer.encode([bad])


def test_spoiled_files_are_named(tmp_path):
    tokenizer = dataclasses.replace(RECIPES["mask"], num_steps=0).fit(ALL[:40], seed=0)
    config, arrays = tokenizer.state()
    key = "quantizer.codes"
    for spoiled, words in (
        ({**arrays, key: arrays[key] * np.nan}, "quantizer.codes have values that are not finite"),
        ({**arrays, key: arrays[key][:5]}, r"do not fit the recipe.*quantizer.codes': \[5, 8\]"),
        ({k: v for k, v in arrays.items() if k != key}, "quantizer.codes': 'missing'"),
    ):
        with pytest.raises(ValueError, match=words):
            type(tokenizer).from_state(config, spoiled, {})


def test_bad_data_is_reported_with_its_file_before_training():
    spoiled = [*ALL[:40], {**ALL[40], "clip": np.full((4, 4, 12), np.inf, np.float32), "file": "broken.npy"}]
    with pytest.raises(ValueError, match=r"example 40 \(broken.npy\) of signal clip: .*not finite"):
        dataclasses.replace(RECIPES["clip"], num_held_out=0).fit(spoiled, seed=0)


masks = st.lists(st.booleans(), min_size=64 * 64, max_size=64 * 64)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_masks_and_class_maps_survive_their_arrays(seed, share):
    mask = np.random.default_rng(seed).random((64, 64)) < share
    recipe = RECIPES["mask"]
    np.testing.assert_array_equal(recipe.to_signals(recipe.to_arrays([mask]))[0], mask)
    classes = (mask * 2).astype(np.int32)
    scores = np.eye(3)[RECIPES["semseg"].to_arrays([classes])]
    np.testing.assert_array_equal(RECIPES["semseg"].to_signals(scores)[0], classes)


def test_canny_agrees_with_scikit_image():
    feature = pytest.importorskip("skimage.feature", reason='pip install "m4-jax[photos]"')
    data = pytest.importorskip("skimage.data")
    picture = data.astronaut()[:256, :256]
    ours = canny(picture, sigma=1.5)
    grey = picture @ np.array([0.299, 0.587, 0.114]) / 255
    theirs = feature.canny(grey, sigma=1.5, low_threshold=0.2, high_threshold=0.6)  # its Sobel is 4 times ours
    measured = RECIPES["edges"].measure([theirs.astype(np.float32)], [ours], [{}])
    assert measured["f1"] > 0.9 and 0.02 < ours.mean() < 0.3
    assert canny(np.full((64, 64, 3), 99, np.uint8)).sum() == 0


def test_structural_similarity_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason='pip install "m4-jax[photos]"')
    rng = np.random.default_rng(0)
    a = rng.random((64, 64, 3))
    b = (a + rng.normal(size=a.shape) * 0.1).clip(0, 1)
    theirs = metrics.structural_similarity(
        a, b, channel_axis=2, data_range=1, gaussian_weights=True, use_sample_covariance=False, sigma=1.5, full=True
    )[1].mean()
    assert structural_similarity(a, b) == pytest.approx(theirs, abs=2e-3) and structural_similarity(a, a) == 1


def test_losses():
    a, b = jnp.array([[[[3.0, 0.0], [0.0, 2.0]]]]), jnp.array([[[[0.0, 0.0], [0.0, 4.0]]]])
    half = jnp.array([[[[1.0, 1.0], [0.0, 0.0]]]])
    assert losses.SquaredError()(a, b, jnp.ones_like(a)) == pytest.approx((9 + 4) / 4)
    assert losses.SquaredError()(a, b, half) == pytest.approx(9 / 2)  # what does not count is left out
    assert losses.AbsoluteError()(a, b, half) == pytest.approx(3 / 2)
    assert losses.Huber(delta=1.0)(a, b, half) == pytest.approx(2.5 / 2)
    assert losses.CosineDistance()(a[..., 1:, :], b[..., 1:, :], jnp.ones((1, 1, 1, 2))) == pytest.approx(0, abs=1e-6)
    classes = jnp.array([[[0, 1]]])
    expected = np.mean([np.log1p(np.exp(-3)), np.log1p(np.exp(-2))])
    assert losses.CrossEntropy()(a, classes, jnp.ones((1, 1, 2))) == pytest.approx(expected, rel=1e-5)
    unknown = jax.grad(lambda a: losses.SquaredError()(a, b, half))(a)
    assert (unknown[0, 0, 1] == 0).all()


@pytest.mark.parametrize(
    "name",
    ["fsq", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cosine", "lookup_free", "product", "euclidean"))],
)
def test_any_quantizer_trains_in_any_network(name):
    """At two resolutions in turn."""
    parts = {**PATCHES, **VIT, "quantizer": QUANTIZERS[name], "num_steps": 30, "sizes": (32, 64)}
    recipe = ImageRecipe(**parts)
    before, after = (dataclasses.replace(recipe, num_steps=n).fit(EXAMPLES, seed=0) for n in (0, 30))
    assert after.card["psnr"] > before.card["psnr"]


def test_adversarial_training_moves_both_sides():
    recipe = ImageRecipe(**{**PATCHES, "adversarial": losses.Adversarial(first_step=2, width=8, depth=2)})
    plain, judged = (r.fit(EXAMPLES, seed=0) for r in (dataclasses.replace(recipe, adversarial=None), recipe))
    assert not np.array_equal(plain.state()[1]["decoder.unproject"], judged.state()[1]["decoder.unproject"])


NETWORKS = {
    "unet": UNet(width=32, multipliers=(1, 1), num_blocks=1),
    "uvit": UViT(widths=(32,), num_blocks=1, depth=1, width=32, num_heads=2, down_to_middle=True),
    "uvit_xattn": UViT(
        widths=(32,), num_blocks=1, depth=3, width=32, num_heads=2, conditioning="xattn", long_skips=True
    ),
}


@pytest.mark.slow  # trains a tokenizer twice
@pytest.mark.parametrize("name", ["uvit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("unet", "uvit_xattn"))])
def test_diffusion_decoder_learns_on_a_frozen_encoder(name, tmp_path):
    base = ImageRecipe(**PATCHES)
    save_tokenizer(base.fit(EXAMPLES, seed=0), tmp_path / "base.safetensors")
    decoder = DiffusionDecoder(
        network=NETWORKS[name], schedule=Schedule(prediction="v_prediction"), num_decode_steps=3, drop_tokens=0.1
    )
    recipe = dataclasses.replace(base, decoder=decoder, start_from=str(tmp_path / "base.safetensors"), batch_size=8)
    tokenizer = recipe.fit(EXAMPLES, seed=0)
    given = [e["rgb"] for e in EXAMPLES[:5]]
    ids = tokenizer.encode(given)
    frozen = load_tokenizer(tmp_path / "base.safetensors")
    for mine, theirs in zip(ids, frozen.encode(given), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for key, array in frozen.state()[1].items():
        if not key.startswith("decoder."):
            np.testing.assert_array_equal(tokenizer.state()[1][key], array)
    decoded = tokenizer.decode(ids)
    np.testing.assert_array_equal(tokenizer.decode(ids)[2], decoded[2])  # the first noise is always the same
    np.testing.assert_allclose(tokenizer.decode(ids[2:3])[0].astype(int), decoded[2].astype(int), atol=1)
    with pytest.raises(ValueError, match="has another quantizer"):
        dataclasses.replace(recipe, quantizer=LearnedVectorQuantizer(num_codes=16, latent_size=8)).fit(EXAMPLES, seed=0)


def test_schedule_and_steps_are_checked():
    with pytest.raises(ValueError, match="unknown schedule 'cosin'; allowed: linear"):
        Schedule(kind="cosin")
    with pytest.raises(ValueError, match="allowed: 1 to 1000"):
        Schedule().timesteps(2000)
    for kind in ("linear", "squaredcos_cap_v2", "shifted_cosine:0.5"):
        signal = Schedule(kind=kind).signal
        assert signal[0] > 0.99 and signal[-1] == 0 and (np.diff(signal) < 0).all()


CONFIG = """
from m4.data.sources.scenes import Scenes
from m4_tokenizers.modalities.image import ImageRecipe
from m4_tokenizers.networks.patch_mixing import PatchDecoder, PatchEncoder
from m4_tokenizers.quantizers.vector import VectorQuantizer
from m4_tokenizers.train import TokenizerConfig

config = TokenizerConfig(
    source=Scenes(num_train=64, num_validation=16, num_test=8, num_heldout=8),
    tokenizers=(
        ImageRecipe(
            encoder=PatchEncoder(width=18, num_blocks=1), decoder=PatchDecoder(width=18, num_blocks=1),
            quantizer=VectorQuantizer(num_codes=32, latent_size=8), num_steps=60, save_every=20, log_every=5,
            num_held_out=8,
        ),
    ),
)
"""


def train_command(folder, name: str, *more: str) -> list[str]:
    out = ["--out", str(folder / name), "--data-dir", str(folder / "data")]
    return [sys.executable, "-m", "m4_tokenizers", "train", str(folder / "config.py"), *out, *more]


def test_training_goes_on_from_its_last_checkpoint(tmp_path):
    recipe = ImageRecipe(
        encoder=PatchEncoder(width=18, num_blocks=0), decoder=PatchDecoder(width=18, num_blocks=1),
        quantizer=VectorQuantizer(num_codes=32, latent_size=8), num_steps=6, save_every=2, log_every=2, batch_size=8,
    )  # fmt: skip
    pictures = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3)).astype(np.uint8)
    source = [{"rgb": picture} for picture in pictures]
    whole = recipe.fit(source, seed=0, folder=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    again = recipe.fit(source, seed=0, folder=tmp_path)
    for key, array in whole.state()[1].items():
        np.testing.assert_array_equal(array, again.state()[1][key], err_msg=key)


@pytest.mark.slow
def test_killed_training_resumes_exactly(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": 300}
    whole = subprocess.run(train_command(tmp_path, "whole"), **options)
    assert whole.returncode == 0, whole.stderr[-2000:]
    process = subprocess.Popen(
        train_command(tmp_path, "killed"), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    finished = tmp_path / "killed" / "rgb_tokens" / "checkpoints" / "20"
    while not finished.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signals_of_the_system.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "rgb_tokens.safetensors").exists()
    resumed = subprocess.run(train_command(tmp_path, "killed"), **options)
    assert resumed.returncode == 0 and "resumed from step" in resumed.stdout, resumed.stderr[-2000:]
    a, b = (load_tokenizer(tmp_path / n / "rgb_tokens.safetensors").state()[1] for n in ("whole", "killed"))
    for key, array in a.items():
        np.testing.assert_array_equal(array, b[key], err_msg=key)
    lines = [json.loads(x) for x in (tmp_path / "killed" / "rgb_tokens" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 61, 5)) and {"codes_used", "perplexity"} <= set(lines[0])
    config = load_config(str(tmp_path / "config.py"))
    eight = config.tokenizers[0].fit(config.source.split("train", str(tmp_path / "data")), seed=0)
    for key, array in eight.state()[1].items():  # the same on eight devices
        np.testing.assert_allclose(array, a[key], atol=2e-3, err_msg=key)
    other = subprocess.run(train_command(tmp_path, "whole", "--tokenizers.0.num-steps", "61"), **options)
    assert other.returncode == 1 and "another config" in other.stderr
    evaluated = subprocess.run(
        [
            *(sys.executable, "-m", "m4_tokenizers", "evaluate", str(tmp_path / "whole" / "rgb_tokens.safetensors")),
            *(str(tmp_path / "config.py"), "--num-samples", "8", "--out", str(tmp_path / "cards"), "--write"),
        ],
        **{**options, "cwd": tmp_path, "env": {**environment()}},
    )
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    card = json.loads((tmp_path / "cards" / "rgb_tokens.json").read_text())
    assert (
        card["split"] == "validation"
        and card["psnr"] == load_tokenizer(tmp_path / "whole" / "rgb_tokens.safetensors").card["psnr"]
    )
    (tmp_path / "README.md").write_text("before\n<!-- cards -->\nold\n<!-- end of cards -->\nafter\n")
    files = ["--cards", str(tmp_path / "cards"), "--readme", str(tmp_path / "README.md")]
    written = subprocess.run([sys.executable, "-m", "m4_tokenizers", "table", *files], **options)
    text = (tmp_path / "README.md").read_text()
    assert written.returncode == 0 and f"PSNR dB {card['psnr']:.1f}" in text and "old" not in text
    assert text.startswith("before") and text.endswith("after\n")


def test_readme_quantizer_is_one_file(tmp_path, monkeypatch):
    """The README's example as it stands: found, trained, stored and loaded without another file being edited."""
    import m4_tokenizers.quantizers

    text = (ROOT / "tokenizers" / "README.md").read_text()
    (tmp_path / "quantizers").mkdir()
    (tmp_path / "quantizers" / "residual.py").write_text(text.split("```python\n")[1].split("```")[0])
    monkeypatch.setattr(m4_tokenizers, "__path__", [*m4_tokenizers.__path__, str(tmp_path)])
    folders = [*m4_tokenizers.quantizers.__path__, str(tmp_path / "quantizers")]
    monkeypatch.setattr(m4_tokenizers.quantizers, "__path__", folders)
    classes.cache_clear()
    from m4_tokenizers.quantizers.residual import ResidualQuantizer

    recipe = ImageRecipe(**{**PATCHES, "quantizer": ResidualQuantizer(num_codes=24, latent_size=8)})
    tokenizer = recipe.fit(EXAMPLES, seed=0)
    save_tokenizer(tokenizer, tmp_path / "a.safetensors")
    loaded = load_tokenizer(tmp_path / "a.safetensors")
    assert loaded.modality.shape == (8, 8, 2) and loaded.modality.vocab_size == 24
    images = [e["rgb"] for e in EXAMPLES[:3]]
    np.testing.assert_array_equal(loaded.encode(images), tokenizer.encode(images))
    assert tokenizer.card["psnr"] > tokenizer.card["psnr_of_mean"]
    sys.modules.pop("m4_tokenizers.quantizers.residual")
    classes.cache_clear()
