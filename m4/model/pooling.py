"""Encoder outputs as vectors."""

from __future__ import annotations

import jax.numpy as jnp

from m4.model.encoder_decoder import FeatureVectors, Model
from m4.tokens.batch import Tokens


def encoder_outputs(model: Model, inputs: Tokens, features: FeatureVectors):
    """float32 [B N D] of all input slots, zeros where there is no token, and their mean over tokens [B D]."""
    x = model.run_encoder(model.encoder_input(inputs, features), inputs)[:, model.config.num_prefix_tokens :]
    x = jnp.where(inputs.valid[..., None], x, 0).astype(jnp.float32)
    return x, x.sum(1) / jnp.maximum(inputs.valid.sum(1), 1)[:, None]
