import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from qscope_jax.errors import InputError
from qscope_jax.features.benchmarks.correlation import correlate, correlate_pairs, kendall, pearson, resampled, spearman

numbers = st.integers(-5, 5).map(float)
pairs_of_vectors = st.integers(3, 12).flatmap(lambda n: st.tuples(arrays(float, n, elements=numbers), arrays(float, n, elements=numbers)))


@settings(max_examples=100, deadline=None)
@given(pairs_of_vectors)
def test_coefficients_equal_scipys(vectors):
    x, y = vectors
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert all(math.isnan(kind(x, y)) for kind in (pearson, spearman, kendall))
    else:
        assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(pairs_of_vectors, st.data())
def test_resamples_by_weight_equal_resamples_of_points(vectors, data):
    x, y = vectors
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(x), max_size=len(x))))
    a, b = np.repeat(x, weights), np.repeat(y, weights)
    found = resampled(x, y, weights[None, :].astype(float))
    for name, kind in (("pearson", pearson), ("spearman", spearman), ("kendall", kendall)):
        assert found[name][0] == pytest.approx(kind(a, b) if len(a) >= 3 else math.nan, abs=1e-9, nan_ok=True)


def test_an_interval_holds_the_value_and_narrows_with_points():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(400)
    y = x + rng.standard_normal(400)
    few, many = (correlate(x[:n], y[:n], resamples=400) for n in (30, 400))
    for kind in ("pearson", "spearman", "kendall"):
        assert many[kind].low < many[kind].value < many[kind].high
        assert many[kind].high - many[kind].low < (few[kind].high - few[kind].low) / 2
    assert many["pearson"].low < math.sqrt(0.5) < many["pearson"].high


def test_the_interval_is_that_of_scipys_bootstrap():
    rng = np.random.default_rng(1)
    x = rng.standard_normal(40)
    y = x + rng.standard_normal(40)
    mine = correlate(x, y, resamples=2000)["pearson"]
    other = stats.bootstrap((x, y), pearson, paired=True, vectorized=False, method="percentile", n_resamples=2000, rng=2).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((other.low, other.high), abs=0.03)


def test_points_without_a_number_are_left_out():
    x, y = np.array([1.0, 2, 3, math.nan, 5]), np.array([1.0, 2, 3, 4, math.inf])
    assert correlate(x, y, resamples=50)["pearson"].value == pytest.approx(1) and correlate(x, y, resamples=50)["pearson"].points == 3


def test_pairs_are_those_above_the_diagonal_and_undefined_ones_do_not_count():
    rng = np.random.default_rng(3)
    x, y = (m + m.T for m in rng.random((2, 6, 6)))
    y[0, 1] = y[1, 0] = math.nan
    upper = [pair for pair in zip(*np.triu_indices(6, 1), strict=True) if pair != (0, 1)]
    for over in ("items", "pairs"):
        found = correlate_pairs(x, y, over=over, resamples=200)["pearson"]
        assert found.points == 14 and found.value == pytest.approx(stats.pearsonr([x[p] for p in upper], [y[p] for p in upper]).statistic)


def test_resampling_items_allows_for_pairs_that_share_one():
    rng = np.random.default_rng(4)
    x, y = (level[:, None] + level[None, :] + 0.1 * rng.random((12, 12)) for level in rng.standard_normal((2, 12)))
    x, y = x + x.T, y + y.T
    wide, narrow = (correlate_pairs(x, y, over=over, resamples=400)["pearson"] for over in ("items", "pairs"))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_bad_requests_are_refused():
    with pytest.raises(InputError, match="2 points to correlate; expected 3 or more"):
        correlate(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    with pytest.raises(InputError, match="0 points to correlate"):
        correlate(np.full(4, math.nan), np.arange(4.0))
    with pytest.raises(InputError, match="confidence is 1.0"):
        correlate(np.arange(4.0), np.arange(4.0), confidence=1.0)
    with pytest.raises(InputError, match="1 points to correlate"):
        correlate_pairs(np.eye(2), np.eye(2))


def test_what_does_not_vary_has_no_correlation_and_no_interval():
    found = correlate(np.ones(5), np.arange(5.0), resamples=50)["kendall"]
    assert math.isnan(found.value) and math.isnan(found.low) and found.resamples == 0


def test_a_resample_of_items_has_all_pairs_of_different_items(monkeypatch):
    rng = np.random.default_rng(5)
    x, y = (m + m.T for m in rng.random((2, 4, 4)))
    drawn = [0, 0, 1, 1, 1, 2]
    weights = np.bincount(drawn, minlength=4).astype(float)
    monkeypatch.setattr("qscope_jax.features.benchmarks.correlation._draws", lambda count, resamples, seed: np.tile(weights, (resamples, 1)))
    pairs = [(a, b) for place, a in enumerate(drawn) for b in drawn[place + 1 :] if a != b]
    expected = stats.spearmanr([x[pair] for pair in pairs], [y[pair] for pair in pairs]).statistic
    found = correlate_pairs(x, y, resamples=20)["spearman"]
    assert (found.low, found.high) == pytest.approx((expected, expected))
