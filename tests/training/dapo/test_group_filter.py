import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError, ShapeError
from qscope_jax.training.dapo.advantages import group_advantages
from qscope_jax.training.dapo.group_filter import Refill, TooFewGroupsError, keep_groups


def test_groups_that_are_all_right_or_all_wrong_are_dropped():
    metric = np.array([1, -1, 1, 1, -1, -1, 0, 1], np.float32)
    found = keep_groups(metric, 2)
    assert found.kept_P.tolist() == [True, False, False, True]
    assert found.counts == {"kept": 2, "all_right": 1, "unscorable": 0, "all_wrong": 1}
    assert keep_groups(np.zeros(4), 4).counts["all_wrong"] == 1


def test_wrong_answers_of_different_lengths_are_dropped_by_their_outcome_and_would_be_kept_by_their_shaped_reward():
    outcome, shaped = np.full(4, -1.0), np.array([-1.0, -1, -1, -2])
    assert not keep_groups(outcome, 4).kept_P[0] and keep_groups(shaped, 4).kept_P[0]
    np.testing.assert_allclose(group_advantages(shaped, 4).advantages_N, [0.5, 0.5, 0.5, -1.5], atol=1e-5)


def test_a_steered_member_does_not_keep_its_group():
    metric = np.array([1, 1, 1, -1, 1, -1, 1, -1], np.float64)
    assert keep_groups(metric, 4).kept_P.tolist() == [True, True]
    assert keep_groups(metric, 4, steered=[3]).kept_P.tolist() == [False, True]


def test_what_is_not_finite_does_not_count():
    metric = np.array([1, np.nan, 1, np.nan, np.nan, np.inf, 1, 0, np.nan])
    found = keep_groups(metric, 3)
    assert found.kept_P.tolist() == [False, False, True]
    assert found.counts == {"kept": 1, "all_right": 1, "unscorable": 1, "all_wrong": 0}


def test_values_equal_in_all_digits_are_equal_whatever_their_deviation_rounds_to():
    assert not keep_groups(np.full(8, 0.1, np.float32), 8).kept_P[0]
    assert keep_groups(np.array([0.1, np.nextafter(0.1, 1)]), 2).kept_P[0]


def test_refilling_draws_until_there_are_enough_and_takes_the_first():
    state = Refill(target=3, max_num_gen_batches=4)
    assert state.wanted
    state = state.after(["a", "b"], np.array([False, True])).after(["c", "d"], np.array([False, False]))
    assert state.wanted and state.missing == 2
    state = state.after(["e", "f", "g"], np.array([True, True, True]))
    assert not state.wanted and state.chosen == ("b", "e", "f") and not state.shortfall(strict=True)
    assert state.counts == {"batches": 3, "prompts": 7, "groups": 3, "surplus": 1, "missing": 0}


def test_at_the_cap_a_step_goes_on_with_what_it_has_and_says_so():
    state = Refill(target=2, max_num_gen_batches=2)
    assert not state.shortfall()
    one = state.after(["a"], np.array([True])).after(["b"], np.array([False]))
    assert not one.wanted and one.chosen == ("a",) and one.missing == 1
    assert one.shortfall() == "1 of 2 prompts had answers that differ, out of 2 in 2 generation batches; the step goes on with those"
    none = state.after(["a"], np.array([False])).after(["b"], np.array([False]))
    assert none.chosen == () and none.shortfall().endswith("the step changes nothing")
    with pytest.raises(TooFewGroupsError, match="raise max_num_gen_batches"):
        none.shortfall(strict=True)


def test_what_does_not_fit_is_refused_in_one_line():
    full = Refill(1, 1).after(["a"], np.array([True]))
    cases = [
        (ShapeError, "5 values are not whole groups of 2", lambda: keep_groups(np.ones(5), 2)),
        (InputError, "two normal ones", lambda: keep_groups(np.ones(4), 2, steered=[0])),
        (InputError, "member 2 is to be steered", lambda: keep_groups(np.ones(4), 2, steered=[2])),
        (ConfigError, "at most 0 generation batches", lambda: Refill(1, 0)),
        (ConfigError, "0 prompts a step", lambda: Refill(0, 1)),
        (InputError, "a batch is added after 1 of 1", lambda: full.after(["b"], np.array([True]))),
        (InputError, "1 verdicts for 2 groups", lambda: Refill(1, 1).after(["a", "b"], np.array([True]))),
    ]
    for kind, line, call in cases:
        with pytest.raises(kind, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)
