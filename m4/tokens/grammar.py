"""Which tokens may follow which, so that generated sequences can always be decoded."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class Grammar(NamedTuple):
    """The allowed sequences: an automaton over classes of tokens that begins in state 0 and ends in the last one.

    token_class [V] int32; next_state [states classes] int32, -1: not allowed; distance [states] int32: the
    least number of tokens from a state to the end.
    """

    token_class: Int[Array | np.ndarray, " V"]
    next_state: Int[Array | np.ndarray, "states classes"]
    distance: Int[Array | np.ndarray, " states"]

    @classmethod
    def make(cls, token_class: Int[np.ndarray, " V"], rules: Seq[Mapping[int, int]], end_id: int) -> Grammar:
        """rules[state]: the state after each class; state -1 is the end, whose class is that of `end_id` alone.

        ValueError if the end cannot be reached from some state.
        """
        token_class = np.asarray(token_class, np.int32)
        next_state = np.full((len(rules) + 1, token_class.max() + 1), -1, np.int32)
        for state, after in enumerate(rules):
            for kind, to in after.items():
                next_state[state, kind] = len(rules) if to == -1 else to
        next_state[-1, token_class[end_id]] = len(rules)
        unreachable = len(rules) + 1
        distance = np.full(unreachable, unreachable)
        distance[-1] = 0
        # Bellman-Ford: after round n, `distance` is exact for states at most n tokens from the end.
        for _ in rules:
            after = np.where(next_state >= 0, distance[next_state] + 1, unreachable)
            distance[:-1] = np.minimum(distance, after.min(1))[:-1]
        if (distance >= unreachable).any():
            raise ValueError(f"a grammar never ends from the states {np.flatnonzero(distance >= unreachable).tolist()}")
        return cls(token_class, next_state, distance.astype(np.int32))

    def allowed(self, state: Int[Array, " B"], room: Int[Array, ""]) -> Bool[Array, "B V"]:
        """Tokens after which `room` - 1 more can still reach the end."""
        after = jnp.asarray(self.next_state)[state]
        fits = (after >= 0) & (jnp.asarray(self.distance)[after] < room)
        return jnp.take(fits, self.token_class, axis=1)
