import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from qscope_jax.errors import InputError
from qscope_jax.features.proportions import clustered_mean, pooled_difference, pooled_share, wilson


def counts(*values: int) -> np.ndarray:
    return np.array(values, int)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.5, 0.9, 0.95]))
def test_wilsons_interval_is_that_of_scipy(pair, level):
    found = wilson(*pair, level=level)
    expected = binomtest(*pair).proportion_ci(level, method="wilson")
    np.testing.assert_allclose(found[1:], (expected.low, expected.high), rtol=1e-9, atol=1e-12)
    assert found.value == pair[0] / pair[1]


def test_no_success_leaves_room_above_and_none_below():
    found = wilson(0, 100)
    z2 = 1.959963985**2
    assert found.low == 0 and found.high == pytest.approx(z2 / (100 + z2))
    assert wilson(100, 100).high == 1


def test_a_share_of_clusters_is_pooled_over_trials():
    found = pooled_share(counts(1, 0, 3), counts(2, 8, 5))
    assert found.value == 4 / 15 and found.low < 4 / 15 < found.high


def test_clusters_whose_trials_are_alike_count_as_one_trial_each():
    """Eight copies of a trial tell what one tells: the interval is about that of 200 trials, not that of 1,600."""
    successes = np.repeat([8, 0], [40, 160])
    found = pooled_share(successes, np.full(200, 8), seed=1)
    alone, naive = wilson(40, 200), wilson(320, 1600)
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.05)
    assert found.high - found.low > 2 * (naive.high - naive.low)


def test_a_resampled_interval_is_that_of_drawing_clusters_one_by_one():
    rng = np.random.default_rng(0)
    trials = rng.integers(1, 9, 60)
    successes = rng.binomial(trials, 0.3)
    drawn = rng.integers(0, 60, (20_000, 60))
    by_hand = np.percentile(successes[drawn].sum(axis=1) / trials[drawn].sum(axis=1), [2.5, 97.5])
    np.testing.assert_allclose(pooled_share(successes, trials)[1:], by_hand, atol=0.005)
    assert pooled_share(successes, trials, seed=3) == pooled_share(successes, trials, seed=3) != pooled_share(successes, trials, seed=4)


def test_single_trials_a_single_cluster_and_no_success_have_wilsons_interval():
    assert pooled_share(counts(1, 0, 1, 0), counts(1, 1, 1, 1)) == wilson(2, 4)
    assert pooled_share(counts(3), counts(8)) == wilson(3, 8)
    assert pooled_share(counts(0, 0, 0), counts(8, 8, 8)) == wilson(0, 3)
    assert pooled_share(counts(8, 8), counts(8, 8)) == wilson(2, 2)


def test_a_difference_is_of_the_same_clusters():
    """What varies between clusters alone cancels: both halves rise by one trial of eight in every cluster."""
    successes, trials = np.arange(40) % 7, np.full(40, 8)
    found = pooled_difference((successes, trials), (successes + 1, trials))
    assert found == pytest.approx((1 / 8, 1 / 8, 1 / 8))
    mixed = pooled_difference((successes, trials), (np.roll(successes, 3) + (np.arange(40) % 2), trials))
    assert mixed.value == pytest.approx(1 / 16) and mixed.low < 1 / 16 < mixed.high


def test_a_difference_of_nothings_has_no_interval():
    assert [math.isnan(bound) for bound in pooled_difference((counts(0, 0), counts(8, 8)), (counts(0, 0), counts(8, 8)))] == [False, True, True]
    assert math.isnan(pooled_difference((counts(1), counts(8)), (counts(2), counts(8))).low)


def test_values_alone_have_the_usual_error_and_copies_tell_nothing_new():
    values = np.random.default_rng(0).standard_normal((50, 2))
    mean, error = clustered_mean(values, np.arange(50))
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose(error, values.std(axis=0, ddof=1) / np.sqrt(50))
    copied = clustered_mean(np.repeat(values, 8, axis=0), np.repeat(np.arange(50), 8))
    np.testing.assert_allclose(copied, (mean, error))


def test_a_mean_of_nothing_and_an_error_of_one_cluster_are_no_numbers():
    assert np.isnan(clustered_mean(np.zeros((0, 2)), np.zeros(0))).all()
    mean, error = clustered_mean(np.array([[1.0], [3.0]]), np.array([4, 4]))
    assert mean == [2.0] and np.isnan(error).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(0, 0), "0 successes in 0 trials"),
        (lambda: wilson(3, 2), "3 successes in 2 trials"),
        (lambda: wilson(1, 2, level=1.0), "level 1.0"),
        (lambda: pooled_share(counts(), counts()), "0 numbers of successes for 0"),
        (lambda: pooled_share(counts(1, 1), counts(2)), "2 numbers of successes for 1"),
        (lambda: pooled_share(counts(1, 0), counts(2, 0)), "none empty"),
        (lambda: pooled_share(counts(1, 0), counts(2, 2), samples=0), "0 samples"),
    ],
)
def test_what_cannot_be_counted_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
