"""Uniform random values addressed by stream, example and purpose."""

from __future__ import annotations

import numpy as np

NUM_TRIES = 8  # shares of kept tokens that are tried at once, each 0.9 of the last
CHOICE, SPLIT, POSITIONS, SPANS = range(4)  # what random numbers are for


class Draws:
    """Random numbers by address: an example's key, and what they are for (a counter-based generator, no state)."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys
        self.bits = np.random.Philox(0)
        self.state = self.bits.state
        self.generator = np.random.Generator(self.bits)

    def at(self, example: int, purpose: int, part: int = 0, attempt: int = 0) -> np.random.Generator:
        self.state["state"]["key"][:] = self.keys[example]
        self.state["state"]["counter"][:] = (0, attempt, part, purpose)
        self.bits.state = self.state
        return self.generator
