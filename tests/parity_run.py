"""Computes the arrays of a parity fixture with m4: python tests/parity_run.py FIXTURE_DIR --out FILE.npz

The fixture gives inputs and weights (see tests/parity/README.md); what comes out has the names and the layout of its
outputs.npz, and the original's two losses as loss.mod and loss.token. Nothing else of the fixture is read.
"""

import argparse
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
from m4.convert import convert  # noqa: E402
from m4.model import Model  # noqa: E402
from m4.model_file import load_model  # noqa: E402
from m4.tokens import MaskedBatch  # noqa: E402


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
            "decoder_attention_mask": ~model.decoder_visibility(targets),
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


def run(folder: Path) -> dict[str, np.ndarray]:
    if not (folder / "state_dict.json").exists() or not (folder / "meta.json").exists():
        raise ValueError(f"{folder} is no fixture of the encoder-decoder: it has no state_dict.json or no meta.json")
    meta = json.loads((folder / "meta.json").read_text())
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
