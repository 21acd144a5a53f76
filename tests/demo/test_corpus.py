import string

import pytest
import regex
import yaml

from qscope_jax.demo import corpus
from qscope_jax.demo.corpus import LANGUAGES, documents, mixed_prompts, python_documentation, sentences, topics
from qscope_jax.demo.tone import TONES, tone_sentences
from qscope_jax.features.scripts import SCRIPTS, script_share

SCRIPT = {"en": "Latin", "fr": "Latin", "zh": "Han", "ru": "Cyrillic", "ko": "Hangul", "ar": "Arabic"}


@pytest.fixture(scope="module")
def drawn() -> list[str]:
    return documents(3000, seed=1)


def test_six_languages_have_the_same_twenty_topics():
    names = [topic.name for topic in topics("en")]
    assert len(set(names)) == len(names) == 20 and set(SCRIPT) == set(LANGUAGES)
    for language in LANGUAGES:
        assert [topic.name for topic in topics(language)] == names
        assert {(len(topic.train), len(topic.held_out)) for topic in topics(language)} == {(28, 4)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sentence_stands_twice(language):
    lines = sentences(language) + sentences(language, held_out=True)
    assert len(set(lines)) == len(lines) == 640


def test_held_out_sentences_are_never_in_training_documents(drawn):
    text = "\n".join(drawn)
    assert not [line for language in LANGUAGES for line in sentences(language, held_out=True) if line in text]
    assert all(any(line in text for line in sentences(language)) for language in LANGUAGES)


def grammar(language: str) -> tuple[dict[str, list[str]], list[str]]:
    loaded = yaml.safe_load((corpus._FOLDER / f"{language}.yaml").read_text(encoding="utf-8"))
    return loaded["slots"], loaded["templates"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_is_in_the_script_of_its_language(language):
    slots, templates = grammar(language)
    expansions = [value for values in slots.values() for value in values] + [regex.sub(r"\{.*?\}", "", template) for template in templates]
    for line in (*sentences(language), *sentences(language, held_out=True), *expansions):
        assert script_share(line, SCRIPT[language]) == 1 or not regex.search(r"\p{L}", line), line


@pytest.mark.parametrize("language", LANGUAGES)
def test_templates_use_the_slots_that_there_are_and_all_of_them(language):
    slots, templates = grammar(language)
    used = {name for template in templates for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    assert used == set(slots)
    assert all(values and len(set(values)) == len(values) and not any("{" in value for value in values) for values in slots.values())
    assert len(set(templates)) == len(templates)


def is_task(document: str) -> bool:
    """Solved samples stand on lines of their own; no other document has two lines."""
    return "\n" in document


def six_languages(drawn: list[str]) -> list[str]:
    """Documents in the six languages: neither Python's nor tasks."""
    prose = set(python_documentation())
    return [document for document in drawn if document not in prose and not is_task(document)]


def test_documents_follow_from_the_seed(drawn):
    assert documents(50, seed=1) == drawn[:50]
    assert documents(50, seed=2) != drawn[:50]
    assert all(document.strip() for document in drawn)
    assert len(set(drawn)) > 0.75 * len(drawn)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_documents_mix_languages_as_asked_for(share):
    drawn = six_languages(documents(1500, seed=2, mixed_share=share))
    mixed = sum(sum(script_share(document, script) > 0.02 for script in SCRIPTS) > 1 for document in drawn)
    # One pair of languages in fifteen shares a script.
    assert mixed / len(drawn) == pytest.approx(share * 14 / 15, abs=0.03)


def test_every_language_pythons_documentation_and_the_tasks_have_their_share(drawn):
    prose = set(python_documentation())
    assert sum(document in prose for document in drawn) / len(drawn) == pytest.approx(0.12, abs=0.02)
    assert sum(map(is_task, drawn)) / len(drawn) == pytest.approx(0.3, abs=0.03)
    languages = six_languages(drawn)
    for script, count in {"Latin": 2, "Han": 1, "Cyrillic": 1, "Hangul": 1, "Arabic": 1}.items():
        written = sum(script_share(document, script) > 0.5 for document in languages)
        assert written / len(languages) == pytest.approx(count / 6, abs=0.04)


def test_rude_and_polite_passages_are_a_modest_share_and_hold_nothing_held_out(drawn):
    labelled = tone_sentences(list(LANGUAGES))
    train, held_out = ([item.text for item in labelled if item.split == split] for split in ("train", "held_out"))
    text = "\n".join(drawn)
    assert all(any(item.text in text for item in labelled if (item.language, item.tone) == (code, tone)) for code in LANGUAGES for tone in TONES)
    assert 0.05 * len(train) < sum(line in text for line in train) < 0.6 * len(train)
    assert not [line for line in held_out if line in text]


def test_pythons_documentation_is_prose():
    paragraphs = python_documentation()
    assert len(paragraphs) > 300 and all("\n" not in paragraph and len(paragraph) > 80 for paragraph in paragraphs)


def test_mixed_prompts_change_language_after_a_held_out_sentence_and_stop_a_few_characters_later():
    prompts = mixed_prompts(5, seed=5)
    english, chinese = sentences("en", held_out=True), sentences("zh", held_out=True)
    for prompt in prompts:
        assert any(prompt == f"{first} {second[:4]}" for first in english for second in chinese)
    assert prompts == mixed_prompts(5, seed=5) != mixed_prompts(5, seed=6)
