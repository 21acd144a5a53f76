import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.decoder import Decoder
from qscope_jax.training.losses import head_losses, predicted_mask, token_logprobs

B, T = 2, 6
TOKENS = jnp.array([[4, 8, 15, 16, 23, 42], [7, 7, 1, 2, 3, 0]], jnp.int32)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]], jnp.int32)
TRAINED = jnp.array([[0, 1, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1]], bool)


@pytest.fixture(scope="module")
def decoder(tiny_config):
    return jax.jit(lambda key: Decoder(tiny_config(1).unrolled(), key))(jax.random.key(0))


@pytest.fixture(scope="module")
def stream(decoder):
    return jax.random.normal(jax.random.key(1), (B, T, decoder.config.d_model))


def by_hand(decoder, stream, unwanted=()):
    """Both losses of every position in double precision."""
    logits = np.asarray(decoder.unembed(stream), np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    targets = np.pad(np.asarray(TOKENS)[:, 1:], ((0, 0), (0, 1)))
    picked = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    return -np.log(picked), -np.log(1 - p[..., list(unwanted)].sum(-1))


def test_a_position_predicts_where_its_next_token_is_an_answer_of_the_same_document():
    expected = [[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]]
    np.testing.assert_array_equal(predicted_mask(TRAINED, SEGMENTS), np.array(expected, bool))


@pytest.mark.parametrize("chunk", [0, 2, 3, 6])
def test_losses_equal_a_computation_in_double_precision_whatever_the_chunk(decoder, stream, chunk):
    predicted = predicted_mask(TRAINED, SEGMENTS)
    unwanted = jnp.isin(jnp.arange(97), jnp.array((3, 16, 50)))
    found = jax.jit(head_losses, static_argnames="chunk")(decoder, stream, TOKENS, predicted, unwanted, chunk=chunk)
    cross_entropy, penalty = by_hand(decoder, stream, (3, 16, 50))
    np.testing.assert_allclose(found.cross_entropy_BT, np.where(predicted, cross_entropy, 0), rtol=1e-5)
    np.testing.assert_allclose(found.penalty_BT, np.where(predicted, penalty, 0), rtol=1e-4)


def test_chunks_give_the_gradient_of_the_whole(decoder, stream):
    def loss(stream, chunk):
        found = head_losses(decoder, stream, TOKENS, predicted_mask(TRAINED, SEGMENTS), chunk=chunk)
        return jnp.sum(found.cross_entropy_BT)

    whole, parts = (jax.jit(jax.grad(loss), static_argnums=1)(stream, chunk) for chunk in (0, 2))
    np.testing.assert_allclose(parts, whole, atol=1e-6 * float(jnp.abs(whole).max()))


def test_tokens_that_take_all_probability_give_a_finite_penalty_and_gradient(decoder, stream):
    """1 - p_L rounds to 0 there; the loss must not."""
    unwanted = jnp.arange(97) != 11  # one token is wanted

    def loss(stream):
        return jnp.sum(head_losses(decoder, 1e4 * stream, TOKENS, jnp.ones((B, T), bool), unwanted).penalty_BT)

    value, gradient = jax.jit(jax.value_and_grad(loss))(stream)
    assert np.isfinite(value) and np.isfinite(gradient).all() and value > 0


@pytest.mark.parametrize("chunk", [0, 2])
def test_logprobs_and_entropy_are_those_of_the_distribution_at_the_temperature(decoder, stream, chunk):
    predicted = predicted_mask(TRAINED, SEGMENTS)
    logp, entropy = jax.jit(token_logprobs, static_argnames=("temperature", "chunk"))(
        decoder, stream, TOKENS, predicted, temperature=0.5, chunk=chunk
    )
    scaled = 2 * np.asarray(decoder.unembed(stream), np.float64)
    expected = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    targets = np.pad(np.asarray(TOKENS)[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(logp, np.where(predicted, np.take_along_axis(expected, targets[..., None], -1)[..., 0], 0), rtol=1e-5)
    np.testing.assert_allclose(entropy, np.where(predicted, -(np.exp(expected) * expected).sum(-1), 0), rtol=1e-5)
