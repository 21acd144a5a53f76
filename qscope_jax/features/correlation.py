"""Pearson, Spearman and Kendall correlation with bootstrap intervals, over points or over pairs of things."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from qscope_jax.errors import InputError

Kind: TypeAlias = Literal["pearson", "spearman", "kendall"]

FEWEST_POINTS = 3
"""Points that a correlation needs: two are always on a line."""


@dataclass(frozen=True)
class Correlation:
    """A correlation and its percentile bootstrap interval.

    Attributes:
        value: The coefficient; NaN where one of both variables does not vary.
        low: Lower end of the interval; likewise `high`. NaN where nearly all resamples are undefined.
        points: Points that it is over.
        resamples: Resamples in which it is defined, which the interval is from.
    """

    value: float
    low: float
    high: float
    points: int
    resamples: int


def pearson(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """Pearson's r; NaN where x or y does not vary."""
    # Equal numbers can differ from their mean by rounding.
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(x @ x) * math.sqrt(y @ y)
    return min(max(float(x @ y) / scale, -1.0), 1.0) if scale > 0 else math.nan


def spearman(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """Spearman's rho, with mean ranks for ties; NaN where x or y does not vary."""
    return pearson(rankdata(x), rankdata(y))


def kendall(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float:
    """Kendall's tau-b; NaN where x or y does not vary."""
    upper = np.triu_indices(len(x), 1)
    dx, dy = (np.sign(v[:, None] - v[None, :])[upper] for v in (x, y))
    scale = math.sqrt(np.sum(dx * dx) * np.sum(dy * dy))
    return float(dx @ dy) / scale if scale > 0 else math.nan


_KINDS: dict[Kind, Callable[..., float]] = {"pearson": pearson, "spearman": spearman, "kendall": kendall}


def correlate(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[Kind, Correlation]:
    """All three correlations; points are resampled. Points that lack a number are left out.

    Raises:
        InputError: fewer than three points, or a confidence that is not between 0 and 1.
    """
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(x), size=len(x)) for _ in range(resamples))
    return _correlations(x, y, ((x[draw], y[draw]) for draw in draws), confidence)


def correlate_pairs(
    x: Float[np.ndarray, "N N"],
    y: Float[np.ndarray, "N N"],
    *,
    over: Literal["items", "pairs"] = "items",
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[Kind, Correlation]:
    """All three correlations over the pairs of N items.

    Pairs that share an item depend on each other, so by default items are resampled, with all pairs of different items among them.

    Args:
        x: A symmetric matrix over the items; the diagonal does not count.
        y: Another; pairs that lack a number in one of both are left out.
        over: What is resampled.
        resamples: Bootstrap resamples.
        confidence: Of the interval.
        seed: Of the resamples.

    Raises:
        InputError: fewer than three pairs, or a confidence that is not between 0 and 1.
    """
    upper = np.triu_indices(len(x), 1)
    if over == "pairs":
        return correlate(x[upper], y[upper], resamples=resamples, confidence=confidence, seed=seed)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(x), size=len(x)) for _ in range(resamples))
    pairs = ((draw[upper[0]], draw[upper[1]]) for draw in draws)
    return _correlations(*_points(x, y, *upper), (_points(x, y, first, second) for first, second in pairs), confidence)


def _points(x: np.ndarray, y: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = x[first, second], y[first, second]
    there = (first != second) & np.isfinite(a) & np.isfinite(b)
    return a[there], b[there]


def _correlations(x: np.ndarray, y: np.ndarray, samples: Iterator[tuple[np.ndarray, np.ndarray]], confidence: float) -> dict[Kind, Correlation]:
    if len(x) < FEWEST_POINTS:
        raise InputError(f"{len(x)} points to correlate; expected {FEWEST_POINTS} or more, fewer are always on a line")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; expected a number between 0 and 1, such as 0.95")
    drawn: dict[Kind, list[float]] = {kind: [] for kind in _KINDS}
    for a, b in samples:
        if len(a) >= FEWEST_POINTS:
            for kind, statistic in _KINDS.items():
                drawn[kind].append(statistic(a, b))
    return {kind: _interval(statistic(x, y), np.array(drawn[kind]), len(x), confidence) for kind, statistic in _KINDS.items()}


def _interval(value: float, drawn: np.ndarray, points: int, confidence: float) -> Correlation:
    defined = drawn[np.isfinite(drawn)]
    # With a handful of resamples the ends would be single draws.
    if len(defined) < 20:
        return Correlation(value, math.nan, math.nan, points, len(defined))
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Correlation(value, float(low), float(high), points, len(defined))
