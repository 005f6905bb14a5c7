"""Low-rank updates added to the weights they update."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from m4.model.encoder_decoder import Model
from m4.model.parameters import abstract


def merge_lora(model: Model) -> Model:
    """The same function without LoRA: what its pairs add is in the kernels. ValueError if there is none, or routed."""
    lora = model.config.lora
    if lora is None or lora.routed:
        raise ValueError(f"only LoRA that is the same for all modalities can be merged; the model has lora={lora}")
    plain = abstract(dataclasses.replace(model.config, lora=None), model.modalities)
    known = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(plain, nnx.Param)):
        x, pair = known[path][...], (*path[:-1], "lora")
        if path[-1] == "kernel" and (*pair, "a") in known:
            a, b = (known[*pair, name][...] for name in "ab")
            x = x + jnp.matmul(a[:, 0], b[:, 0]) * (lora.alpha / lora.rank)
        flat.append((path, variable.replace(x)))
    return nnx.merge(nnx.graphdef(plain), nnx.from_flat_state(flat))
