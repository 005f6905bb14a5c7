"""Pictures of what a model generated, beside the inputs and the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from m4.inference.sampler import Sampler
from m4.pictures import contact_sheet


def stacked(sheets: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 pictures below each other, padded with white to the widest."""
    width = max(x.shape[1] for x in sheets)
    return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in sheets])


def gallery(examples, predictions, tasks: Sequence[Any], sampler: Sampler, *, rows: int = 10):
    """uint8 picture: rows = samples; columns = the inputs and truths, then the prediction of each task."""
    signals = list(dict.fromkeys(name for task in tasks for name in (*task.inputs, task.target)))
    targets = {name for m in sampler.modalities if m.is_target for name in (m.name, m.signal)}
    tokenizers = {s: sampler.tokenizer(s) if s in targets else sampler.input_tokenizer(s) for s in signals}
    columns = [(f"{s} (truth)", s, [e[s] for e in examples]) for s in signals]
    columns += [(task.name.replace("_", " "), task.target, predictions[task.name]) for task in tasks]
    tiles = [
        {title: tokenizers[s].draw(values[r], image=e["rgb"] if "rgb" in e else None) for title, s, values in columns}
        for r, e in enumerate(examples[:rows])
    ]
    return contact_sheet([("", row) for row in tiles])
