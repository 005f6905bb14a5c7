"""Models between two: their parameters interpolated (Wortsman et al. 2022, WiSE-FT, section 3).

    (1 - alpha) x A + alpha x B

Tables are interpolated by modality; modalities that B alone has keep their rows. LoRA is merged into the kernels first.
"""

from __future__ import annotations

import dataclasses

from m4.adaptation.merge import merge_extensions
from m4.model.encoder_decoder import Model
from m4.model.parameters import by_modality, with_parameters

# What may differ: how a model is computed and was trained.
MAY_DIFFER = ("dtype", "mimetic_init", "encoder_drop_path", "decoder_drop_path", "remat", "unroll")


def interpolate(a: Model, b: Model, alpha: float) -> Model:
    """A model like b. ValueError if one has parameters that the other lacks, but for b's further modalities."""
    a, b = (merge_extensions(m) if any(e.can_merge for e in m.config.extensions) else m for m in (a, b))
    theirs, own = by_modality(a), by_modality(b)
    for f in dataclasses.fields(a.config):
        if f.name not in MAY_DIFFER and getattr(a.config, f.name) != getattr(b.config, f.name):
            raise ValueError(f"models with different {f.name} have no model between them")
    new = {n for n in own if n.endswith("]") and n.split("[")[1][:-1] not in a.modalities.names}
    new |= {f"feature_projections.{m}.{part}" for m in b.modalities.names for part in ("kernel", "bias")} - {*theirs}
    wrong = [f"{n} {list(x.shape)}" for n, x in theirs.items() if n not in own or own[n].shape != x.shape]
    wrong += [f"{n} {list(x.shape)}" for n, x in own.items() if n not in theirs and n not in new]
    if wrong:
        raise ValueError(f"the two models do not have the same parameters: {', '.join(wrong[:5])}")
    mixed = {n: (1 - alpha) * theirs[n] + alpha * x if n in theirs else x for n, x in own.items()}
    return with_parameters(b, mixed)
