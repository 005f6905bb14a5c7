"""Examples of random content for benchmarks."""

import numpy as np

from m4.tokens.modality import Features, Grid, Modalities


def random_example(modalities: Modalities, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tokens of random content and realistic number: captions of 16 words, 4 boxes."""
    lengths = {"caption": 16, "det": 20}
    example = {}
    for m in modalities:
        if isinstance(m, Features):
            example[m.name] = rng.integers(0, 256, (m.max_tokens, m.size)).astype(np.uint8)
        elif isinstance(m, Grid):
            example[m.name] = rng.integers(0, m.vocab_size, m.max_tokens).astype(np.uint16)
        else:
            words = rng.integers(m.first_sentinel + m.num_sentinels, m.vocab_size, lengths[m.name])
            example[m.name] = np.append(words, m.end_id).astype(np.uint16)
    return example
