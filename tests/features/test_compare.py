import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.compare import FeatureDifference, compare


@pytest.fixture
def comparison(readout_of):
    """Four features: one stronger in a, one stronger in b, one that fires more often in b though weaker, one equal."""
    a = readout_of([[0, 0, 0, 0], [4, 0, 3, 1], [4, 0, 0, 1]])
    b = readout_of([[7, 7, 7, 7], [0, 6, 1, 1]], [[0, 0, 0, 0], [0, 6, 1, 1], [0, 0, 0.5, 1]])
    return compare(a, b)


def test_means_and_rates_are_those_of_the_two_sets(comparison):
    np.testing.assert_allclose(comparison.mean_a, [4, 0, 1.5, 1])
    np.testing.assert_allclose(comparison.mean_b, [0, 4, 2.5 / 3, 1])
    np.testing.assert_allclose(comparison.rate_a, [1, 0, 0.5, 1])
    np.testing.assert_allclose(comparison.rate_b, [0, 2 / 3, 1, 1])
    assert comparison.tokens == (2, 3) and comparison.layer == 0


def test_ranking_is_by_difference_and_equal_features_are_left_out(comparison):
    def ranked(**how) -> list[int]:
        return [d.feature for d in comparison.top(4, **how)]

    # 4 and -4 tie: the lower index wins.
    assert ranked() == [0, 1, 2]
    assert ranked(toward="a") == [0, 2] and ranked(toward="b") == [1]
    assert ranked(by="rate") == [0, 1, 2]
    assert ranked(by="rate", toward="b") == [1, 2] and ranked(by="rate", toward="a") == [0]
    assert comparison.top(1) == [FeatureDifference(0, 4.0, 0.0, 1.0, 0.0)]


def test_a_feature_that_fires_in_three_of_four_and_in_one_of_four_differs_by_a_half(readout_of):
    three, one = ([[0], *[[float(fires)] for fires in row]] for row in ((1, 1, 1, 0), (0, 0, 1, 0)))
    (difference,) = compare(readout_of(three), readout_of(one)).top(5, by="rate")
    assert (difference.rate_a, difference.rate_b) == (0.75, 0.25)


def test_what_cannot_be_compared_is_refused(readout_of, comparison):
    text = [[1, 2], [3, 4]]
    with pytest.raises(ShapeError, match=r"layer 0 .* with layer 1"):
        compare(readout_of(text), readout_of(text, layer=1))
    with pytest.raises(ShapeError, match=r"2 features.* 0 \(1 features"):
        compare(readout_of(text), readout_of([[1], [2]]))
    with pytest.raises(InputError, match="no token that counts"):
        compare(readout_of(text), readout_of([[1, 2]]))
    for wrong in ({"by": "max"}, {"toward": "c"}):
        with pytest.raises(InputError, match="compare by"):
            comparison.top(1, **wrong)
