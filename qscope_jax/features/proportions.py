"""Shares and means with intervals: of independent trials by Wilson's, of those that come in clusters by taking a cluster as a whole."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.stats import norm

from qscope_jax.errors import InputError
from qscope_jax.features.classify.classification_scores import Interval

SAMPLES = 10_000
_AT_ONCE = 2**22  # counts held at a time


def wilson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share of independent trials, which neither leaves [0, 1] nor vanishes where no trial succeeds.

        centre = (p + z^2 / 2n) / (1 + z^2 / n)        half = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2)

    Raises:
        InputError: no trials, more successes than trials, or a level that is not between 0 and 1.
    """
    if not 0 <= successes <= trials or not trials or not 0 < level < 1:
        raise InputError(f"{successes} successes in {trials} trials at level {level}; expected at least one trial and a level between 0 and 1")
    z, share = float(norm.isf((1 - level) / 2)), successes / trials
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # The ends are exact where no trial or every one succeeds; rounding would leave a trace.
    return Interval(share, max(centre - half, 0.0) if successes else 0.0, min(centre + half, 1.0) if successes < trials else 1.0)


def pooled_share(
    successes_P: Int[np.ndarray, " P"], trials_P: Int[np.ndarray, " _"], *, level: float = 0.95, samples: int = SAMPLES, seed: int = 0
) -> Interval:
    """The share of successes in all trials, with an interval by resampling clusters: trials of one cluster are alike.

    Where each cluster is one trial, or there is one cluster alone, it is Wilson's interval of the trials. Where no trial succeeds, or every
    one, samples are all the same; it is then Wilson's interval of as many trials as there are clusters, as if a cluster's trials told
    nothing more than the first of them.

    Args:
        successes_P: Successes in each cluster.
        trials_P: Trials in each.
        level: Share of samples inside the interval.
        samples: Bootstrap samples.
        seed: Of the samples.

    Raises:
        InputError: no clusters, one without a trial or with more successes than trials, or a level or number of samples out of range.
    """
    _check(successes_P, trials_P, level, samples)
    successes, trials, clusters = int(successes_P.sum()), int(trials_P.sum()), len(trials_P)
    if clusters in (1, trials):
        return wilson(successes, trials, level=level)
    if successes in (0, trials):
        return wilson(clusters if successes else 0, clusters, level=level)
    return Interval(successes / trials, *_bounds(np.stack([successes_P, trials_P]), lambda sums: sums[0] / sums[1], level, samples, seed))


def pooled_difference(
    before: tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]],
    after: tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]],
    *,
    level: float = 0.95,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """The second share less the first, of the same clusters, with an interval by resampling clusters; both as (successes, trials) of each.

    The bounds are NaN where all trials of both have one outcome, or there is one cluster alone: resampling then says nothing.

    Raises:
        InputError: as `pooled_share`.
    """
    for successes_P, trials_P in (before, after):
        _check(successes_P, trials_P, level, samples)
    counts = np.stack([*before, *after])
    successes, trials = counts[::2].sum(), counts[1::2].sum()
    change = float(counts[2].sum() / counts[3].sum() - counts[0].sum() / counts[1].sum())
    if successes in (0, trials) or counts.shape[1] == 1:
        return Interval(change, math.nan, math.nan)
    return Interval(change, *_bounds(counts, lambda sums: sums[2] / sums[3] - sums[0] / sums[1], level, samples, seed))


def clustered_mean(
    values_NX: Float[np.ndarray, "N X"], clusters_N: Shaped[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " X"], Float[np.ndarray, " X"]]:
    """Mean over N values that come in clusters, and its standard error; where every cluster is one value, it is the usual one.

        error^2 = G / (G - 1) * sum over G clusters of (sum of its deviations from the mean)^2 / N^2

    The mean is NaN where there are no values, the error where there are fewer than two clusters.
    """
    count, values = len(values_NX), values_NX.astype(np.float64)
    names, of_N = np.unique(clusters_N, return_inverse=True)
    nothing = np.full(values.shape[1], np.nan)
    if not count:
        return nothing, nothing
    mean_X = values.mean(axis=0)
    if len(names) < 2:
        return mean_X, nothing
    sums_GX = np.zeros((len(names), values.shape[1]))
    np.add.at(sums_GX, of_N, values - mean_X)
    return mean_X, np.sqrt((sums_GX**2).sum(axis=0) * len(names) / (len(names) - 1)) / count


def _check(successes_P: np.ndarray, trials_P: np.ndarray, level: float, samples: int) -> None:
    if len(successes_P) != len(trials_P) or not len(trials_P) or (successes_P > trials_P).any() or trials_P.min() < 1 or successes_P.min() < 0:
        raise InputError(f"{len(successes_P)} numbers of successes for {len(trials_P)} of trials; expected one cluster or more, none empty")
    if not 0 < level < 1 or samples < 1:
        raise InputError(f"{samples} samples at level {level}; expected 1 or more, and a level between 0 and 1")


def _bounds(counts_CP: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], level: float, samples: int, seed: int) -> tuple[float, float]:
    """Percentiles of a statistic of the counts' sums over resampled clusters.

    Only how often clusters of the same counts are drawn matters, so that is drawn, from the multinomial distribution that it has.
    """
    kinds_CU, often_U = np.unique(counts_CP, axis=1, return_counts=True)
    rng = np.random.default_rng(seed)
    clusters = int(often_U.sum())
    drawn = []
    at_once = max(_AT_ONCE // len(often_U), 1)
    for start in range(0, samples, at_once):
        draws_SU = rng.multinomial(clusters, often_U / clusters, min(at_once, samples - start))
        drawn.append(statistic(kinds_CU @ draws_SU.T))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(np.concatenate(drawn), [tail, 100 - tail])
    return float(low), float(high)
