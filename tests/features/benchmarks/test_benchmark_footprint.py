# pyright: reportIndexIssue=false
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_array
from scipy.special import gammaln

from qscope_jax.errors import InputError
from qscope_jax.features.benchmarks.benchmark_footprint import (
    equal_overlap_min_matrix,
    footprint,
    overlap_matrix,
    overlap_min_matrix,
    sampled_redundancy,
)


def table(*sets: set[int], features: int = 16) -> csr_array:
    """Codes whose samples fire these features."""
    dense = np.zeros((len(sets), features), np.float32)
    for row, fired in enumerate(sets):
        dense[row, list(fired)] = 0.5
    return csr_array(dense)


def enumerated(fires: np.ndarray) -> np.ndarray:
    """Mean footprint of every subset size, by going through all subsets."""
    samples = len(fires)
    return np.array([np.mean([fires[list(s)].any(0).sum() for s in combinations(range(samples), n)]) for n in range(1, samples + 1)])


small_benchmarks = st.integers(1, 8).flatmap(lambda n: arrays(bool, (n, 6))).filter(lambda fires: fires.any())


def test_two_samples_that_share_one_feature():
    found = footprint("pair", table({0, 1}, {0, 2}))
    np.testing.assert_allclose(found.coverage, [2 / 3, 1])
    assert found.area == pytest.approx(5 / 6) and found.redundancy == pytest.approx(5 / 9)
    assert (found.size, found.samples, found.silent) == (3, 2, 0)


@settings(max_examples=60, deadline=None)
@given(small_benchmarks)
def test_closed_forms_equal_enumeration_over_all_subsets(fires):
    found = footprint("any", csr_array(fires.astype(np.float32)))
    expected = enumerated(fires)
    np.testing.assert_allclose(found.expected, expected, rtol=1e-12)
    np.testing.assert_allclose(found.coverage, expected / fires.any(0).sum(), rtol=1e-12)
    assert found.redundancy == pytest.approx(expected.sum() / fires.any(0).sum() ** 2, rel=1e-12)
    assert found.area == pytest.approx(found.coverage.mean(), rel=1e-12)
    assert found.silent == (~fires.any(1)).sum()


@settings(max_examples=40, deadline=None)
@given(small_benchmarks, st.data())
def test_a_benchmark_cut_down_has_the_mean_footprints_of_its_subsets(fires, data):
    found = footprint("any", csr_array(fires.astype(np.float32)))
    n = data.draw(st.integers(1, len(fires)))
    expected = enumerated(fires)
    if expected[n - 1]:
        assert found.redundancy_at(n) == pytest.approx(expected[:n].sum() / expected[n - 1] ** 2, rel=1e-12)
    present = np.mean([fires[list(s)].any(0) for s in combinations(range(len(fires)), n)], axis=0)
    np.testing.assert_allclose(found.presence(n), present, atol=1e-12)
    assert found.redundancy_at(len(fires)) == pytest.approx(found.redundancy, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=2, max_size=5))
def test_overlaps_equal_those_of_sets(sets):
    found = [footprint(str(i), table(one, features=10)) for i, one in enumerate(sets)]
    overlap, least = overlap_matrix(found), overlap_min_matrix(found)
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            assert overlap[i, j] == len(a & b) / len(a) and least[i, j] == len(a & b) / min(len(a), len(b))


def test_overlap_of_four_and_ten_features_that_share_two():
    small, large = footprint("small", table({0, 1, 2, 3})), footprint("large", table(set(range(2, 12))))
    assert overlap_matrix([small, large]).tolist() == [[1, 0.5], [0.2, 1]]
    assert overlap_min_matrix([small, large])[0, 1] == 0.5


def test_overlap_at_equal_sizes_is_the_mean_over_independent_draws():
    rng = np.random.default_rng(0)
    tables = [rng.random((n, 8)) < 0.3 for n in (5, 7)]
    found = [footprint(str(i), csr_array(one.astype(np.float32))) for i, one in enumerate(tables)]
    unions = [[one[list(s)].any(0) for s in combinations(range(len(one)), 3)] for one in tables]
    shared = np.mean([(a & b).sum() for a in unions[0] for b in unions[1]])
    sizes = [np.mean([a.sum() for a in one]) for one in unions]
    assert equal_overlap_min_matrix(found, 3)[0, 1] == pytest.approx(shared / min(sizes), rel=1e-12)


def test_the_size_of_a_benchmark_raises_redundancy_but_not_at_equal_sizes():
    rng = np.random.default_rng(1)
    fires = rng.random((4000, 40)) < 0.02
    large, small = (footprint("x", csr_array(one.astype(np.float32))) for one in (fires, fires[:200]))
    assert large.redundancy > 10 * small.redundancy
    assert large.redundancy_at(100) == pytest.approx(small.redundancy_at(100), rel=0.15)


def test_sampling_agrees_with_the_closed_form():
    fires = np.random.default_rng(2).random((40, 60)) < 0.1
    last = csr_array(fires.astype(np.float32))
    mean, error = sampled_redundancy(last, orders=400, seed=3)
    assert error < 0.01 and abs(mean - footprint("x", last).redundancy) < 4 * error


def test_thirty_thousand_samples_stay_exact():
    samples, present = 30_000, np.array([1, 2, 700, 29_999, 30_000])
    counts = np.repeat(present, 3)
    rows = np.concatenate([np.arange(m) for m in counts])
    last = csr_array((np.ones(len(rows), np.float32), (rows, np.repeat(np.arange(15), counts))), shape=(samples, 15))
    found = footprint("large", last)
    assert found.expected[-1] == pytest.approx(15, rel=1e-12) and found.coverage.sum() / 15 == pytest.approx(found.redundancy, rel=1e-9)
    assert found.expected[0] == pytest.approx(counts.sum() / samples, rel=1e-9)
    n = 41
    missed = np.exp(gammaln(samples - 700 + 1) + gammaln(samples - n + 1) - gammaln(samples + 1) - gammaln(samples - 700 - n + 1))
    assert found.presence(n)[6] == pytest.approx(1 - missed, rel=1e-6)


def test_the_fewest_samples_for_a_share_of_the_footprint():
    found = footprint("x", table({0}, {0}, {0}, {1}))
    np.testing.assert_allclose(found.coverage, [1 / 2, 3 / 4, 7 / 8, 1])
    assert [found.samples_for(share) for share in (0.5, 0.6, 0.75, 0.8, 1.0)] == [1, 2, 2, 3, 4]


def test_stored_zeros_and_negative_values_do_not_fire():
    last = csr_array((np.array([0.0, -1.0, 2.0], np.float32), (np.array([0, 1, 2]), np.array([0, 1, 2]))), shape=(3, 4))
    found = footprint("x", last)
    assert found.counts.tolist() == [0, 0, 1, 0] and found.silent == 2


def test_bad_requests_are_refused():
    with pytest.raises(InputError, match="benchmark quiet: none of the last tokens of its 3 samples fires a feature"):
        footprint("quiet", csr_array((3, 4), dtype=np.float32))
    found = footprint("x", table({0}, {1}))
    with pytest.raises(InputError, match="asked for 3 of its 2 samples"):
        found.redundancy_at(3)
    with pytest.raises(InputError, match="share of the footprint is 0"):
        found.samples_for(0.0)
    with pytest.raises(InputError, match="orders is 1"):
        sampled_redundancy(table({0}), orders=1)
