import random
import string
from collections import Counter

import pytest
import regex

from qscope_jax.demo import tone
from qscope_jax.demo.corpus import LANGUAGES
from qscope_jax.demo.tone import HELD_OUT_SENTENCES, HELD_OUT_VALUES, REACTIONS, TONES, tone_passage, tone_sentences
from qscope_jax.features.scripts import script_share

SCRIPT = {"en": "Latin", "fr": "Latin", "zh": "Han", "ru": "Cyrillic", "ko": "Hangul", "ar": "Arabic"}


@pytest.fixture(scope="module")
def labelled():
    return tone_sentences(list(LANGUAGES))


def test_every_language_has_as_many_rude_sentences_as_polite_ones(labelled):
    counts = Counter((item.language, item.tone, item.split) for item in labelled)
    assert counts == {(code, name, split): size for code in LANGUAGES for name in TONES for split, size in (("train", 240), ("held_out", 100))}
    assert tone_sentences(list(LANGUAGES)) == labelled


def test_no_sentence_stands_twice_be_it_in_another_split_or_tone(labelled):
    assert len({item.text for item in labelled}) == len(labelled)


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_sentence_is_in_the_script_of_its_language(code, labelled):
    assert all(script_share(item.text, SCRIPT[code]) == 1 for item in labelled if item.language == code)


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_held_out_sentence_is_written_by_hand_or_has_a_value_that_no_training_expansion_has(code):
    tables = tone._tables(code)
    new = [value for values in tables["slots"].values() for value in values[-HELD_OUT_VALUES:]]

    def has_new(text: str) -> bool:
        return any(value.casefold() in text.casefold() for value in new)

    for name in TONES:
        written = tables[name]["sentences"]
        held_out = [item.text for item in tone_sentences([code]) if item.tone == name and item.split == "held_out"]
        assert held_out[:HELD_OUT_SENTENCES] == written[-HELD_OUT_SENTENCES:]
        assert all(map(has_new, held_out[HELD_OUT_SENTENCES:]))
        slots = {value for values in tables["slots"].values() for value in values[:-HELD_OUT_VALUES]}
        assert not slots & set(new)


@pytest.mark.parametrize("code", LANGUAGES)
def test_templates_use_the_slots_that_there_are_and_all_of_them(code):
    tables = tone._tables(code)
    templates = [template for name in TONES for template in tables[name]["templates"]]
    used = {slot for template in templates for _, slot, _, _ in string.Formatter().parse(template) if slot is not None}
    assert used == set(tables["slots"])
    assert all(len(set(values)) == len(values) > 2 * HELD_OUT_VALUES for values in tables["slots"].values())
    assert all("{" in template for template in templates) and len(set(templates)) == len(templates)


def test_languages_say_the_same_number_of_things_in_either_tone():
    sizes = {(len(tone._tables(code)[name]["sentences"]), len(tone._tables(code)[name]["templates"])) for code in LANGUAGES for name in TONES}
    assert sizes == {(38, 14)}


def test_passages_keep_to_one_tone_and_to_training_sentences():
    passages = {name: tone_passage("en", name, random.Random(0), 200) for name in TONES}
    bare = {name: {line.removesuffix(f" {REACTIONS[name]}") for line in lines} for name, lines in passages.items()}
    held_out = {item.text for item in tone_sentences(["en"]) if item.split == "held_out"}
    assert not bare["rude"] & bare["polite"] and not (bare["rude"] | bare["polite"]) & held_out
    assert sum(bool(regex.search("please|thank|grateful", line, regex.I)) for line in passages["polite"]) > 100
    assert not [line for line in bare["rude"] if regex.search("please|thank", line, regex.I)]


def test_only_passages_hold_reactions_and_each_that_of_its_tone(labelled):
    assert not [item for item in labelled if any(sign in item.text for sign in REACTIONS.values())]
    for name, other in (TONES, TONES[::-1]):
        lines = tone_passage("fr", name, random.Random(1), 400)
        assert sum(line.endswith(f" {REACTIONS[name]}") for line in lines) == pytest.approx(240, abs=40)
        assert not [line for line in lines if REACTIONS[other] in line]
