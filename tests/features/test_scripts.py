import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope_jax.errors import InputError
from qscope_jax.features.scripts import SCRIPTS, script_share


@pytest.mark.parametrize(
    ("script", "text"),
    [("Latin", "déjà vu"), ("Han", "你好世界"), ("Cyrillic", "привет"), ("Hangul", "안녕하세요"), ("Arabic", "مرحبا بالعالم")],
)
def test_each_script_is_told_from_the_others(script, text):
    assert [script_share(text, other) for other in SCRIPTS] == [float(other == script) for other in SCRIPTS]


def test_the_share_is_of_letters_alone():
    assert script_share("ab 12 你好, 3!", "Han") == 0.5
    assert script_share("12 + 3 = 15 …", "Latin") == 0.0 == script_share("", "Han")


def test_digits_and_signs_of_a_script_are_no_letters():
    assert script_share("ا ۱۲۳", "Arabic") == 1.0
    assert script_share("۱۲۳", "Arabic") == 0.0


def test_several_texts_are_counted_together():
    assert script_share(["abc", "你"], "Han") == 0.25
    assert script_share([], "Han") == 0.0


@given(st.text())
def test_shares_are_shares(text):
    shares = [script_share(text, script) for script in SCRIPTS]
    assert min(shares) >= 0 and sum(shares) <= 1 + 1e-9


def test_an_unknown_script_is_refused():
    with pytest.raises(InputError, match="'Klingon', expected one of Latin, Han"):
        script_share("a", "Klingon")
