from dataclasses import replace

import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.switching.language_sums import LanguageSums, control_features, language_sums, rank_language_features
from tests.features.switching.conftest import PLANTED


def activations(model, sae, text: str) -> np.ndarray:
    """Top-k activations of every token but the first, in float64, by a plain computation."""
    inner = sae.autoencoder
    W, b, b_dec = (np.asarray(array[...], np.float64) for array in (inner.W_enc, inner.b_enc, inner.b_dec))
    x = np.asarray(model.residuals([text], [sae.layer]).values[0, 0, 1 : len(text)], np.float64)
    z = (x - b_dec if inner.apply_b_dec_to_input else x) @ W.T + b
    kept = np.zeros_like(z)
    order = np.argsort(-z, axis=1)[:, : inner.k]
    np.put_along_axis(kept, order, np.maximum(np.take_along_axis(z, order, axis=1), 0), axis=1)
    return kept


@pytest.fixture(scope="module")
def sums(character_model, language_saes, corpus, few):
    return language_sums(character_model, language_saes, corpus, few)


@pytest.fixture
def made() -> LanguageSums:
    """Means of 12 features on three languages: feature 1 is Chinese, feature 2 less so, 3 is dead, the others are alike everywhere but one."""
    means = np.ones((3, 12)) * np.arange(1, 13)
    means[:, 1], means[:, 2], means[:, 3] = [0, 9, 0], [1, 4, 2], 0
    means[0, 7:] += 3
    tokens = np.array([10, 20, 40])
    return LanguageSums(4, ("en", "zh", "ru"), means * tokens[:, None], (means > 0) * tokens[:, None], tokens)


def test_sums_over_batches_equal_a_plain_computation_text_by_text(sums, character_model, language_saes, corpus):
    for sae in language_saes:
        found = sums[sae.layer]
        for place, (code, texts) in enumerate(corpus.items()):
            parts = [activations(character_model, sae, text)[[c != "~" for c in text[1:]]] for text in texts]
            every = np.concatenate(parts)
            assert found.tokens_K[place] == len(every) and found.languages[place] == code
            np.testing.assert_allclose(found.sums_KF[place], every.sum(axis=0), rtol=1e-4, atol=1e-2)
            np.testing.assert_array_equal(found.fires_KF[place], (every > 0).sum(axis=0))


def test_the_planted_feature_ranks_first_with_its_monolinguality(sums, character_model, language_saes, corpus):
    for sae in language_saes:
        own = PLANTED[sae.layer]
        ranked = rank_language_features(sums[sae.layer], "zh", 3)
        mu = {code: np.concatenate([activations(character_model, sae, text)[[c != "~" for c in text[1:]]] for text in texts]).mean(axis=0)
              for code, texts in corpus.items()}  # fmt: skip
        nu = mu["zh"] - (mu["en"] + mu["ru"]) / 2
        assert ranked[0] == own and ranked.tolist() == np.argsort(-nu)[:3].tolist()
        np.testing.assert_allclose(sums[sae.layer].monolinguality()[1], nu, rtol=1e-4, atol=1e-3)


def test_monolinguality_weighs_languages_equally_and_tokens_within_them():
    # The example of the specification: A = [4, 0, 2], B = [1], C = [0, 0, 0, 2]; pooling B and C would give 1.4 for A.
    sums = LanguageSums(0, ("A", "B", "C"), np.array([[6.0], [1.0], [2.0]]), np.ones((3, 1), np.int64), np.array([3, 1, 4]))
    np.testing.assert_allclose(sums.monolinguality()[:, 0], [1.25, -0.25, -1.0])


def test_outliers_of_the_norm_count_on_request(character_model, language_saes, corpus, few, sums):
    every = language_sums(character_model, language_saes, corpus, replace(few, max_norm_multiple=0.0))
    assert (every[1].tokens_K - sums[1].tokens_K).tolist() == [1, 0, 0]


def test_features_rank_highest_first_and_only_those_of_the_language(made):
    assert rank_language_features(made, "zh", 2).tolist() == [1, 2]
    assert rank_language_features(made, "en", 5).tolist() == [7, 8, 9, 10, 11]
    with pytest.raises(InputError, match="6 features of language en at layer 4: 5 are more active on it"):
        rank_language_features(made, "en", 6)


def test_controls_are_alive_belong_to_no_language_and_follow_the_seed(made):
    draws = [control_features(made, 4, seed=seed).tolist() for seed in range(5)]
    assert all(set(draw) == {0, 4, 5, 6} for draw in draws) and len({tuple(draw) for draw in draws}) > 1
    assert control_features(made, 4, seed=3).tolist() == draws[3]
    assert control_features(replace(made, layer=5), 4, seed=3).tolist() != draws[3]
    assert control_features(made, 1).tolist()[0] in {0, 4, 5, 6}
    with pytest.raises(InputError, match="11 random features at layer 4: 10 fire on every language"):
        control_features(made, 11)


def test_what_cannot_be_summed_is_refused_in_one_line(character_model, language_saes, corpus, few):
    narrow = replace(language_saes[0], autoencoder=_narrow(language_saes[0].autoencoder))
    cases = [
        (ShapeError, "made: reads residual streams 16 wide, but in memory has width 32", [narrow], corpus),
        (InputError, r"SAEs of layers \[1, 1\]", [language_saes[0]] * 2, corpus),
        (InputError, r"SAEs of layers \[\]", [], corpus),
        (InputError, "layer 3 is out of range", [replace(language_saes[0], layer=3)], corpus),
        (InputError, "2 texts have no language", language_saes, {"": ["ab", "cd"], **corpus}),
        (InputError, "all texts are of language zh", language_saes, {"zh": corpus["zh"]}),
        (InputError, "fr has 3 tokens that count, fewer than 10; give more texts or lower min_tokens", language_saes, {"fr": ["abcd"], **corpus}),
        (InputError, "language fr has 8 tokens that count", language_saes, {"fr": ["a~~bcdefghi"], **corpus}),
        (InputError, "text 1 is empty", language_saes, {"fr": ["abcd", ""], **corpus}),
    ]  # fmt: skip
    for kind, line, given, texts in cases:
        with pytest.raises(kind, match=line) as caught:
            language_sums(character_model, given, texts, few)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no text of language 'fr'; there are en, zh, ru"):
        rank_language_features(language_sums(character_model, language_saes, corpus, few)[1], "fr", 1)


def _narrow(sae):
    return type(sae)(sae.W_enc[...][:, :16], sae.W_dec[...][:, :16], sae.b_enc[...], sae.b_dec[...][:16], k=sae.k)
