"""Sequence lengths rounded up to a short ladder, so that a new length rarely means a new compilation."""

from qscope_jax.errors import InputError

_MULTIPLE = 8  # rows of a vector register on TPU; also what fast attention kernels want


def bucket_length(n: int, *, minimum: int = 16) -> int:
    """Smallest rung of the ladder `minimum * {1, 1.5, 2, 3, 4, 6, 8, 12, ...}` that holds `n` positions.

    Every rung is a multiple of 8 (rounded up where `minimum` is not a multiple of 16), and a rung is at most half as long again as what it
    holds once `n` exceeds `minimum`.

    Args:
        n: Length to hold, in tokens; at least 1.
        minimum: First rung, in tokens; at least 1.

    Raises:
        InputError: `n` or `minimum` is below 1.
    """
    if n < 1:
        raise InputError(f"a sequence of {n} tokens has no bucket; give at least 1 token")
    if minimum < 1:
        raise InputError(f"the smallest bucket is {minimum} tokens; give at least 1")
    power = minimum
    while True:
        for rung in (_round_up(power), _round_up(power + (power + 1) // 2)):
            if rung >= n:
                return rung
        power *= 2


def _round_up(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE
