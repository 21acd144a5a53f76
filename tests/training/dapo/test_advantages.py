import numpy as np
import pytest

from qscope_jax.errors import ConfigError, ShapeError
from qscope_jax.training.dapo.advantages import group_advantages


def advantages(*rewards, group_size=None, dtype=np.float64, **settings):
    found = group_advantages(np.array(rewards, dtype), group_size or len(rewards), **settings)
    assert found.advantages_N.dtype == np.float32
    return found.advantages_N


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, -1, -1, -1], [1.5, -0.5, -0.5, -0.5]),
        ([1, 1, 1, 0], [0.5, 0.5, 0.5, -1.5]),
        ([1, 0], [0.707107, -0.707107]),
        ([1] * 7 + [-1], [0.353553] * 7 + [-2.474874]),
        ([0.3] * 15 + [-80], [0.25] * 15 + [-3.75]),
    ],
)
def test_advantages_equal_those_by_hand(rewards, expected):
    np.testing.assert_allclose(advantages(*rewards, advantage_eps=0.0), expected, atol=1e-6)


def test_the_epsilon_is_added_to_the_unbiased_deviation():
    np.testing.assert_allclose(advantages(1, 0, advantage_eps=1e-4), [0.707007, -0.707007], atol=1e-6)


@pytest.mark.parametrize("value", [0.2, 0.35, 1 / 3, -7.1, 1e-12, 123456.7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_advantages_of_exactly_zero(value, dtype, scale):
    for size in (2, 3, 8, 16):
        alone = group_advantages(np.full(size, value, dtype), size, scale_rewards=scale)
        beside = group_advantages(np.array([*[value] * size, *range(size)], dtype), size, scale_rewards=scale)
        assert not alone.advantages_N.any() and not beside.advantages_N[:size].any() and beside.advantages_N[size:].any()
        assert alone.counts["zero_variance"] == beside.counts["zero_variance"] == 1


def test_rewards_in_single_precision_are_computed_in_double():
    rewards = np.array([12345.67, 12345.66, 12345.65, 12345.67], np.float32)
    np.testing.assert_array_equal(advantages(*rewards, dtype=np.float32), advantages(*rewards.astype(np.float64)))


def test_each_group_is_compared_with_itself_alone():
    both = advantages(1, -1, -1, -1, 10, 11, 12, 13, group_size=4)
    np.testing.assert_array_equal(both, np.concatenate([advantages(1, -1, -1, -1), advantages(10, 11, 12, 13)]))


def test_scales_divide_by_the_group_the_batch_or_nothing():
    rewards = [1.0, 0.0, 5.0, 1.0]
    centred = np.array([0.5, -0.5, 2, -2])
    np.testing.assert_allclose(advantages(*rewards, group_size=2, scale_rewards="none"), centred)
    np.testing.assert_allclose(advantages(*rewards, group_size=2, scale_rewards="batch"), centred / np.std(rewards, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(advantages(*rewards, group_size=2), np.array([1, -1, 1, -1]) / np.sqrt(2), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_reward_that_is_not_finite_is_left_out_and_has_advantage_zero(bad, scale):
    with_it = group_advantages(np.array([1, bad, 0, 1]), 4, scale_rewards=scale)
    without = group_advantages(np.array([1.0, 0, 1]), 3, scale_rewards=scale)
    np.testing.assert_array_equal(with_it.advantages_N[[0, 2, 3]], without.advantages_N)
    assert with_it.advantages_N[1] == 0 and with_it.counts["unscorable"] == 1


def test_a_group_with_fewer_than_two_finite_rewards_has_advantages_of_zero():
    found = group_advantages(np.array([np.nan, 3, np.nan, np.nan, 1, 0]), 2)
    np.testing.assert_allclose(found.advantages_N, [0, 0, 0, 0, 0.7071, -0.7071], atol=1e-4)
    assert found.counts == {"groups": 3, "zero_variance": 0, "unscorable": 3, "too_few": 2}
    assert not group_advantages(np.array([np.nan, 3]), 2, scale_rewards="batch").advantages_N.any()


def test_rewards_stay_as_they_are_and_none_are_no_groups():
    rewards = np.array([1.0, np.nan])
    group_advantages(rewards, 2)
    np.testing.assert_array_equal(rewards, [1, np.nan])
    assert group_advantages(np.zeros(0), 2).counts["groups"] == 0


def test_what_cannot_be_compared_is_refused_in_one_line():
    cases = [
        (ConfigError, "num_generations is 1", {"group_size": 1}),
        (ConfigError, "scale_rewards is 'std'", {"scale_rewards": "std"}),
        (ConfigError, "advantage_eps is -1", {"advantage_eps": -1.0}),
        (ShapeError, "3 rewards are not whole groups of 2", {}),
    ]
    for kind, line, settings in cases:
        with pytest.raises(kind, match=line) as caught:
            group_advantages(np.ones(3), **{"group_size": 2, **settings})
        assert "\n" not in str(caught.value)
