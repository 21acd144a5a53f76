import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qscope_jax.report.number_format import as_number, format_change, format_column, format_number, format_points, is_numeric


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"), (0.123456, "0.1235"), (12.5, "12.5"), (1234.5678, "1,235"), (100.0, "100"), (1.2e-5, "1.2e-05"), (3.4e9, "3.4e+09"),
        (0.0, "0"), (-0.5, "-0.5"), (math.nan, "nan"), (-math.inf, "-∞"), (None, "–"), (True, "yes"), (np.bool_(False), "no"),
        ("at most 2", "at most 2"),
        (np.float32(0.25), "0.25"), (np.int64(5000), "5,000"),
    ],
)  # fmt: skip
def test_a_number_alone_has_four_digits_and_grouped_thousands(value, text):
    assert format_number(value) == text


def test_scalars_of_every_library_are_numbers():
    for value in (ml_dtypes.bfloat16(1.5), jnp.asarray(1.5, jnp.bfloat16), jnp.float32(1.5), np.float16(1.5)):
        assert as_number(value) == 1.5
    assert isinstance(as_number(jnp.int32(3)), int)
    assert as_number(True) is None and as_number("3") is None and as_number(np.zeros(3)) is None


def test_floats_of_a_column_share_their_decimals():
    assert format_column([0.5, 100.25, None, 3]) == ["0.50", "100.25", "–", "3"]
    assert format_column([0.123456, 0.5]) == ["0.123", "0.500"]
    assert format_column([1.0, 2.0]) == ["1.0", "2.0"]


def test_no_decimals_are_shared_where_sizes_are_too_far_apart():
    assert format_column([1e-6, 12345.6]) == ["1e-06", "12,346"]


def test_a_column_is_numeric_when_all_that_is_there_are_numbers():
    assert is_numeric([1, None, 2.5])
    assert not is_numeric([1, "2"]) and not is_numeric([None]) and not is_numeric([]) and not is_numeric([True])


def test_changes_of_shares_have_their_sign_and_a_dash_where_they_are_not_known():
    assert format_change(-0.554) == "-55 %" and format_change(0.1) == "+10 %" and format_change(math.nan) == "–"
    assert format_points(-0.0052, 0.001) == "-0.52 to +0.10" and format_points(math.nan, math.nan) == "–"
