import math

import pytest

from qscope_jax.errors import InputError
from qscope_jax.report.token_heat import levels, pieces


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (" the", [("space", " "), ("text", "the")]),
        ("a\n\n", [("text", "a"), ("newline", "\n"), ("newline", "\n")]),
        ("\tx", [("tab", "\t"), ("text", "x")]),
        (" \ufffd\ufffd", [("space", " "), ("partial", "\ufffd\ufffd")]),
        ("\ud83d", [("partial", "\ud83d")]),
        ("<0xE4>", [("partial", "<0xE4>")]),
        ("\x1b[0m", [("code", "U+001B"), ("text", "[0m")]),
        ("\u200d", [("code", "U+200D")]),
        ("", [("code", "empty")]),
        ("中文", [("text", "中文")]),
        ("نا\u200cم", [("text", "نا\u200cم")]),
    ],
)
def test_what_cannot_be_seen_in_a_token_is_cut_out(token, expected):
    assert pieces(token) == expected


def test_levels_are_shares_of_the_largest_absolute_value():
    numbers, shares, top = levels(["a", "b", "c"], [1, -4, math.nan])
    assert numbers[:2] == [1.0, -4.0] and shares == [0.25, -1.0, 0.0] and top == 4.0


def test_levels_stop_at_a_given_maximum():
    assert levels(["a", "b"], [1, 8], maximum=2.0)[1] == [0.5, 1.0]


def test_all_zero_values_have_no_colour():
    assert levels(["a", "b"], [0.0, 0.0])[1] == [0.0, 0.0]


def test_a_value_for_each_token_and_a_positive_maximum_are_demanded():
    with pytest.raises(InputError, match="2 tokens came with 1 values"):
        levels(["a", "b"], [1.0])
    for maximum in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="maximum"):
            levels(["a"], [1.0], maximum=maximum)
