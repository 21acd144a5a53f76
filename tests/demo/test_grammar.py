import random

import pytest

from qscope_jax.demo.grammar import expand

SLOTS = {"who": ["Ann", "Bob"], "what": ["tea"]}


def test_every_slot_is_filled_with_a_value_of_its_own():
    found = {expand("{who} and {who} made {what}.", SLOTS, random.Random(seed)) for seed in range(40)}
    assert found == {f"{a} and {b} made tea." for a in SLOTS["who"] for b in SLOTS["who"]}
    assert expand("{who} left.", SLOTS, random.Random(3)) == expand("{who} left.", SLOTS, random.Random(3))


def test_a_slot_that_no_grammar_has_is_an_error():
    with pytest.raises(KeyError, match="where"):
        expand("{where}", SLOTS, random.Random(0))
