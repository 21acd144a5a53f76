import dataclasses
import json
import math
import re

import pytest

from qscope_jax.features.explain.feature_card import Context, FeatureCard, GroupRate, QuantileContexts
from qscope_jax.report.site_data import LISTED_TOKENS, Block, IndexPart, data_script, token_label

HOSTILE = "</script><script>alert(1)</script>\"'\\u0041\\\u2028\u2029\n\r\t\x00\ud83d<!-- ${x} &amp;"


def card(feature: int, layer: int = 3, **changes) -> FeatureCard:
    context = Context(5, 1, 2, (10, 11, 12), (0.0, 2.5, 0.12345), {"language": "en"})
    whole = FeatureCard(
        layer, feature, 0.01, 0.5, 2.5, 1.25, ((0.0, 2.5, 7),), {"language": (GroupRate("en", 9, 0.5, 0.01, 1.0),)}, (context,),
        (QuantileContexts(1.0, 2.0, 3, (context,)),), ((11, 0.5),), ((12, -0.5),), ((1, 0.9),), ((2, 0.1),), "said", {"detection": 0.75},
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def handed_over(script: str):
    """Name and value that a data script hands over, read as a browser reads a string in single quotes."""
    found = re.fullmatch(r"qscopeData\('(\w+)','((?:[^'\\\n\r\u2028\u2029]|\\.)*)'\)\n", script)
    assert found is not None
    text = re.sub(r"\\(u[0-9a-f]{4}|.)", lambda match: chr(int(match[1][1:], 16)) if len(match[1]) == 5 else match[1], found[2])
    return found[1], json.loads(text)


def test_a_script_hands_over_exactly_its_value_on_one_line():
    value = {"text": HOSTILE, HOSTILE: [1, 0.5, None, "中文", "العربية", "'"]}
    script = data_script("block0", value)
    assert len(script.splitlines()) == 1 and handed_over(script) == ("block0", value)
    script.encode("utf-8")


@pytest.mark.parametrize("maximum", [3e-5, 0.7, 9.999, 1234.5, 8e9])
def test_activations_keep_four_digits_of_the_maximum(maximum):
    block = Block(str)
    activations = (0.0, maximum, maximum / 7, -maximum / 3)
    block.add(card(0, maximum=maximum, top=(Context(0, 1, 0, (1, 2, 3, 4), activations),)))
    (written,) = block.value()["cards"]
    for units, activation in zip(written["top"][0]["activations"], activations, strict=True):
        assert abs(units * written["unit"] - activation) <= 0.000501 * maximum


def test_what_is_not_finite_is_null():
    block = Block(str)
    block.add(card(0, maximum=math.nan, top=(Context(0, 0, 0, (1, 2), (math.inf, 1.0)),)))
    (written,) = block.value()["cards"]
    assert written["top"][0]["activations"] == [None, 1]
    json.dumps(block.value(), allow_nan=False)


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" the", "the"),
        ("the", "the"),
        ("  ", "··"),
        ("\n", "↵"),
        ("a\tb", "a⇥b"),
        ("\ufffd", "□"),
        ("\x07", "[U+0007]"),
        ("", "[empty]"),
        ("中", "中"),
    ],
)
def test_a_token_in_a_list_is_a_word_or_a_mark(token, label):
    assert token_label(token) == label


def test_tokens_that_need_marks_come_with_their_pieces():
    block = Block({10: " plain", 11: "a\n", 12: "<0xE4>"}.__getitem__)
    block.add(card(0))
    assert block.value()["tokens"] == [" plain", ["a\n", [["text", "a"], ["newline", "\n"]]], ["<0xE4>", [["partial", "<0xE4>"]]]]


def test_the_list_names_the_first_different_tokens_of_strongest_contexts():
    part = IndexPart(lambda token: f" {'ab'[token % 2]}{token // 2}")
    peaks = [Context(0, 1, 0, (99, token), (0.0, 1.0)) for token in (4, 4, 6, 8, 10, 12, 14)]
    part.add(card(3, top=tuple(peaks), promoted=((5, 1.0), (7, 0.5))))
    part.add(card(8, top=(), promoted=()))
    assert part.columns["tokens"] == [["a2", "a3", "a4", "a5", "a6"], []] and LISTED_TOKENS == 5
    assert part.columns["promoted"] == [["b2", "b3"], []] and part.columns["features"] == [3, 8] and len(part) == 2
