import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.scoring import next_token_loss, token_divergences, token_losses

V = 11
# Two documents and padding; one document padded on the left; nothing but padding; a document of one token.
SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 2, 2, 0, 0, 0]], np.int32)
SCORED = [(0, 1), (0, 2), (0, 4), (1, 3), (1, 4), (1, 5), (3, 2)]


@pytest.fixture
def logits():
    return np.random.default_rng(0).standard_normal((*SEGMENTS.shape, V)).astype(np.float32) * 3


@pytest.fixture
def tokens():
    return np.random.default_rng(1).integers(0, V, SEGMENTS.shape).astype(np.int32)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def arrays(*found):
    return [jnp.asarray(array) for array in found]


def test_a_token_is_scored_by_what_precedes_it_in_its_own_document(logits, tokens):
    losses, mask = token_losses(*arrays(logits, tokens, SEGMENTS))
    expected = np.zeros((4, 5))
    for row, place in SCORED:
        expected[row, place - 1] = -log_softmax(logits)[row, place - 1, tokens[row, place]]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(mask, expected > 0)


def test_the_loss_is_a_sum_and_the_number_of_tokens_in_it(logits, tokens):
    total, weight = next_token_loss(*arrays(logits, tokens, SEGMENTS))
    assert total == pytest.approx(-sum(log_softmax(logits)[row, place - 1, tokens[row, place]] for row, place in SCORED), rel=1e-5)
    assert weight == len(SCORED) and weight.dtype == jnp.float32


def test_sums_of_micro_batches_are_the_sum_of_the_batch(logits, tokens):
    whole = next_token_loss(*arrays(logits, tokens, SEGMENTS))
    halves = [next_token_loss(*arrays(logits[part], tokens[part], SEGMENTS[part])) for part in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(np.sum(halves, axis=0), whole, rtol=1e-6)


def test_padding_and_first_tokens_get_no_gradient(logits, tokens):
    gradient = jax.grad(lambda x: next_token_loss(x, *arrays(tokens, SEGMENTS))[0])(jnp.asarray(logits))
    touched = np.abs(gradient).max(axis=-1) > 0
    assert [(int(row), int(place) + 1) for row, place in np.argwhere(touched)] == SCORED


def test_huge_logits_give_finite_losses(tokens):
    losses, mask = token_losses(jnp.full((*SEGMENTS.shape, V), 1e30, jnp.float32), *arrays(tokens, SEGMENTS))
    assert np.isfinite(losses).all()
    assert not token_losses(jnp.full((*SEGMENTS.shape, V), jnp.nan, jnp.float32), *arrays(tokens, SEGMENTS))[0][~np.asarray(mask)].any()


def test_the_divergence_is_from_the_reference_and_0_of_itself(logits):
    reference = np.random.default_rng(2).standard_normal(logits.shape).astype(np.float32)
    p, q = log_softmax(reference)[:, :-1], log_softmax(logits)[:, :-1]
    expected = np.zeros((4, 5))
    for row, place in SCORED:
        expected[row, place - 1] = np.sum(np.exp(p) * (p - q), axis=-1)[row, place - 1]
    np.testing.assert_allclose(token_divergences(*arrays(logits, reference, SEGMENTS)), expected, rtol=1e-4, atol=1e-6)
    assert not np.any(token_divergences(*arrays(logits, logits, SEGMENTS)))
