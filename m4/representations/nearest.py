"""Nearest neighbours of embeddings."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def retrieve(
    queries: Float[np.ndarray, "Q D"], gallery: Float[np.ndarray, "G D"], k: int = 5
) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """The k nearest of a gallery by cosine similarity, nearest first: indices and similarities.

    Queries are global embeddings that a model generated from any modality (4M-21, section 4.2).
    """
    unit = [x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (queries, gallery)]
    similarity = unit[0] @ unit[1].T
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return best, np.take_along_axis(similarity, best, axis=1)
