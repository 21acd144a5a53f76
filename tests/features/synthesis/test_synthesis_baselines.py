from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csc_array

from qscope_jax.errors import InputError
from qscope_jax.features.synthesis.synthesis_baselines import Baseline, coverage_curve, expected_coverage, natural_sampling
from qscope_jax.features.synthesis.targets import Target
from qscope_jax.features.text_features import text_features

tables = st.integers(1, 6).flatmap(
    lambda texts: st.lists(st.lists(st.booleans(), min_size=texts, max_size=texts), min_size=1, max_size=4).map(lambda rows: np.array(rows).T)
)


@given(tables)
def test_expected_coverage_equals_enumeration(hits):
    texts = len(hits)
    found = expected_coverage(hits.sum(axis=0), texts, range(texts + 1))
    every = [np.mean([hits[list(drawn)].any(axis=0).mean() for drawn in combinations(range(texts), n)]) for n in range(texts + 1)]
    np.testing.assert_allclose(found, every, atol=1e-12)


@given(tables)
def test_the_coverage_curve_equals_growing_sets(hits):
    assert coverage_curve(csc_array(hits)).tolist() == [int(hits[:n].any(axis=0).sum()) for n in range(len(hits) + 1)]


def test_natural_texts_cover_what_they_fire(readout_of):
    table = {0: text_features(readout_of([[9, 9], [1, 0]], [[9, 9], [0, 0]], [[9, 9], [0, 1]]))}
    found = natural_sampling([Target(0, 0), Target(0, 1)], ["a", "b", "c"], table)
    assert found.coverage(0) == 0 and found.coverage(1) == pytest.approx(1 / 3) and found.coverage(3) == found.coverage(9) == 1


def test_large_pools_give_numbers():
    assert expected_coverage(np.array([1, 10**6]), 10**7, [10**5])[0] == pytest.approx((0.01 + 1) / 2)


def test_what_makes_no_sense_is_refused(readout_of):
    table = {0: text_features(readout_of([[1.0]]))}
    for line, call in [
        ("a pool of 2 texts with tables of 1", lambda: natural_sampling([Target(0, 0)], ["a", "b"], table)),
        (r"budgets of \[3\] texts from 2", lambda: expected_coverage(np.array([1]), 2, [3])),
    ]:
        with pytest.raises(InputError, match=line):
            call()
    assert Baseline("x", (), csc_array((0, 1), dtype=bool)).coverage(3) == 0
