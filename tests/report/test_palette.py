import pytest

from qscope_jax.errors import InputError
from qscope_jax.report.palette import COLORS, color, css, opposite


def test_an_unknown_colour_is_refused_with_the_known_ones_named():
    with pytest.raises(InputError, match="mauve.*blue"):
        color("mauve")


def test_no_colour_is_its_own_opposite():
    assert all(opposite(name) != rgb for name, rgb in COLORS.items())


def test_css_writes_opacity_only_where_there_is_any():
    assert css((1, 2, 3)) == "rgb(1,2,3)"
    assert css((1, 2, 3), 0.5) == "rgba(1,2,3,0.5)"
