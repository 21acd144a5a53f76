from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.encoder_rows import EncoderRows
from qscope_jax.training.auxiliary import Auxiliary, Batch, FeatureCeiling, ScriptPenalty

# Three languages; 2 is held down. Row 0 packs a conversation in language 0 and one in 2, row 1 holds one in language 1 and padding.
BATCH = Batch(
    tokens_BT=jnp.array([[1, 2, 3, 4], [5, 6, 7, 0]], jnp.int32),
    segment_ids=jnp.array([[1, 1, 2, 2], [1, 1, 1, 0]], jnp.int32),
    trained_BT=jnp.array([[False, True, True, True], [False, True, True, True]]),
    languages_BT=jnp.array([[0, 0, 2, 2], [1, 1, 1, -1]], jnp.int32),
)
W = np.array([[[1.0, 0.0], [0.0, 2.0]], [[-1.0, 1.0], [0.5, 0.0]]])
BIAS = np.array([[0.5, -1.0], [0.0, 0.25]])
ALPHA = np.array([[[0.0, -0.5], [1.0, 0.5], [9.0, 9.0]], [[-1.0, 0.0], [0.5, -0.25], [9.0, 9.0]]])
X = np.random.default_rng(0).standard_normal((2, 2, 4, 2))


@pytest.fixture
def ceiling():
    rows = tuple(EncoderRows(jnp.asarray(w, jnp.float32), jnp.asarray(b, jnp.float32)) for w, b in zip(W, BIAS, strict=True))
    return FeatureCeiling(rows, jnp.asarray(ALPHA, jnp.float32), jnp.int32(2), layers=(3, 5), weight=0.1)


def streams(x=X):
    return [jnp.asarray(layer, jnp.float32) for layer in x]


def by_hand(places, language_of, sign=1.0, alpha=ALPHA):
    """Sum over layers, the given places and features of relu(sign * (f - alpha))."""
    total = 0.0
    for layer in range(2):
        for row, place in places:
            f = W[layer] @ X[layer, row, place] + BIAS[layer]
            total += np.maximum(sign * (f - alpha[layer, language_of[row, place]]), 0).sum()
    return total


NOTHING = jnp.zeros((2, 4))


def test_the_paper_s_form_sums_over_features_and_counts_answer_tokens_of_other_languages(ceiling):
    places = [(0, 1), (1, 1), (1, 2)]  # not the question, not language 2, not padding
    assert ceiling.count(BATCH) == 3
    np.testing.assert_allclose(ceiling.total(streams(), NOTHING, BATCH), by_hand(places, np.asarray(BATCH.languages_BT)), rtol=1e-6)


def test_the_code_s_form_divides_each_layer_by_all_answer_tokens_times_features_plus_one(ceiling):
    found = replace(ceiling, form="code").total(streams(), NOTHING, BATCH)
    expected = by_hand([(0, 1), (1, 1), (1, 2)], np.asarray(BATCH.languages_BT)) / (5 * 2 + 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert replace(ceiling, form="code").count(BATCH) == 1


def test_raising_lifts_features_to_their_level_on_answers_in_their_own_language(ceiling):
    raising = replace(ceiling, aim="raise")
    assert raising.count(BATCH) == 2
    found = raising.total(streams(), NOTHING, BATCH)
    np.testing.assert_allclose(found, by_hand([(0, 2), (0, 3)], np.asarray(BATCH.languages_BT), sign=-1.0), rtol=1e-6)


def test_the_gradient_reaches_the_streams_at_counted_tokens_and_nothing_of_the_sae(ceiling):
    def loss(rows, alpha_MKS, x):
        return replace(ceiling, rows=rows, alpha_MKS=alpha_MKS).total(x, NOTHING, BATCH)

    to_rows, to_alpha, to_streams = jax.grad(loss, argnums=(0, 1, 2))(ceiling.rows, ceiling.alpha_MKS, streams())
    assert not any(np.any(leaf) for leaf in (*jax.tree.leaves(to_rows), to_alpha))
    for layer, gradient in enumerate(to_streams):
        expected = np.zeros((2, 4, 2))
        for row, place in [(0, 1), (1, 1), (1, 2)]:
            over = W[layer] @ X[layer, row, place] + BIAS[layer] > ALPHA[layer, BATCH.languages_BT[row, place]]
            expected[row, place] = over @ W[layer]
        np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_a_batch_without_answer_tokens_counts_nothing_and_sums_to_zero(ceiling):
    silent = replace(BATCH, trained_BT=jnp.zeros((2, 4), bool))
    for form in ("paper", "code"):
        loss = replace(ceiling, form=form)
        assert loss.total(streams(), NOTHING, silent) == 0
    assert ceiling.count(silent) == 0


def test_the_penalty_counts_predicted_tokens_of_other_languages():
    penalty = ScriptPenalty(jnp.arange(9) > 6, jnp.int32(2), 0.5)
    given = jnp.arange(8.0).reshape(2, 4)
    # Positions that predict an answer token of their conversation: (0, 0), (0, 2), (1, 0), (1, 1); (0, 2) is in language 2.
    assert penalty.count(BATCH) == 3
    assert penalty.total([], given, BATCH) == 0 + 4 + 5


def test_both_are_auxiliary_losses(ceiling):
    assert isinstance(ceiling, Auxiliary) and isinstance(ScriptPenalty(jnp.arange(9) > 6, jnp.int32(2), 0.5), Auxiliary)
