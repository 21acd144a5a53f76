from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.switching.language_levels import estimate_levels
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.encoder_rows import EncoderRows, encoder_rows

FEATURES = [9, 0, 4]


@pytest.fixture(scope="module")
def rows(language_saes):
    return [encoder_rows(sae, FEATURES) for sae in language_saes]


@pytest.fixture(scope="module")
def measured(character_model, rows, corpus, few):
    return estimate_levels(character_model, rows, [1, 2], corpus, few)


def expected_levels(model, sae, texts, *, outliers: bool = False) -> tuple[np.ndarray, int]:
    """Mean pre-activation over all tokens but first ones (and `~`), in float64, text by text."""
    inner = sae.autoencoder
    W, b, b_dec = (np.asarray(array[...], np.float64) for array in (inner.W_enc, inner.b_enc, inner.b_dec))
    parts = []
    for text in texts:
        x = np.asarray(model.residuals([text], [sae.layer]).values[0, 0, 1 : len(text)], np.float64)
        z = (x - b_dec if inner.apply_b_dec_to_input else x) @ W.T + b
        parts.append(z[[outliers or character != "~" for character in text[1:]]])
    return np.concatenate(parts)[:, FEATURES].mean(axis=0), sum(map(len, parts))


def test_levels_are_token_weighted_means_of_pre_activations(measured, character_model, language_saes, corpus):
    alpha, tokens = measured
    assert alpha.shape == (2, 3, 3) and alpha.dtype == np.float32 and alpha.min() < 0
    for m, sae in enumerate(language_saes):
        for place, texts in enumerate(corpus.values()):
            expected, count = expected_levels(character_model, sae, texts)
            np.testing.assert_allclose(alpha[m, place], expected, rtol=1e-4, atol=1e-3)
            assert tokens[place] == count


def test_outliers_of_the_norm_count_on_request(measured, character_model, rows, language_saes, corpus, few):
    alpha, tokens = estimate_levels(character_model, rows, [1, 2], corpus, replace(few, max_norm_multiple=0.0))
    assert (tokens - measured[1]).tolist() == [1, 0, 0]
    expected, _ = expected_levels(character_model, language_saes[0], corpus["en"], outliers=True)
    np.testing.assert_allclose(alpha[0, 0], expected, rtol=1e-4, atol=1e-3)
    assert np.abs(alpha[0, 0] - measured[0][0, 0]).max() > 1


def test_a_token_counts_if_it_counts_at_every_layer(character_model, rows, corpus, few):
    _, tokens = estimate_levels(character_model, rows, [1, 2], corpus, replace(few, max_norm_multiple=1.1, min_tokens=1))
    kept = {"each": [], "both": []}
    for texts in corpus.values():
        norms = [[np.linalg.norm(character_model.residuals([text], [layer]).values[0, 0, : len(text)], axis=1) for text in texts] for layer in (1, 2)]
        masks = [np.concatenate([(norm <= 1.1 * np.median(norm))[1:] for norm in one]) for one in norms]
        kept["each"].append([int(mask.sum()) for mask in masks])
        kept["both"].append(int((masks[0] & masks[1]).sum()))
    assert tokens.tolist() == kept["both"] and all(both < min(each) for both, each in zip(kept["both"], kept["each"], strict=True))


def test_batches_of_any_size_and_any_order_of_layers_measure_the_same(measured, character_model, rows, corpus, few):
    alpha, tokens = estimate_levels(character_model, rows[::-1], [2, 1], corpus, replace(few, batch_tokens=8000))
    np.testing.assert_allclose(alpha[::-1], measured[0], rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(tokens, measured[1])


def test_rows_of_token_ids_are_read_as_texts_are(measured, character_model, rows, corpus, few):
    ids = {code: [np.array(row, np.int32) for row in character_model.tokenize(texts)] for code, texts in corpus.items()}
    np.testing.assert_array_equal(estimate_levels(character_model, rows, [1, 2], ids, few)[0], measured[0])


def test_no_more_than_max_tokens_of_a_text_are_read(character_model, rows, corpus, few):
    short, tokens = estimate_levels(character_model, rows, [1, 2], corpus, replace(few, max_tokens=7, min_tokens=1))
    cut = {code: [text[:7] for text in texts] for code, texts in corpus.items()}
    whole, same = estimate_levels(character_model, rows, [1, 2], cut, replace(few, min_tokens=1))
    np.testing.assert_allclose(short, whole, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(tokens, same)


def test_another_corpus_of_the_same_lengths_compiles_nothing(measured, character_model, rows, corpus, few, count_compilations):
    swapped = {code: [text[::-1] for text in texts] for code, texts in corpus.items()}
    reported = []
    with count_compilations() as compiled:
        estimate_levels(character_model, rows, [1, 2], swapped, few, report=reported.append)
    assert compiled.count == 0 and sum(reported) == sum(len(text) for texts in corpus.values() for text in texts)


def test_what_cannot_be_measured_is_refused_in_one_line(character_model, rows, corpus, few):
    narrow = EncoderRows(rows[0].W_SD[:, :16], rows[0].b_S)
    fewer = EncoderRows(rows[0].W_SD[:2], rows[0].b_S[:2])
    cases = [
        (ShapeError, r"layer 1 have shape \[3, 16\], expected \[3, 32\] for in memory; they are of another SAE", [narrow, rows[1]], [1, 2], corpus),
        (ShapeError, r"layer 2 have shape \[2, 32\], expected \[3, 32\]", [rows[0], fewer], [1, 2], corpus),
        (InputError, r"2 sets of encoder rows for layers \[1\]", rows, [1], corpus),
        (InputError, r"for layers \[1, 1\]", rows, [1, 1], corpus),
        (InputError, "layer 3 is out of range", rows, [1, 3], corpus),
        (InputError, "language fr has 3 tokens that count", rows, [1, 2], {"fr": ["abcd"], **corpus}),
        (InputError, "row 1 of token ids is empty", rows, [1, 2], {"fr": [[3, 4], []], **corpus}),
    ]
    for kind, line, given, layers, texts in cases:
        with pytest.raises(kind, match=line) as caught:
            estimate_levels(character_model, given, layers, texts, few)
        assert "\n" not in str(caught.value)


def test_a_model_whose_streams_overflow_is_refused(character_model, rows, corpus, few):
    decoder = character_model.decoder
    broken = LanguageModel(decoder, tokenizer=character_model.tokenizer)
    infinite = [EncoderRows(one.W_SD.at[0].set(jnp.inf), one.b_S) for one in rows]
    with pytest.raises(InputError, match="in memory: pre-activations on language en are not finite"):
        estimate_levels(broken, infinite, [1, 2], corpus, few)
