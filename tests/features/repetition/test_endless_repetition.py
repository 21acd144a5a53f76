import numpy as np
import pytest

from qscope_jax.features.repetition.endless_repetition import endless_repetition, repetition_start

RNG = np.random.default_rng(0)
BEFORE = RNG.integers(1000, 2000, 300).tolist()


def circle(period, tokens):
    """So many tokens, each place of the circle another one."""
    return [i % period for i in range(tokens)]


@pytest.mark.parametrize("period", [1, 3, 16, 17, 128])
def test_a_circle_is_found_once_it_has_gone_round_often_enough(period):
    needed = max(4 * period, 64)
    for tokens in (needed, needed + 1, 3 * needed):
        assert endless_repetition(BEFORE + circle(period, tokens), stopped=False) == period
    assert endless_repetition(circle(period, needed), stopped=False) == period
    assert endless_repetition(BEFORE + circle(period, needed - 1), stopped=False) is None


def test_the_smallest_period_is_given():
    assert endless_repetition([1, 2, 1, 2] * 32, stopped=False) == 2
    assert endless_repetition(([1] * 20 + [2]) * 10, stopped=False) == 21


def test_what_stopped_repeats_nothing_endlessly():
    assert endless_repetition([7] * 500, stopped=True) is None


@pytest.mark.parametrize("tokens", [0, 1, 2, 63])
def test_what_is_short_repeats_nothing_endlessly(tokens):
    assert endless_repetition([7] * tokens, stopped=False) is None


def test_what_is_almost_periodic_is_no_circle():
    one_wrong = circle(3, 300)
    one_wrong[-30] = 9
    assert endless_repetition(one_wrong, stopped=False) is None
    counting = [token for number in range(100) for token in (1, 2, 1000 + number)]
    assert endless_repetition(counting, stopped=False) is None
    assert endless_repetition(circle(129, 3000), stopped=False) is None


def test_what_was_wrong_before_the_last_rounds_does_not_matter():
    assert endless_repetition([9, *circle(3, 64)], stopped=False) == 3


def test_no_circle_is_seen_in_random_tokens():
    assert endless_repetition(RNG.integers(0, 50, 2000).tolist(), stopped=False) is None


def test_the_circle_begins_after_the_last_token_that_it_does_not_explain():
    assert repetition_start(BEFORE + circle(5, 100), 5) == 300
    assert repetition_start([9, 9, 1, 2, 1, 2, 1], 2) == 2
    assert repetition_start([7, 7, 7], 1) == 0
    # What comes before may already belong to it.
    assert repetition_start([5, 3, 1, 2, 3, 1, 2, 3], 3) == 1
