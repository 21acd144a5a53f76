import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.benchmarks.benchmark_clustering import cluster


def test_two_planted_groups_are_found_and_stand_together():
    overlap = np.full((5, 5), 0.1)
    for group in ([0, 3], [1, 2, 4]):
        overlap[np.ix_(group, group)] = 0.9
    np.fill_diagonal(overlap, 1)
    found = cluster(overlap)
    assert sorted(map(sorted, found.groups(0.5))) == [[0, 3], [1, 2, 4]]
    assert sorted(found.order) == list(range(5)) and {found.order[0], found.order[1]} in ({0, 3}, {1, 2}, {1, 4}, {2, 4})
    assert found.joins[-1, 2] == pytest.approx(0.9)


def test_one_benchmark_is_refused():
    with pytest.raises(InputError, match="1 benchmark given to cluster; expected 2 or more"):
        cluster(np.ones((1, 1)))


def test_benchmarks_on_a_line_stand_in_its_order():
    places = np.array([3.1, 0.0, 4.9, 1.2, 2.0, 4.0, 6.3])
    found = cluster(1 - np.abs(places[:, None] - places[None, :]) / 10)
    ordered = places[list(found.order)]
    assert (np.diff(ordered) > 0).all() or (np.diff(ordered) < 0).all()
