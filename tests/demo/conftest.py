"""A corpus of two topics, and a random model with a tokenizer that reads its sentences in a few tokens."""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest

from qscope_jax.demo import corpus, recipe
from qscope_jax.demo import tour as tour_module
from qscope_jax.demo.chapters import coverage, explain, switching, tone
from qscope_jax.demo.corpus import LANGUAGES
from qscope_jax.demo.dapo_study import Study as DAPOStudy
from qscope_jax.demo.embedded import TinySAESettings
from qscope_jax.demo.switching_study import Study
from qscope_jax.demo.tour import Tour, make_tour
from qscope_jax.features.repetition.repetition_features import RepetitionFeatures
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.models.sampling import SamplingConfig
from qscope_jax.training.dapo.dapo_config import DAPOConfig
from qscope_jax.training.sft import SFTConfig

SMALL_STUDY = Study(
    training=SFTConfig(steps=2, batch_size=4, length=64, remat=False), sampling=SamplingConfig(max_new_tokens=4, temperature=1.0), conversations=30,
    clean=6, questions=5, samples=2,
)  # fmt: skip
SMALL_DAPO = DAPOStudy(
    cold_start=SFTConfig(steps=2, batch_size=4, length=64, remat=False), conversations=20,
    training=DAPOConfig(
        steps=3, num_prompts=2, num_generations=3, max_prompt_length=32, max_completion_length=4, learning_rate=0.01, warmup_steps=0, remat=False
    ),
    prompts=8, held_out=3, samples=2, measure_every=2, probes=4,
)  # fmt: skip
FAST = TinySAESettings(num_features=64, k=4, steps=5, batch_tokens=64)


def some_repetition_features() -> RepetitionFeatures:
    """Two features of each of two layers."""
    ones = np.ones((2, 2))
    return RepetitionFeatures((0, 1), np.array([[3, 5], [7, 1]]), ones, ones, ones, ones, ones, 1, 0, 1)


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
        patch.setattr(switching, "STUDY", SMALL_STUDY)
        return make_tour(None, FAST)

    return make


@pytest.fixture
def tour(shrink, monkeypatch) -> Tour:
    """The tour of the small model."""
    return shrink(monkeypatch)


def _two_topics(patch: pytest.MonkeyPatch) -> None:
    every = corpus.topics
    patch.setattr(corpus, "topics", lambda language: every(language)[:2])
