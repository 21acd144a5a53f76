"""Benchmarks by how models perform on them: how few samples rank models as all do, and which benchmarks rank them alike.

After the Qwen-Scope report (arXiv 2605.11887, section 4), Eq. 4-6 and 12.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from qscope_jax.data.benchmark_scores import ScoreTable
from qscope_jax.errors import InputError
from qscope_jax.features.benchmarks.correlation import pearson

FEWEST_MODELS = 5
"""Models that a comparison of scores needs by default; a partial correlation over three is always 1 or -1."""

MOST_ENUMERATED = 12
"""Samples up to which all subsets are gone through."""

_LEAST_REST = 1e-12  # share of a variance that a control must leave


@dataclass(frozen=True, eq=False)
class PerformanceRedundancy:
    """R(D) of a benchmark of N samples.

    Attributes:
        value: R(D), the mean of tau_n over n = 1, ..., N; NaN where all models score the same on the whole benchmark.
        error: Its standard error; 0 where all subsets were gone through.
        sizes: Subset sizes at which tau_n was measured; between them it is interpolated.
        taus: tau_n, the mean Kendall tau-b of accuracies on a subset and on all samples.
        models: M.
        exact: Whether all subsets were gone through.
    """

    value: float
    error: float
    sizes: Int[np.ndarray, " P"]
    taus: Float[np.ndarray, " P"]
    models: int
    exact: bool


@dataclass(frozen=True, eq=False)
class Similarity:
    """How alike models score on B benchmarks.

    Attributes:
        benchmarks: Their names.
        values: Pearson correlations [B, B] of scores over models; NaN where undefined, and for the control itself.
        models: Models [B, B] that each is over.
        control: The benchmark whose scores were taken out, if any.
    """

    benchmarks: tuple[str, ...]
    values: Float[np.ndarray, "B B"]
    models: Int[np.ndarray, "B B"]
    control: str | None = None


def performance_redundancy(
    correct: Bool[np.ndarray, "M N"], *, subsets: int = 200, points: int = 40, least_models: int = FEWEST_MODELS, seed: int = 0
) -> PerformanceRedundancy:
    """How well subsets of a benchmark rank models as the whole does (Eq. 4-6); higher is more redundant.

    A subset on which all models score the same says nothing of their order, and counts as tau = 0.

    Args:
        correct: Which samples each model got right.
        subsets: Random subsets of each size. The first n samples of a random order are one, so that the same orders serve all sizes.
        points: Sizes at which tau is measured, evenly spread in logarithm.
        least_models: Models needed.
        seed: Of the orders.

    Raises:
        InputError: too few models or subsets.
    """
    models, samples = correct.shape
    if models < least_models:
        raise InputError(f"{models} models answered; a ranking of models needs {least_models} or more")
    if subsets < 2 or points < 2:
        raise InputError(f"subsets is {subsets} and points {points}; expected 2 or more of both")
    if samples <= MOST_ENUMERATED:
        return _enumerated(correct)
    sizes = np.unique(np.round(np.geomspace(1, samples, points)).astype(np.int64))
    rng = np.random.default_rng(seed)
    total = correct.sum(axis=1)
    taus = np.empty((subsets, len(sizes)))
    for index in range(subsets):
        counts = np.cumsum(correct[:, rng.permutation(samples)], axis=1, dtype=np.int32)
        taus[index] = _taus(counts[:, sizes - 1].T, total)
    each = np.array([_mean_over_sizes(sizes, row, samples) for row in taus])
    return PerformanceRedundancy(float(each.mean()), float(each.std(ddof=1) / math.sqrt(subsets)), sizes, taus.mean(axis=0), models, False)


def partial_correlation(r_ij: float, r_im: float, r_jm: float) -> float:
    """Correlation of i and j given m (Eq. 12), which is that of the residuals of both after regression on m; NaN where m determines one."""
    rest_i, rest_j = 1 - r_im**2, 1 - r_jm**2
    # Of a variable that m determines, rounding leaves some 1e-16 of its variance, which says nothing.
    if min(rest_i, rest_j) < _LEAST_REST:
        return math.nan
    return (r_ij - r_im * r_jm) / (math.sqrt(rest_i) * math.sqrt(rest_j))


def score_similarity(scores: ScoreTable, benchmarks: Sequence[str], *, control: str | None = None, least_models: int = FEWEST_MODELS) -> Similarity:
    """Correlation of scores over models for every pair of benchmarks, each pair over the models that have all scores it needs.

    Args:
        scores: What models scored.
        benchmarks: Benchmarks to compare.
        control: A benchmark whose scores are taken out (Eq. 12), such as a measure of general ability.
        least_models: Models that every pair needs.

    Raises:
        InputError: scores of a benchmark are missing, or too few models have both.
    """
    values = scores.columns(benchmarks)
    taken_out = None if control is None else scores.columns([control])[:, 0]
    count = len(benchmarks)
    found, models = np.full((count, count), math.nan), np.zeros((count, count), np.int64)
    for i in range(count):
        for j in range(i, count):
            columns = [values[:, i], values[:, j], *([] if taken_out is None else [taken_out])]
            there = np.isfinite(np.stack(columns)).all(axis=0)
            models[i, j] = models[j, i] = there.sum()
            if models[i, j] < least_models:
                names = " and ".join(dict.fromkeys([benchmarks[i], benchmarks[j], *([control] if control else [])]))
                raise InputError(
                    f"{scores.name}: {models[i, j]} of {len(scores.models)} models have a score on {names}; expected {least_models} or more, "
                    "add scores or leave the benchmark out"
                )
            found[i, j] = found[j, i] = _correlation([column[there] for column in columns])
    return Similarity(tuple(benchmarks), found, models, control)


def _correlation(columns: list[np.ndarray]) -> float:
    x, y = columns[:2]
    if len(columns) == 2:
        return pearson(x, y)
    m = columns[2]
    return partial_correlation(pearson(x, y), pearson(x, m), pearson(y, m))


def _enumerated(correct: np.ndarray) -> PerformanceRedundancy:
    samples = correct.shape[1]
    chosen = (np.arange(1, 2**samples)[:, None] >> np.arange(samples)) & 1
    taus = _taus(chosen @ correct.T.astype(np.int64), correct.sum(axis=1))
    sizes = chosen.sum(axis=1)
    each = np.array([taus[sizes == size].mean() for size in range(1, samples + 1)])
    return PerformanceRedundancy(float(each.mean()), 0.0, np.arange(1, samples + 1), each, len(correct), True)


def _mean_over_sizes(sizes: np.ndarray, taus: np.ndarray, samples: int) -> float:
    return float(np.interp(np.arange(1, samples + 1), sizes, taus).mean())


def _taus(counts_SM: np.ndarray, total_M: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row with the total; 0 where the row is constant, NaN where the total is."""
    first, second = np.triu_indices(len(total_M), 1)
    rows = np.sign(counts_SM[:, first] - counts_SM[:, second])
    whole = np.sign(total_M[first] - total_M[second])
    scale = np.sqrt(np.abs(rows).sum(axis=1) * float(np.abs(whole).sum()))
    if not whole.any():
        return np.full(len(rows), math.nan)
    return (rows @ whole) / np.where(scale > 0, scale, 1)
