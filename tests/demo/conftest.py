"""A corpus of two topics, and a random model with a tokenizer that reads its sentences in a few tokens."""

from collections.abc import Callable
from dataclasses import replace

import jax
import pytest

from qscope_jax.demo import corpus, recipe
from qscope_jax.demo import tour as tour_module
from qscope_jax.demo.chapters import coverage, explain, tone
from qscope_jax.demo.corpus import LANGUAGES
from qscope_jax.demo.embedded import TinySAESettings
from qscope_jax.demo.tour import Tour, make_tour
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel

FAST = TinySAESettings(num_features=64, k=4, steps=5, batch_tokens=64)


@pytest.fixture
def small_corpus(monkeypatch) -> None:
    """The first two topics of each language stand for all twenty."""
    _two_topics(monkeypatch)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory, tiny_config) -> LanguageModel:
    """Two layers, 32 wide, with random weights."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "VOCABULARY", 2000)
        topics = [topic for language in LANGUAGES for topic in corpus.topics(language)[:2]]
        recipe.make_tokenizer(folder, [line for topic in topics for line in topic.train + topic.held_out])
    config = tiny_config(layers=2, vocab_size=2000, eos_token_ids=(0,))
    return LanguageModel(jax.jit(lambda key: Decoder(config, key))(jax.random.key(0)), tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="session")
def shrink(small_model) -> Callable[[pytest.MonkeyPatch], Tour]:
    """Makes the tour of the small model, with a training of five steps and few sentences a chapter, for as long as the patch lasts."""

    def make(patch: pytest.MonkeyPatch) -> Tour:
        _two_topics(patch)
        patch.setattr(tour_module, "tiny_model", lambda: small_model)
        patch.setattr(tone, "TRAIN", 20)
        patch.setattr(tone, "HELD_OUT", 8)
        patch.setattr(coverage, "TARGETS", 6)
        # Of a random dictionary any feature will do.
        patch.setattr(coverage, "HIGHEST_RATE", 1.0)
        patch.setattr(coverage, "CONFIG", replace(coverage.CONFIG, attempts=2, attempts_uncovered=3))
        patch.setattr(explain, "TONE_SENTENCES", 4)
        return make_tour(None, FAST)

    return make


@pytest.fixture
def tour(shrink, monkeypatch) -> Tour:
    """The tour of the small model."""
    return shrink(monkeypatch)


def _two_topics(patch: pytest.MonkeyPatch) -> None:
    every = corpus.topics
    patch.setattr(corpus, "topics", lambda language: every(language)[:2])
