"""UTF-8 as an automaton: which byte may follow which, and where a character ends."""

import functools

import numpy as np

# Well-formed UTF-8 (Unicode Standard, table 3-7): (state, first and last byte allowed, state after). State 0 is between
# characters, 1 to 3 await as many bytes; 4 to 7 also exclude overlong forms, surrogates and all beyond U+10FFFF.
UTF8 = (
    (0, 0x00, 0x7F, 0), (0, 0xC2, 0xDF, 1), (0, 0xE0, 0xE0, 4), (0, 0xE1, 0xEC, 2), (0, 0xED, 0xED, 5),
    (0, 0xEE, 0xEF, 2), (0, 0xF0, 0xF0, 6), (0, 0xF1, 0xF3, 3), (0, 0xF4, 0xF4, 7),
    (1, 0x80, 0xBF, 0), (2, 0x80, 0xBF, 1), (3, 0x80, 0xBF, 2),
    (4, 0xA0, 0xBF, 1), (5, 0x80, 0x9F, 1), (6, 0x90, 0xBF, 2), (7, 0x80, 0x8F, 2),
)  # fmt: skip

NUM_UTF8 = 8  # states
AFTER = np.full((NUM_UTF8 + 1, 256), -1)  # state, byte -> state; -1: cannot follow, and nothing follows on that
for _state, _first, _last, _after in UTF8:
    AFTER[_state, _first : _last + 1] = _after


def utf8_steps(data: bytes) -> tuple[int, ...]:
    """The state after these bytes from each state, -1 where they cannot follow."""
    return tuple(functools.reduce(lambda states, byte: AFTER[states, byte], data, np.arange(NUM_UTF8)).tolist())
