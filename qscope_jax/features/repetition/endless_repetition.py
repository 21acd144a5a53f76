"""Endless repetition: a completion that did not stop and runs in a circle. Told from token ids alone."""

from collections.abc import Sequence

import numpy as np

MAX_PERIOD = 128
"""Longest circle in tokens."""
MIN_TOKENS = 64
"""Tokens that must repeat at least, and four rounds of the circle."""
_ROUNDS = 4


def endless_repetition(token_ids: Sequence[int], *, stopped: bool) -> int | None:
    """The smallest period p from 1 to 128 with which the last max(4 p, 64) tokens repeat, or None.

    The papers give no definition (Qwen-Scope report, section 8); this one is ours. What stopped by itself repeats nothing endlessly.

    Args:
        token_ids: Tokens of a completion, with or without its prompt.
        stopped: Whether a stop token ended it.
    """
    if stopped:
        return None
    ids = np.asarray(token_ids, np.int64)
    for period in range(1, MAX_PERIOD + 1):
        needed = max(_ROUNDS * period, MIN_TOKENS)
        if needed > len(ids):
            return None
        if np.array_equal(ids[-needed + period :], ids[-needed:-period]):
            return period
    return None


def repetition_start(token_ids: Sequence[int], period: int) -> int:
    """Where the circle begins: the first place from which all tokens to the end repeat with the period; its first round is not yet repetition."""
    ids = np.asarray(token_ids, np.int64)
    broken = np.flatnonzero(ids[period:] != ids[:-period])
    return int(broken[-1]) + 1 if len(broken) else 0
