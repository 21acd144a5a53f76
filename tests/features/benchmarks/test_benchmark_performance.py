import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from qscope_jax.data.benchmark_scores import ScoreTable
from qscope_jax.errors import InputError
from qscope_jax.features.benchmarks.benchmark_performance import partial_correlation, performance_redundancy, score_similarity


def table(values, names="abcd") -> ScoreTable:
    values = np.asarray(values, float)
    return ScoreTable("scores", tuple(f"m{i}" for i in range(len(values))), tuple(names[: values.shape[1]]), values)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: arrays(bool, (5, n))))
def test_redundancy_equals_enumeration_over_all_subsets(correct):
    samples = correct.shape[1]
    whole = correct.mean(axis=1)
    taus = []
    for n in range(1, samples + 1):
        own = []
        for subset in combinations(range(samples), n):
            part = correct[:, list(subset)].mean(axis=1)
            constant = np.ptp(part) == 0
            own.append(0.0 if constant and np.ptp(whole) else stats.kendalltau(part, whole).statistic)
        taus.append(np.mean(own))
    found = performance_redundancy(correct)
    assert found.exact and found.value == pytest.approx(np.mean(taus), nan_ok=True, abs=1e-9)
    np.testing.assert_allclose(found.taus, taus, atol=1e-9)


def test_random_subsets_agree_with_enumeration(monkeypatch):
    correct = np.random.default_rng(0).random((6, 12)) < np.linspace(0.2, 0.9, 6)[:, None]
    exact = performance_redundancy(correct)
    monkeypatch.setattr("qscope_jax.features.benchmarks.benchmark_performance.MOST_ENUMERATED", 0)
    drawn = performance_redundancy(correct, subsets=800, points=60)
    assert not drawn.exact and drawn.error < 0.01 and abs(drawn.value - exact.value) < 4 * drawn.error
    assert drawn.sizes.tolist() == list(range(1, 13))


def test_between_measured_sizes_tau_is_interpolated():
    correct = np.random.default_rng(6).random((8, 300)) < np.linspace(0.3, 0.7, 8)[:, None]
    few, all_sizes = (performance_redundancy(correct, subsets=60, points=points) for points in (12, 4000))
    assert len(few.sizes) == 12 and len(all_sizes.sizes) > 280
    assert few.value == pytest.approx(all_sizes.value, abs=0.005)


def test_a_benchmark_of_copies_is_more_redundant_than_one_of_different_samples():
    rng = np.random.default_rng(1)
    kinds = rng.random((8, 4)) < np.linspace(0.1, 0.9, 8)[:, None]
    copies, different = np.repeat(kinds, 50, axis=1), rng.random((8, 200)) < np.linspace(0.4, 0.6, 8)[:, None]
    assert performance_redundancy(copies, subsets=50).value > performance_redundancy(different, subsets=50).value + 0.1
    assert performance_redundancy(copies, subsets=20).taus[-1] == pytest.approx(1)


def test_models_that_all_score_the_same_have_no_ranking():
    assert math.isnan(performance_redundancy(np.ones((5, 20), bool), subsets=5).value)


def test_a_partial_correlation_by_hand():
    assert partial_correlation(0.8, 0.6, 0.5) == pytest.approx(0.721688, abs=1e-6)
    assert math.isnan(partial_correlation(0.5, 1.0, 0.5))


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 12).flatmap(lambda n: arrays(float, (n, 3), elements=st.floats(-10, 10, width=16))))
def test_partial_correlation_equals_that_of_regression_residuals(values):
    if (np.ptp(values, axis=0) < 0.1).any():
        return
    design = np.stack([np.ones(len(values)), values[:, 2]], axis=1)
    left = [values[:, i] - design @ np.linalg.lstsq(design, values[:, i], rcond=None)[0] for i in (0, 1)]
    found = score_similarity(table(values), "ab", control="c").values[0, 1]
    if min(np.linalg.norm(one) / np.ptp(values[:, i]) for i, one in enumerate(left)) > 0.01:
        assert found == pytest.approx(stats.pearsonr(*left).statistic, abs=1e-6)


def test_similarity_is_pearsons_over_models():
    values = np.random.default_rng(2).random((9, 4))
    found = score_similarity(table(values), "dab")
    np.testing.assert_allclose(found.values, np.corrcoef(values[:, [3, 0, 1]].T))
    assert found.benchmarks == ("d", "a", "b") and (found.models == 9).all()


def test_missing_scores_leave_out_models_pair_by_pair():
    values = np.random.default_rng(3).random((9, 3))
    values[0, 0] = values[1, 1] = values[2, 2] = math.nan
    found = score_similarity(table(values), "ab")
    assert found.models.tolist() == [[8, 7], [7, 8]]
    assert found.values[0, 1] == pytest.approx(np.corrcoef(values[2:, 0], values[2:, 1])[0, 1])
    partial = score_similarity(table(values), "ab", control="c")
    assert partial.models[0, 1] == 6 and partial.control == "c"
    r = np.corrcoef(values[3:].T)
    assert partial.values[0, 1] == pytest.approx(partial_correlation(r[0, 1], r[0, 2], r[1, 2]))


def test_the_control_has_no_correlation_given_itself():
    # Of many panels some have columns whose correlation with themselves rounds to less than 1.
    for seed in range(40):
        values = np.random.default_rng(seed).random((8, 3))
        found = score_similarity(table(np.c_[values, 100 * values[:, 2] + 7]), "abcd", control="c")
        assert np.isnan(found.values[2:]).all() and np.isfinite(found.values[:2, :2]).all()


def test_bad_requests_are_refused():
    values = np.random.default_rng(5).random((6, 2))
    values[:2, 0] = math.nan
    with pytest.raises(InputError, match="scores: 4 of 6 models have a score on a; expected 5 or more"):
        score_similarity(table(values), "ab")
    with pytest.raises(InputError, match="has no scores of benchmark 'z'; it has 'a', 'b'"):
        score_similarity(table(values), "az")
    with pytest.raises(InputError, match="4 models answered; a ranking of models needs 5 or more"):
        performance_redundancy(np.ones((4, 3), bool))
    with pytest.raises(InputError, match="subsets is 1"):
        performance_redundancy(np.ones((5, 30), bool), subsets=1)
