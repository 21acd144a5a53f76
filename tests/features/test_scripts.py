from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope_jax.errors import InputError
from qscope_jax.features.scripts import _BY_LANGUAGE, SCRIPTS, find_script, language_scripts, script_share, split_by_script

WORDS = {
    "Latin": "déjà vu", "Han": "你好世界", "Cyrillic": "привет", "Hangul": "안녕하세요", "Arabic": "مرحبا بالعالم", "Hiragana": "ひらがな",
    "Katakana": "カタカナ", "Thai": "สวัสดี", "Devanagari": "नमस्ते", "Hebrew": "שלום", "Greek": "γειά", "Ethiopic": "ሰላም", "Georgian": "გამარჯობა",
}  # fmt: skip


@pytest.mark.parametrize("script", WORDS)
def test_each_script_is_told_from_the_others(script):
    assert [script_share(WORDS[script], other) for other in SCRIPTS] == [float(other == script) for other in SCRIPTS]


def test_the_share_is_of_letters_alone():
    assert script_share("ab 12 你好, 3!", "Han") == 0.5
    assert script_share("12 + 3 = 15 …", "Latin") == 0.0 == script_share("", "Han")


def test_digits_and_signs_of_a_script_are_no_letters():
    assert script_share("ا ۱۲۳", "Arabic") == 1.0
    assert script_share("۱۲۳", "Arabic") == 0.0


def test_several_texts_are_counted_together():
    assert script_share(["abc", "你"], "Han") == 0.25
    assert script_share([], "Han") == 0.0


def test_several_scripts_are_counted_together():
    assert script_share("かカ漢字", "Hiragana+Katakana") == 0.5
    assert find_script("abcカか", "Hiragana+Katakana") == 3


@given(st.text())
def test_shares_are_shares(text):
    shares = [script_share(text, script) for script in SCRIPTS]
    assert min(shares) >= 0 and sum(shares) <= 1 + 1e-9


def test_one_character_is_found_and_shared_punctuation_is_not():
    assert find_script("it is 好", "Han") == 6
    assert find_script("it is “fine”。", "Han") == -1 == find_script("", "Han")
    assert find_script("一 (〇)", "Han") == 0 and find_script("〇", "Han") == 0
    # A script's own digits are of it, those of all scripts are not.
    assert find_script("۱", "Arabic") == 0 and find_script("1", "Arabic") == -1


@given(st.text(alphabet="ab 你好。"))
def test_pieces_are_the_text_and_alternate(text):
    pieces = split_by_script(text, "Han")
    assert "".join(piece for piece, _ in pieces) == text and all(piece for piece, _ in pieces)
    assert all(ours != theirs for (_, ours), (_, theirs) in zip(pieces, pieces[1:], strict=False))
    assert all((find_script(piece, "Han") == 0) == of_script for piece, of_script in pieces)


def test_a_language_is_known_by_its_code_in_several_spellings():
    assert language_scripts("zh") == language_scripts("ZH-tw") == language_scripts("zho_Hant") == language_scripts("cmn") == ("Han",)
    assert language_scripts("ja") == language_scripts("jpn_Jpan") == ("Hiragana", "Katakana", "Han")
    assert [language_scripts(code) for code in ("ko", "ru", "ar", "th", "vi")] == [("Hangul",), ("Cyrillic",), ("Arabic",), ("Thai",), ("Latin",)]
    assert language_scripts("sr") == ("Cyrillic", "Latin") and language_scripts("sr-Latn") == ("Latin",)
    assert language_scripts("tlh") == () == language_scripts("")


def test_the_table_names_scripts_that_there_are():
    assert Counter(script for scripts in _BY_LANGUAGE.values() for script in scripts).keys() <= set(SCRIPTS)


def test_an_unknown_script_is_refused():
    with pytest.raises(InputError, match="'Klingon', expected one of Latin, Han"):
        script_share("a", "Klingon")
    with pytest.raises(InputError, match="'Kana', expected one of"):
        find_script("a", "Han+Kana")
