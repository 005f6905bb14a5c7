"""Computes the arrays of a parity fixture with m4: python tests/parity_run.py FIXTURE_DIR --out FILE.npz

The fixture gives inputs and weights (see tests/parity/README.md); what comes out has the names and the layout of its
outputs.npz, and for fm_* the original's two losses as loss.mod and loss.token. Nothing else of the fixture is read.
Fixtures: the encoder-decoder (fm_*), generation, VQVAEs and DiVAEs, diffusion schedules, quantizers in training.
"""

import argparse
import functools
import itertools
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tokenizers"), str(ROOT / "tests" / "parity")]

import make_checkpoint  # noqa: E402

from m4.checkpoints.model_file import load_model  # noqa: E402
from m4.inference.autoregressive import Autoregressive  # noqa: E402
from m4.inference.guidance import Guidance  # noqa: E402
from m4.inference.parallel import ROAR, MaskGIT  # noqa: E402
from m4.inference.prompts import make_prompt  # noqa: E402
from m4.inference.sampler import run_stage  # noqa: E402
from m4.inference.scheme import Replay  # noqa: E402
from m4.interchange import fourm  # noqa: E402
from m4.interchange.fourm_convert import convert  # noqa: E402
from m4.model.encoder_decoder import Model  # noqa: E402
from m4.objectives import cross_entropy as losses  # noqa: E402
from m4.tokens.batch import MaskedBatch  # noqa: E402
from m4.tokens.modality import Features, Grid, Sequence  # noqa: E402
from m4.tokens.tokenizer import load_tokenizer  # noqa: E402
from m4_tokenizers.interchange import architectures  # noqa: E402
from m4_tokenizers.interchange import fourm_tokenizers as released  # noqa: E402
from m4_tokenizers.networks.diffusion import Schedule  # noqa: E402
from m4_tokenizers.quantizers.vector import VectorQuantizer  # noqa: E402


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
    registers = ((0, 0), (model.config.num_prefix_tokens, 0))
    ids = np.array([meta["modality_ids"].get(m.name, -1) for m in model.modalities], np.int32)
    graph, params = nnx.split(model)

    @jax.jit
    def stages(params):
        model = nnx.merge(graph, params)
        valid = model.context_info(inputs).valid
        encoder_input = jnp.where(valid[..., None], model.encoder_input(inputs, batch.features), 0)
        address = jnp.where(inputs.valid[..., None], model.input_address(inputs), 0)
        encoded = model.run_encoder(encoder_input, inputs)
        context = model.context(encoded, model.input_address(inputs))
        hidden = model.decode(targets, model.encode(inputs, batch.features)._replace(tokens=context))
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
    config = {**architectures.DEFAULTS, **spec["config"]}
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
        "ddim_step1": schedule.ddim_step(
            *map(jnp.asarray, (first, timesteps[0], noise)), stride=schedule.num_steps // meta["ddim_steps"]
        ),
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
            out[key] = schedule.ddim_step(*map(jnp.asarray, (output, int(t[1:]), sample)), stride=num_steps // 10)
        else:
            schedule = Schedule(kind="linear", num_steps=num_steps, prediction=rest[0])
            out[key] = schedule.ddpm_step(
                *map(jnp.asarray, (output, int(rest[1][1:]), sample, noise)), stride=num_steps // 20
            )
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


def generation(folder: Path) -> dict[str, np.ndarray]:
    """A chain of generated modalities, with the recorded orders and noise, through the stages that users run.

    A target sequence stands in the context as its first sentinel from the start, and so does one that guidance drops.
    """
    case, model = json.loads((folder / "case.json").read_text()), converted_model(folder.parent.parent / "fm_mod7")
    graph, params = nnx.split(model)
    arrays, modalities = np.load(folder / "inputs.npz"), model.modalities
    records, batch = [{} for _ in range(case["batch"])], range(case["batch"])
    for name in case["conditions"]:
        m = modalities.named(name)
        for b in batch:
            if isinstance(m, Features):
                pixels = arrays[f"{name}.tensor_u8"][b]
                records[b][name] = rearrange(pixels, "c (h p) (w q) -> (h w) (p q c)", h=m.shape[0], w=m.shape[1])
            else:
                records[b][name] = arrays[f"{name}.tensor"][b][~arrays[f"{name}.input_mask"][b]]
    sequences = [n for n in case["targets"] if isinstance(modalities.named(n), Sequence)]
    for record, name in itertools.product(records, sequences):
        record[name] = np.array([modalities.named(name).first_sentinel])
    noise = [
        make_checkpoint.gumbel(case["noise_seed"], case["noise_name"].replace("CALL", str(i)), shape)
        if "Gumbel" in case["sampling"] else np.zeros(shape)
        for i, shape in enumerate(case["multinomial_shapes"])
    ]  # fmt: skip
    recorded = {
        f: np.load(folder / f"{f}.npz") for f in ("step_of_position", "roar_order") if (folder / f"{f}.npz").exists()
    }
    out, args, seeds = {}, case["builder_args"], np.arange(len(batch))[:, None]
    for i, name in enumerate(case["targets"]):
        m, kind = modalities.named(name), args["autoregression_schemes"][i]
        steps = [s for s in case["schedule"] if s["target_domain"] == name]
        guidance = None
        if args["cfg_scales"][i] != 1:
            drop = tuple(steps[0]["cfg_cond_domains"])
            guidance = Guidance(scale=args["cfg_scales"][i], drop=drop, dropped_sequences="masked")
        common = {"temperature": args["temps"][i], "top_k": case["top_k"], "top_p": case["top_p"] or 1.0}
        partial, replay = [None] * len(batch), Replay()
        if kind == "autoregressive":
            length = arrays[f"{name}.tensor"].shape[1] - 2
            scheme = Autoregressive(**common, max_length=length, constrained=False, ends_at_sentinel=True)
            partial = [np.array([-1])] * len(batch)
            records = [{k: v for k, v in r.items() if k != name} for r in records]
            if noise:
                padded = np.zeros((length + 1, *noise[0].shape), np.float32)
                padded[: len(noise)] = noise
                replay = Replay(noise=jnp.asarray(padded))
        else:
            schedule, _, numbers = args["temp_schedules"][i].partition(":")
            final, power = map(float, numbers.split(":")) if numbers else (0.0, 0.5)
            fields = {
                "steps": args["decoding_steps"][i],
                "temperature_schedule": {"onex": "power"}.get(schedule, schedule),
                "final_temperature": final,
                "temperature_power": power,
            }
            if kind == "maskgit":
                scheme = MaskGIT(**common, **fields, schedule=args["token_decoding_schedules"][i])
            else:
                scheme = ROAR(**common, **fields)
            replay = grid_replay(recorded, name, kind, noise, case, m)
        prompt = make_prompt(records, partial, m, modalities, guidance)
        ids, _, step = map(np.asarray, run_stage(graph, params, scheme, m, prompt, seeds, guidance, replay))
        if isinstance(m, Sequence):
            closing = m.first_sentinel + 1
            ends = [int(np.flatnonzero(row == closing)[0]) if closing in row else len(row) for row in ids]
            number = sum(key.startswith("ar_pred_ids") for key in out)
            out[f"ar_pred_ids.{number}"] = np.pad(
                ids[:, : max(ends) + 1], ((0, 0), (1, 0)), constant_values=m.first_sentinel
            )
            valid = np.arange(max(ends)) < np.array(ends)[:, None]
            ids = np.where(valid, ids[:, : max(ends)], 0)
            out |= {f"{name}.input_mask": ~valid, f"{name}.target_mask": ~valid}
            rows = [row[:n] for row, n in zip(ids, ends, strict=True)]
        else:
            out |= {f"{name}.input_mask": np.zeros(ids.shape, bool), f"{name}.target_mask": np.ones(ids.shape, bool)}
            out[f"{name}.step_of_position"] = (step + case["schedule"].index(steps[0])).astype(np.int16)
            rows = list(ids)
        out[f"{name}.tensor"] = ids
        for record, row in zip(records, rows, strict=True):
            record[name] = row
    return out


def grid_replay(recorded, name: str, kind: str, noise: list[np.ndarray], case: dict, m: Grid) -> Replay:
    """The recorded order (where sureness does not decide: at temperature 0, and in random orders), and noise by step
    and position. Rows of noise are (example, slot), slots in the order of the step's positions."""
    steps = recorded["step_of_position"][f"{name}.step_of_position"]
    if not noise:
        return Replay(order=jnp.asarray(np.argsort(steps, axis=1, kind="stable")))
    counts = [s["num_tokens"] for s in case["schedule"] if s["target_domain"] == name]
    if kind == "roar":
        order = np.concatenate([row[:n] for row, n in zip(recorded["roar_order"]["order"], counts, strict=True)])
        order = np.broadcast_to(order.astype(np.int32), steps.shape)
    by_position = np.zeros((len(counts), len(steps), m.max_tokens, m.vocab_size), np.float32)
    for s, rows in enumerate(noise):
        rows = rows.reshape(len(steps), -1, m.vocab_size)
        for b, part in enumerate(rows):
            slots = order[b, sum(counts[:s]) :][: len(part)] if kind == "roar" else np.flatnonzero(steps[b] >= s)
            by_position[s, b, slots] = part
    return Replay(order=jnp.asarray(order) if kind == "roar" else None, noise=jnp.asarray(by_position))


def run(folder: Path) -> dict[str, np.ndarray]:
    if (folder / "case.json").exists():
        return generation(folder)
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
