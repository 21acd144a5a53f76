"""Pearson, Spearman and Kendall correlation with bootstrap intervals, over points or over pairs of things."""

import math
from collections.abc import Callable
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


_KINDS: dict[Kind, Callable[[np.ndarray, np.ndarray], float]] = {"pearson": pearson, "spearman": spearman, "kendall": kendall}


def correlate(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[Kind, Correlation]:
    """All three correlations; points are resampled. Points that lack a number are left out.

    Raises:
        InputError: fewer than three points, or a confidence that is not between 0 and 1.
    """
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    _check_points(len(x), confidence)
    return _correlations(x, y, _draws(len(x), resamples, seed), confidence)


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
    a, b = x[upper], y[upper]
    there = np.isfinite(a) & np.isfinite(b)
    first, second = upper[0][there], upper[1][there]
    _check_points(len(first), confidence)
    drawn = _draws(len(x), resamples, seed)
    # Items drawn twice and thrice give a pair six times; an item and its own copy are no pair.
    return _correlations(a[there], b[there], drawn[:, first] * drawn[:, second], confidence)


def _check_points(count: int, confidence: float) -> None:
    if count < FEWEST_POINTS:
        raise InputError(f"{count} points to correlate; expected {FEWEST_POINTS} or more, fewer are always on a line")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; expected a number between 0 and 1, such as 0.95")


def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `count` things is in each bootstrap resample, [resamples, count]."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def _correlations(x: np.ndarray, y: np.ndarray, weights_RN: np.ndarray, confidence: float) -> dict[Kind, Correlation]:
    drawn = resampled(x, y, weights_RN)
    return {kind: _interval(statistic(x, y), drawn[kind], len(x), confidence) for kind, statistic in _KINDS.items()}


def resampled(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], weights_RN: Float[np.ndarray, "R N"]) -> dict[Kind, Float[np.ndarray, " R"]]:
    """The correlations of R resamples, each given by how often it has every point; NaN where undefined, or below three points."""
    signs = [np.sign(v[:, None] - v[None, :]) for v in (x, y)]
    together = np.sum(weights_RN @ (signs[0] * signs[1]) * weights_RN, axis=1)
    untied = [np.sum(weights_RN @ np.abs(sign) * weights_RN, axis=1) for sign in signs]
    # Weights are whole numbers, so that these sums are 0 exactly where a resample does not vary.
    defined = (untied[0] > 0) & (untied[1] > 0) & (weights_RN.sum(axis=1) >= FEWEST_POINTS)
    # The rank of a point in a resample: those below it, and half of those equal to it.
    ranks = [weights_RN @ (sign < 0) + (weights_RN @ (sign == 0) + 1) / 2 for sign in signs]
    found: dict[Kind, np.ndarray] = {
        "pearson": _weighted_pearson(x[None, :], y[None, :], weights_RN, defined),
        "spearman": _weighted_pearson(ranks[0], ranks[1], weights_RN, defined),
        "kendall": together / np.sqrt(np.where(defined, untied[0] * untied[1], np.nan)),
    }
    return found


def _weighted_pearson(x_RN: np.ndarray, y_RN: np.ndarray, weights_RN: np.ndarray, defined: np.ndarray) -> np.ndarray:
    total = np.maximum(weights_RN.sum(axis=1, keepdims=True), 1)
    x, y = (v - np.sum(weights_RN * v, axis=1, keepdims=True) / total for v in (x_RN, y_RN))
    scale = np.sqrt(np.sum(weights_RN * x * x, axis=1) * np.sum(weights_RN * y * y, axis=1))
    return np.clip(np.sum(weights_RN * x * y, axis=1) / np.where(defined, scale, np.nan), -1, 1)


def _interval(value: float, drawn: np.ndarray, points: int, confidence: float) -> Correlation:
    defined = drawn[np.isfinite(drawn)]
    # With a handful of resamples the ends would be single draws.
    if len(defined) < 20:
        return Correlation(value, math.nan, math.nan, points, len(defined))
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Correlation(value, float(low), float(high), points, len(defined))
