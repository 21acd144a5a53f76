from dataclasses import replace

import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.switching.language_corpus import CorpusConfig, check_corpus, check_tokens, corpus_batches


def rows_of(model, corpus, config) -> list[tuple[int, str]]:
    """Every row of every batch that is not there to fill it up: its language and its text."""
    found = []
    for batch in corpus_batches(model, corpus, config):
        lengths = (batch.tokens.segment_ids_BT > 0).sum(axis=1)
        assert ((lengths > 0) == (batch.languages_B >= 0)).all()
        for row, language in enumerate(batch.languages_B.tolist()):
            if language >= 0:
                found.append((language, model.tokenizer.decode(batch.tokens.tokens_BT[row, : lengths[row]].tolist())))
    return found


def test_every_text_comes_once_with_its_language(character_model, corpus, few):
    expected = [(place, text) for place, texts in enumerate(corpus.values()) for text in texts]
    assert sorted(rows_of(character_model, corpus, few)) == sorted(expected)


def test_a_length_has_one_shape_whatever_the_languages_and_stays_within_the_tokens_of_a_pass(character_model, few):
    corpus = {"a": ["x" * 12] * 50, "b": ["y" * 9, "z" * 40], "c": ["w" * 14] * 30}
    shapes = [batch.tokens.tokens_BT.shape for batch in corpus_batches(character_model, corpus, replace(few, batch_tokens=400))]
    assert shapes == [(24, 16)] * 4 + [(8, 48)]
    languages = [set(batch.languages_B.tolist()) for batch in corpus_batches(character_model, corpus, replace(few, batch_tokens=400))]
    assert any({0, 2} <= found for found in languages)
    assert [batch.tokens.tokens_BT.shape for batch in corpus_batches(character_model, {"a": ["x" * 30], "b": ["y" * 30]}, few)] == [(8, 32)]


def test_long_texts_are_cut_to_max_tokens_and_to_the_models_positions(character_model, few):
    corpus = {"a": ["x" * 2000], "b": ["y" * 30]}
    assert {len(text) for _, text in rows_of(character_model, corpus, replace(few, max_tokens=25))} == {25}
    assert {len(text) for _, text in rows_of(character_model, corpus, replace(few, max_tokens=5000))} == {30, 1024}


def test_a_language_whose_texts_are_too_short_is_refused_before_anything_is_read(character_model):
    corpus = {"a": ["x" * 30] * 40, "b": ["y"] * 5000}
    with pytest.raises(InputError, match="language b has 0 tokens that count, fewer than 1,000"):
        next(corpus_batches(character_model, corpus, CorpusConfig()))
    with pytest.raises(InputError, match="language b has 999 tokens that count"):
        check_tokens(["a", "b", "c"], np.array([1000, 999, 3]), CorpusConfig())


def test_unlabelled_texts_and_a_language_alone_are_refused():
    cases = [
        ({"en": ["a"], "": ["b", "c"]}, None, "2 texts have no language; label them or leave them out"),
        ({"en": ["a"], " ": ["b"]}, None, "1 texts have no language"),
        ({"zh": ["a"]}, "zh", "all texts are of language zh; texts of other languages are needed as well"),
        ({}, None, "all texts are of language none"),
        ({"en": ["a"], "ru": ["b"]}, "zh", "no text of language 'zh'; there are en, ru"),
    ]
    for corpus, language, line in cases:
        with pytest.raises(InputError, match=line):
            check_corpus(corpus, language)


@pytest.mark.parametrize(("name", "value"), [("max_norm_multiple", -1.0), ("max_tokens", 1), ("batch_tokens", 0), ("min_tokens", 0)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}, expected"):
        CorpusConfig(**{name: value})
