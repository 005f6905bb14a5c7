"""A chain of two models: the second goes on from what the first read and generated (4M's super-resolution).

B samples
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from m4.inference.results import Results
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage
from m4.tokens.modality import Sequence


def continued(
    results: Results, sampler: Sampler, stages: Seq[Stage], *, seed: int, indices: Seq[int] | np.ndarray
) -> Results:
    """The second model's targets for each sample of the first one's `results`.

    It reads all of these that are among its inputs: given signals, by its own tokenizers, and generated tokens,
    unchanged. `seed` and `indices` as in `Sampler`. ValueError if it reads none of them.
    """
    given: dict[str, Any] = {}
    for name, signals in results.inputs.items():
        m = results.sampler.modalities.as_input(name.partition("#")[0])
        if m.name in sampler.modalities.names and sampler.modalities.named(m.name).is_input:
            given[m.name + name[len(name.partition("#")[0]) :]] = signals
    count = len(next(iter(results.tokens.values())))
    records = sampler.encode(given, count)
    for name, rows in results.tokens.items():
        if name not in sampler.modalities.names or not (m := sampler.modalities.named(name)).is_input:
            continue
        for record, ids in zip(records, rows, strict=True):
            # An empty text says that anything may follow, as 4M reads it.
            is_empty = isinstance(m, Sequence) and [*ids] == [m.end_id]
            record[name] = np.array([m.first_sentinel]) if is_empty else ids
    if not any(records):
        raise ValueError(f"the second model reads none of {', '.join((*results.inputs, *results.tokens))}")
    return sampler.generate(records, stages, seed, indices)
