"""Computes the arrays of a parity fixture with m4: python tests/parity_run.py FIXTURE_DIR --out FILE.npz

The fixture gives inputs and weights (see tests/parity/README.md); what comes out has the names and the layout of its
outputs.npz, and for fm_* the original's two losses as loss.mod and loss.token. Nothing else of the fixture is read.
Fixtures: the encoder-decoder (fm_*), VQVAEs and DiVAEs, diffusion schedules, quantizers in training.
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tokenizers"), str(ROOT / "tests" / "parity")]

import make_checkpoint  # noqa: E402

from m4 import fourm, losses  # noqa: E402
from m4.components import load_tokenizer  # noqa: E402
from m4.convert import convert  # noqa: E402
from m4.model import Model  # noqa: E402
from m4.model_file import load_model  # noqa: E402
from m4.tokens import MaskedBatch  # noqa: E402
from m4_tokenizers import released  # noqa: E402
from m4_tokenizers.diffusion import Schedule  # noqa: E402
from m4_tokenizers.quantizers import VectorQuantizer  # noqa: E402


def converted_model(folder: Path) -> Model:
    """The fixture's weights in the original's file format, converted and loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        original, ours = Path(scratch) / "original.safetensors", Path(scratch) / "model.safetensors"
        make_checkpoint.write_checkpoint(json.loads((folder / "state_dict.json").read_text()), original)
        convert(original, ours)
        return load_model(ours)


def read_batch(folder: Path, meta: dict) -> dict[str, dict[str, np.ndarray]]:
    """inputs.npz as the original's batch, in its order of modalities."""
    arrays = np.load(folder / "inputs.npz")
    batch = {name: {} for name in meta["modality_order_in_mod_dict"]}
    for key in arrays.files:
        name, field = key.rsplit(".", 1)
        if field == "tensor_u8":
            shape = (1, 3, 1, 1)
            mean, std = (np.reshape(np.float32(x), shape) for x in (fourm.IMAGENET_MEAN, fourm.IMAGENET_STD))
            batch[name]["tensor"] = (arrays[key].astype(np.float32) / np.float32(255) - mean) / std
        elif field == "tensor_i8":
            batch[name]["tensor"] = arrays[key].astype(np.float32) / np.float32(32)
        else:
            batch[name][field] = arrays[key]
    return batch


def masked_batch(folder: Path, meta: dict, model: Model) -> MaskedBatch:
    return jax.tree.map(
        jnp.asarray,
        fourm.masked_batch(
            read_batch(folder, meta),
            model.modalities,
            num_inputs=meta["num_encoder_tokens"],
            num_targets=meta["num_decoder_tokens"],
            target_order=meta["decoder_modality_order"],
        ),
    )


def forward(model: Model, meta: dict, batch: MaskedBatch) -> dict[str, np.ndarray]:
    """All stages of one forward pass. Slots without a token hold zeros where the original has zeros."""
    inputs, targets = batch.inputs, batch.targets
    registers = ((0, 0), (model.config.num_registers, 0))
    ids = np.array([meta["modality_ids"].get(m.name, -1) for m in model.modalities], np.int32)
    graph, params = nnx.split(model)

    @jax.jit
    def stages(params):
        model = nnx.merge(graph, params)
        valid = model.context_valid(inputs.valid)
        encoder_input = jnp.where(valid[..., None], model.encoder_input(inputs, batch.features), 0)
        address = jnp.where(inputs.valid[..., None], model.input_address(inputs), 0)
        encoded = model.run_encoder(encoder_input, inputs.valid)
        context = model.context(encoded, inputs)
        hidden = model.decode(targets, context, inputs.valid)
        modality_of = lambda t: jnp.where(t.valid, ids[np.asarray(t.modality)], -1)  # noqa: E731
        return {
            "encoder_input": encoder_input,
            "encoder_emb": jnp.pad(address, (*registers, (0, 0))),
            "encoder_mask": ~valid[:, None],
            "encoder_mod_mask": jnp.pad(modality_of(inputs), registers, constant_values=-1),
            "encoder_output": encoded,
            "context": jnp.where(valid[..., None], context, model.context_projection(encoded, "float32")),
            "decoder_input": jnp.where(targets.valid[..., None], model.decoder_input(targets), 0),
            "decoder_mask": ~targets.valid[:, None],
            "target_ids": targets.ids,
            "decoder_attention_mask": ~model.decoder_visibility(targets).mask(),
            "decoder_mod_mask": modality_of(targets),
            "decoder_output": hidden,
        }

    out = stages(params)
    hidden = np.asarray(out["decoder_output"])
    for i, m in enumerate(model.modalities):
        mine = np.asarray(targets.valid & (targets.modality == i))
        if not mine.any():
            continue
        logits = np.asarray(model.logits(jnp.asarray(hidden[mine]), m.name))
        stride = meta["logits"][m.name]["stride"]
        out[f"logits.{m.name}.strided"] = logits[:, ::stride]
        out[f"logits.{m.name}.first_full"] = logits[:1]
        out[f"logits.{m.name}.logsumexp"] = logits.max(-1) + np.log(
            np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
        )
        out[f"logits.{m.name}.at_target"] = logits[np.arange(len(logits)), np.asarray(targets.ids)[mine]]
        out[f"logits.{m.name}.argmax"] = logits.argmax(-1).astype(np.int32)

    @jax.jit
    def both_losses(params):
        model = nnx.merge(graph, params)
        kinds = {"loss.mod": "4m_modality", "loss.token": "4m_token"}
        return {k: losses.cross_entropy(model, jnp.asarray(hidden), targets, weighting=w)[0] for k, w in kinds.items()}

    out.update(both_losses(params))
    # A batch may leave out modalities that the model predicts: the original counts those of the batch.
    num_named = sum(model.modalities.named(n).is_target for n in meta["decoder_modality_order"])
    out["loss.mod"] *= sum(m.is_target for m in model.modalities) / num_named
    return {name: np.asarray(x) for name, x in out.items()}


def channels_first(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def converted_tokenizer(folder: Path, meta: dict):
    """The fixture's weights in the original's file format, converted and loaded."""
    spec = json.loads((folder / "state_dict.json").read_text())
    config = {**released.DEFAULTS, **spec["config"]}
    signal = next(name for name, recipe in released.RECIPES.items() if released.fits(recipe, config))
    with tempfile.TemporaryDirectory() as scratch:
        original, ours = Path(scratch) / "original.safetensors", Path(scratch) / "tokenizer.safetensors"
        make_checkpoint.write_checkpoint(spec, original)
        released.convert(original, ours, signal=signal, presets=meta["presets"])
        return load_tokenizer(ours)


def read_input(arrays, tag: str) -> np.ndarray:
    """One input as our arrays: [B H W C], or [B H W] class indices."""
    prefix = f"{tag}." if tag else ""
    if f"{prefix}labels" in arrays:
        return arrays[f"{prefix}labels"].astype(np.int32)
    if f"{prefix}i16_over_1024" in arrays:
        x = arrays[f"{prefix}i16_over_1024"].astype(np.float32) / np.float32(1024)
    else:
        x = arrays[f"{prefix}u8"].astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.moveaxis(x, 1, -1)


def as_original_ids(ids: np.ndarray, num_codebooks: int) -> np.ndarray:
    return channels_first(ids) if num_codebooks > 1 else np.asarray(ids)


def vqvae(folder: Path, meta: dict) -> dict[str, np.ndarray]:
    tokenizer = converted_tokenizer(folder, meta)
    model, arrays, out = tokenizer.model, np.load(folder / "inputs.npz"), {}
    for tag in dict.fromkeys(key.rsplit(".", 1)[0] for key in arrays.files):
        x = jnp.asarray(read_input(arrays, tag))
        features = model.encoder.features(model.embed(x))
        latents = model.encoder.project(features)
        quantized = model.quantizer(latents)
        codes = model.quantizer.look_up(quantized.ids)
        out[f"{tag}.encoder_out"] = channels_first(features)
        out[f"{tag}.latents"] = channels_first(latents)
        out[f"{tag}.tokens"] = as_original_ids(quantized.ids, tokenizer.recipe.quantizer.num_codebooks)
        out[f"{tag}.token_embedding"] = channels_first(codes)
        out[f"{tag}.recon"] = channels_first(model.decoder(codes))
    return out


def divae(folder: Path, meta: dict) -> dict[str, np.ndarray]:
    tokenizer = converted_tokenizer(folder, meta)
    model, arrays = tokenizer.model, np.load(folder / "inputs.npz")
    decoder, schedule = model.decoder, model.decoder.config.schedule
    clean, noised, noise = (jnp.asarray(read_input(arrays, tag)) for tag in ("clean", "noised", "init_noise"))
    latents = model.latent(clean)
    ids = model.quantizer(latents).ids
    codes = model.quantizer.look_up(ids)
    t, masked = jnp.asarray(arrays["timesteps"]), jnp.asarray(arrays["cond_mask"])
    timesteps = schedule.timesteps(meta["ddim_steps"], meta["ddim_mode"])
    graph, state = nnx.split(decoder)
    run_network = jax.jit(lambda state, *args: nnx.merge(graph, state).network(*args))
    network = functools.partial(run_network, state)
    decode = jax.jit(lambda state, codes, x: nnx.merge(graph, state).denoise(codes, x, timesteps, meta["ddim_steps"]))
    noised_clean, velocity = schedule.add_noise(clean, noise, t), schedule.velocity(clean, noise, t)
    first = network(noise, jnp.full(len(noise), timesteps[0]), codes, jnp.zeros_like(masked))
    out = {
        "latents": latents,
        "quant": codes,
        "denoise": network(noised, t, codes, jnp.zeros_like(masked)),
        "denoise_masked": network(noised, t, codes, masked),
        "add_noise": noised_clean,
        "velocity": velocity,
        "noise_from_velocity": schedule.noise(noised_clean, velocity, t),
        "ddim": decode(state, codes, noise),
        "ddim_step1": schedule.ddim_step(first, timesteps[0], noise, stride=schedule.num_steps // meta["ddim_steps"]),
    }
    out = {name: channels_first(x) for name, x in out.items()}
    return {**out, "tokens": np.asarray(ids), "alphas_cumprod": schedule.signal, "ddim_timesteps": timesteps}


def schedules(folder: Path, meta: dict) -> dict[str, np.ndarray]:
    """What meta["keys"] names: tables, decoding steps, and single scheduler steps on stored arrays."""
    arrays = dict(np.load(folder / "inputs.npz"))
    num_steps = meta["num_train_timesteps"]
    sample, output, noise = (arrays[f"step.{name}"] for name in ("sample", "model_output", "variance_noise"))
    out = {}
    for key in meta["keys"]:
        what, *rest = key.split(".")
        kind = ".".join(rest)
        if what == "alphas_cumprod":
            name, _, form = kind.rpartition(".")
            out[key] = Schedule(kind=name, num_steps=num_steps, zero_terminal_snr=form == "zsnr").signal
        elif what == "timesteps":
            out[key] = Schedule(num_steps=num_steps).timesteps(int(rest[1]), rest[0])
        elif what == "step":
            out[key] = arrays[key]
        elif what == "ddpm_timesteps_20":
            out[key] = Schedule(num_steps=num_steps).timesteps(20, "leading")
        elif what == "ddim_step":
            prediction, *name, bound, t = rest
            schedule = Schedule(
                kind=".".join(name), num_steps=num_steps, prediction=prediction, clip=bound in ("clip", "thr")
            )
            out[key] = schedule.ddim_step(output, int(t[1:]), sample, stride=num_steps // 10)
        else:
            schedule = Schedule(kind="linear", num_steps=num_steps, prediction=rest[0])
            out[key] = schedule.ddpm_step(output, int(rest[1][1:]), sample, noise, stride=num_steps // 20)
    return {key: np.asarray(x) for key, x in out.items()}


def quantizer_training(folder: Path, meta: dict) -> dict[str, np.ndarray]:
    """Three steps of a codebook in training, differentiated as meta["what"] says."""
    arrays = dict(np.load(folder / "inputs.npz"))
    module = VectorQuantizer(
        num_codes=meta["codebook_size"],
        latent_size=meta["dim"],
        cosine=meta["use_cosine_sim"],
        normalize_latents=meta["norm_latents"],
        decay=meta["decay"],
        commitment=meta["commitment_weight"],
        dead_below=meta["threshold_ema_dead_code"],
    ).make(rngs=nnx.Rngs(0))
    module.codes[...] = jnp.asarray(arrays["codebook_0"])[None]
    module.counts[...] = jnp.full(module.counts.shape, meta["initial cluster_size"])
    if module.sums is not None:
        module.sums[...] = meta["initial cluster_size"] * module.codes[...]
    out = dict(arrays)
    for step in range(sum(key.startswith("x_") for key in arrays)):
        x, w = (jnp.asarray(np.moveaxis(arrays[f"{name}_{step}"], 1, -1)) for name in "xw")

        def total(x, w=w):
            quantized = module(x)
            return jnp.sum(quantized.codes * w) + 10 * quantized.loss, quantized

        (_, quantized), gradient = jax.value_and_grad(total, has_aux=True)(x)
        out |= {f"quant_{step}": channels_first(quantized.codes), f"xgrad_{step}": channels_first(gradient)}
        out |= {f"loss_{step}": np.reshape(quantized.loss, 1), f"tokens_{step}": np.asarray(quantized.ids)}
        module.update(x, quantized.ids, jax.random.key(step))
        out[f"codebook_{step + 1}"] = np.asarray(module.codes[...][0])
        out[f"cluster_size_{step + 1}"] = np.asarray(module.counts[...][0])
        if module.sums is not None:
            out[f"embed_avg_{step + 1}"] = np.asarray(module.sums[...][0])
    return out


def run(folder: Path) -> dict[str, np.ndarray]:
    if not (folder / "meta.json").exists():
        raise ValueError(f"{folder} is no fixture: it has no meta.json")
    meta = json.loads((folder / "meta.json").read_text())
    if "use_cosine_sim" in meta:
        return quantizer_training(folder, meta)
    if "num_train_timesteps" in meta:
        return schedules(folder, meta)
    if not (folder / "state_dict.json").exists():
        raise ValueError(f"{folder} is no fixture: it has no state_dict.json")
    config = json.loads((folder / "state_dict.json").read_text())["config"]
    if "beta_schedule" in config:
        return divae(folder, meta)
    if "enc_type" in config:
        return vqvae(folder, meta)
    model = converted_model(folder)
    return forward(model, meta, masked_batch(folder, meta, model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fixture", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        np.savez(args.out, **run(args.fixture))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: the arrays of {args.fixture}")
