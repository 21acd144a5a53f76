from dataclasses import replace

import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.switching import find_language_features as module
from qscope_jax.features.switching.find_language_features import find_language_features
from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.features.switching.language_levels import estimate_levels
from qscope_jax.features.switching.language_sums import control_features, language_sums, rank_language_features
from qscope_jax.sae.encoder_rows import encoder_rows
from tests.features.switching.conftest import PLANTED


@pytest.fixture(scope="module")
def sums(character_model, language_saes, corpus, few):
    return language_sums(character_model, language_saes, corpus, few)


@pytest.fixture(scope="module")
def find(character_model, language_saes, corpus, few):
    def run(language: str = "zh", **settings) -> LanguageFeatures:
        return find_language_features(character_model, language_saes, corpus, language, config=few, **settings)

    return run


def test_planted_features_are_found_with_their_levels_at_every_layer(find, sums, character_model, language_saes, corpus, few):
    found = find()
    assert found.layers == (1, 2) and found.language == "zh" and found.languages == ("en", "zh", "ru")
    assert found.features_MS[:, 0].tolist() == list(PLANTED.values())
    for m, layer in enumerate(found.layers):
        ranked = rank_language_features(sums[layer], "zh", 2)
        np.testing.assert_array_equal(found.features_MS[m], ranked)
        np.testing.assert_allclose(found.scores_MS[m], sums[layer].monolinguality()[1, ranked], rtol=1e-6)
    rows = [encoder_rows(sae, features) for sae, features in zip(language_saes, found.features_MS.tolist(), strict=True)]
    alpha, tokens = estimate_levels(character_model, rows, (1, 2), corpus, few)
    np.testing.assert_array_equal(found.alpha_MKS, alpha)
    np.testing.assert_array_equal(found.tokens_K, tokens)
    assert all((ours.W_SD == theirs.W_SD).all() for ours, theirs in zip(found.rows, rows, strict=True))
    # The language's own level is above zero, those of the others below: the ceiling may be negative.
    assert (found.alpha_MKS[:, 1, 0] > 0).all() and (found.alpha_MKS[:, [0, 2], 0] < 0).all()
    assert (found.model, found.sae) == ("in memory", "made")


def test_what_the_features_did_is_kept_and_survives_a_save(find, sums, tmp_path):
    found = find(count=3)
    means = np.array(found.facts["means"])
    assert means.shape == (2, 3, 3) and found.facts["chosen"] == "monolinguality" and found.facts["languages"] == ["en", "zh", "ru"]
    for m, layer in enumerate(found.layers):
        np.testing.assert_allclose(means[m], sums[layer].means()[:, found.features_MS[m]])
        for s, other in enumerate(found.facts["runner_up"][m]):
            assert other == ("en" if means[m, 0, s] >= means[m, 2, s] else "ru")
    found.save(tmp_path / "f")
    assert LanguageFeatures.load(tmp_path / "f").facts == found.facts


def test_layers_are_read_a_few_at_a_time_and_saes_asked_for_then(character_model, language_saes, corpus, few, find, monkeypatch):
    monkeypatch.setattr(module, "LAYERS_AT_ONCE", 1)
    reported = []
    found = find_language_features(character_model, iter(language_saes), corpus, "zh", config=few, report=reported.append)
    np.testing.assert_array_equal(found.features_MS, find().features_MS)
    with pytest.raises(InputError, match="two SAEs of layer 1 are given"):
        find_language_features(character_model, iter(language_saes[:1] * 2), corpus, "zh", config=few)
    assert sum(reported) == 3 * sum(len(text) for texts in corpus.values() for text in texts)


def test_features_can_be_given_by_hand_in_any_order(find, sums):
    found = find(features={2: [7, 4, 0], 1: [9, 8, 1]})
    assert found.features_MS.tolist() == [[9, 8, 1], [7, 4, 0]] and found.facts["chosen"] == "given"
    np.testing.assert_allclose(found.scores_MS[1], sums[2].monolinguality()[1, [7, 4, 0]], rtol=1e-6)


def test_controls_are_drawn_by_their_seed(find, sums):
    found = find(random_seed=3, count=2)
    assert found.features_MS.tolist() == [control_features(sums[layer], 2, seed=3).tolist() for layer in (1, 2)]
    assert found.facts["chosen"] == "random" and found.facts["random_seed"] == 3
    assert not set(found.features_MS[:, 0].tolist()) & set(PLANTED.values())


def test_levels_can_be_measured_on_other_texts_whose_languages_are_more(find, character_model, corpus, few):
    others = {"fr": ["IJKLMNOPIJKL"], "en": corpus["en"][:2], "ru": corpus["ru"]}
    found = find(level_texts=others)
    # Texts of the language itself are not there, and are taken from where its features were found.
    assert found.languages == ("zh", "fr", "en", "ru") and found.tokens_K.tolist()[1] == 11
    alpha, _ = estimate_levels(character_model, found.rows, (1, 2), {"zh": corpus["zh"], **others}, few)
    np.testing.assert_array_equal(found.alpha_MKS, alpha)
    assert find(level_texts={"ru": corpus["ru"], "zh": corpus["zh"][:2]}).languages == ("ru", "zh")


def test_what_makes_no_sense_is_refused_in_one_line(find, character_model, language_saes, corpus, few):
    narrow = replace(language_saes[0], autoencoder=_narrow(language_saes[0].autoencoder))

    def with_saes(*saes):
        return find_language_features(character_model, saes, corpus, "zh", config=few)

    cases = [
        (InputError, "no text of language 'fr'; there are en, zh, ru", lambda: find("fr")),
        (InputError, "choose one", lambda: find(features={1: [3]}, random_seed=0)),
        (InputError, "feature 24 is out of range; the SAE of layer 1 has", lambda: find(features={1: [24], 2: [3]})),
        (InputError, "no features are given for layer 2", lambda: find(features={1: [3]})),
        (InputError, r"layers \[0, 1, 2\] are given and SAEs of layers \[1, 2\]", lambda: find(features={0: [3], 1: [3], 2: [3]})),
        (InputError, r"features \{1: \[3\], 2: \[3, 4\]\} are given; expected as many", lambda: find(features={1: [3], 2: [3, 4]})),
        (InputError, "none of them twice", lambda: find(features={1: [3, 3], 2: [3, 4]})),
        (InputError, "1 or more", lambda: find(features={1: [], 2: []})),
        (InputError, "1 or more", lambda: find(features={})),
        (InputError, "1 texts have no language", lambda: find(level_texts={"": ["abc"], "en": ["abc"]})),
        (InputError, "all texts are of language ru", lambda: find(level_texts={"ru": ["abc"]})),
        (InputError, "0 features of each layer", lambda: find(count=0)),
        (InputError, "no SAE given", lambda: with_saes()),
        (InputError, r"SAEs of layers \[1, 1\]", lambda: with_saes(language_saes[0], language_saes[0])),
        (ShapeError, "the SAE is of another model", lambda: with_saes(narrow)),
    ]
    for kind, line, call in cases:
        with pytest.raises(kind, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


def _narrow(sae):
    return type(sae)(sae.W_enc[...][:, :16], sae.W_dec[...][:, :16], sae.b_enc[...], sae.b_dec[...][:16], k=sae.k)
