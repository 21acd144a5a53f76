"""Real and synthetic rows mixed at a ratio: exact counts, a seed, nothing twice unless asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qscope_jax.errors import InputError

ORIGIN = "origin"
"""Column of a mixed row that says where it is from: `real` or `synthetic`."""


@dataclass(frozen=True)
class Mixture:
    """Mixed rows.

    Attributes:
        rows: The rows in their shuffled order, each with its `origin`.
        real: How many are real.
        synthetic: How many are synthetic.
        repeats: How many stand there once more than they were given.
    """

    rows: tuple[dict[str, Any], ...]
    real: int
    synthetic: int
    repeats: int


def mix(
    real: Sequence[Mapping[str, Any]],
    synthetic: Sequence[Mapping[str, Any]],
    *,
    synthetic_share: float,
    size: int | None = None,
    seed: int = 0,
    repeat: bool = False,
) -> Mixture:
    """Mix rows at a ratio.

    Args:
        real: Real rows.
        synthetic: Synthetic rows.
        synthetic_share: Share of synthetic rows in the mixture: 0.5 is as many as real ones, the paper's 4k and 4k.
        size: Rows of the mixture; by default the most that the rows given allow without repeats. The synthetic ones are
            `size * synthetic_share` rounded to the nearest whole number (halves up).
        seed: Of the choice and of the order; the same rows and seed give the same mixture.
        repeat: Use rows again where one kind is short, each about as often as any other.

    Raises:
        InputError: a share outside [0, 1], a size below 1, rows that are too few, or a column `origin` in them.
    """
    if not 0 <= synthetic_share <= 1:
        raise InputError(f"synthetic_share is {synthetic_share}, expected 0 to 1")
    if size is None:
        size = largest_size(len(real), len(synthetic), synthetic_share)
    if size < 1:
        raise InputError(f"a mixture of {size} rows from {len(real)} real and {len(synthetic)} synthetic ones; expected 1 row or more")
    wanted = {"synthetic": _synthetic(size, synthetic_share), "real": size - _synthetic(size, synthetic_share)}
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    repeats = 0
    for name, there in (("real", real), ("synthetic", synthetic)):
        if wanted[name] > len(there) and (not repeat or not there):
            raise InputError(
                f"the mixture needs {wanted[name]} {name} rows, {len(there)} are given; give more, choose another size or share, or repeat them"
            )
        if any(ORIGIN in row for row in there):
            raise InputError(f"a {name} row has a column {ORIGIN!r} already, which the mixture writes; rename it")
        rows += [{**there[index], ORIGIN: name} for index in _draw(len(there), wanted[name], rng)]
        repeats += max(wanted[name] - len(there), 0)
    order = rng.permutation(len(rows))
    return Mixture(tuple(rows[index] for index in order), wanted["real"], wanted["synthetic"], repeats)


def largest_size(real: int, synthetic: int, synthetic_share: float) -> int:
    """The most rows that a mixture of a given share can have without repeating any."""
    size = real + synthetic
    # Rounding makes the two counts steps, of which a closed form is no simpler than walking down the last few.
    if synthetic_share < 1:
        size = min(size, int((real + 1) / (1 - synthetic_share)) + 1)
    if synthetic_share > 0:
        size = min(size, int((synthetic + 1) / synthetic_share) + 1)
    while size > 0 and (_synthetic(size, synthetic_share) > synthetic or size - _synthetic(size, synthetic_share) > real):
        size -= 1
    return size


def _synthetic(size: int, share: float) -> int:
    return int(size * share + 0.5)


def _draw(available: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """So many of the rows, none of them used again before all of them were used."""
    rounds = [rng.permutation(available) for _ in range(-(-count // available))] if count else []
    return np.concatenate([np.zeros(0, np.int64), *rounds])[:count]
