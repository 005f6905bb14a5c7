"""Changes of kernels, added to the kernels for good."""

from __future__ import annotations

import dataclasses

from flax import nnx

from m4.model.encoder_decoder import Model
from m4.model.extensions import modules_of
from m4.model.layers import Linear
from m4.model.parameters import abstract, from_parameters, parameters


def merge_extensions(model: Model) -> Model:
    """The same function without the extensions that change kernels alone, such as LoRA for all tokens: what they add
    is in the kernels. ValueError if there is none."""
    kept = tuple(extension for extension in model.config.extensions if not extension.can_merge)
    if kept == model.config.extensions:
        raise ValueError(
            f"only what is the same for all tokens can be merged into kernels; the model has extensions={kept}"
        )
    plain = abstract(dataclasses.replace(model.config, extensions=kept), model.modalities)
    arrays = parameters(nnx.state(model, nnx.Param))
    unstacked = nnx.clone(model)
    unstacked.unstack()
    for stack in [name for name in vars(unstacked) if isinstance(getattr(unstacked, name), nnx.List)]:
        for i, block in enumerate(getattr(unstacked, stack)):
            for path, module in modules_of(block):
                if isinstance(module, Linear):
                    arrays[".".join((stack, str(i), *path, "kernel"))] = module.weight
    state = from_parameters(nnx.state(plain, nnx.Param), lambda name: arrays[name])
    return nnx.merge(nnx.graphdef(plain), state)
