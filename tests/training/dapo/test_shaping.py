import numpy as np
import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.training.dapo.shaping import ngram_repetition_penalty, soft_overlong_punishment


@pytest.mark.parametrize(
    "longest, cache, length, expected",
    [
        (20480, 4096, 0, 0),
        (20480, 4096, 16384, 0),
        (20480, 4096, 16385, -0.000244140625),
        (20480, 4096, 18432, -0.5),
        (20480, 4096, 20480, -1),
        (20480, 4096, 20481, -1),
        (100, 20, 81, -0.05),
        (100, 20, 110, -1),
    ],
)
def test_long_completions_are_punished_as_by_hand(longest, cache, length, expected):
    found = soft_overlong_punishment(np.array([length]), max_completion_len=longest, soft_punish_cache=cache)
    np.testing.assert_allclose(found, [expected], atol=1e-12)


def test_no_punishment_is_zero_without_a_sign():
    found = soft_overlong_punishment(np.array([1, 80]), max_completion_len=100, soft_punish_cache=20)
    assert not np.signbit(found).any() and str(ngram_repetition_penalty([1, 2, 3])) == "0.0"


@pytest.mark.parametrize(
    "ids, size, expected",
    [([5] * 5, 2, -0.75), ([1, 2] * 3, 2, -0.6), ([1, 2, 3] * 4, 3, -0.7), ([1, 2, 3, 4], 3, 0), ([7, 7], 3, 0), ([], 3, 0), ([7, 7], 1, -0.5)],
)
def test_repeated_n_grams_cost_as_by_hand(ids, size, expected):
    assert ngram_repetition_penalty(ids, ngram_size=size) == pytest.approx(expected)
    assert ngram_repetition_penalty(ids, ngram_size=size, max_penalty=-2.0) == pytest.approx(2 * expected)


def test_settings_out_of_range_are_refused_in_one_line():
    cases = [
        ("soft_punish_cache is 0", lambda: soft_overlong_punishment(np.array([1]), max_completion_len=10, soft_punish_cache=0)),
        ("soft_punish_cache is 11", lambda: soft_overlong_punishment(np.array([1]), max_completion_len=10, soft_punish_cache=11)),
        ("ngram_size is 0", lambda: ngram_repetition_penalty([1], ngram_size=0)),
        ("max_penalty is 0.5", lambda: ngram_repetition_penalty([1], max_penalty=0.5)),
    ]
    for line, call in cases:
        with pytest.raises(ConfigError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)
