import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.filtering import median_norm, ordinary_tokens

# Two packed documents and padding on the right; one document after padding on the left.
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]], jnp.int32)


def streams(norms) -> jnp.ndarray:
    """Streams of width 2 with the given norms."""
    norms = jnp.asarray(norms, jnp.float32)
    return jnp.stack([0.6 * norms, -0.8 * norms], axis=-1)


def test_padding_and_the_first_token_of_every_document_do_not_count():
    mask = ordinary_tokens(streams(jnp.ones((2, 6))), SEGMENTS)
    np.testing.assert_array_equal(mask, [[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]])


def test_first_tokens_count_when_they_are_asked_for():
    mask = ordinary_tokens(streams(jnp.ones((2, 6))), SEGMENTS, drop_first=False)
    np.testing.assert_array_equal(mask, SEGMENTS > 0)


def test_tokens_above_the_multiple_of_the_median_do_not_count():
    norms = np.ones((2, 6))
    norms[0, 1], norms[1, 3], norms[0, 4] = 10, 10.01, 1000
    mask = ordinary_tokens(streams(norms), SEGMENTS)
    np.testing.assert_array_equal(mask, [[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]])
    every = ordinary_tokens(streams(norms), SEGMENTS, max_norm_multiple=0.0)
    np.testing.assert_array_equal(every, ordinary_tokens(streams(np.ones((2, 6))), SEGMENTS))
    assert ordinary_tokens(streams(norms), SEGMENTS, max_norm_multiple=2000.0).sum() == 6


@pytest.mark.parametrize("padding", [0.0, 1e6])
def test_padding_does_not_move_the_median(padding):
    segments = jnp.asarray([[1, 1, 1, 0, 0, 0, 0, 0]], jnp.int32)
    norms = jnp.full((1, 8), padding, jnp.float32).at[0, :3].set(jnp.asarray([1, 9, 11], jnp.float32) / 9)
    assert median_norm(norms, segments > 0) == 1
    np.testing.assert_array_equal(ordinary_tokens(streams(norms), segments, max_norm_multiple=1.1), [[0, 1, 0, 0, 0, 0, 0, 0]])


def test_the_median_is_that_of_numpy_and_0_of_nothing():
    norms = np.random.default_rng(0).uniform(1, 5, (2, 6)).astype(np.float32)
    mask = np.asarray(SEGMENTS) > 0
    assert median_norm(jnp.asarray(norms), jnp.asarray(mask)) == pytest.approx(np.median(norms[mask]))
    assert median_norm(jnp.asarray(norms), jnp.zeros((2, 6), bool)) == 0


def test_a_batch_of_padding_counts_nothing():
    assert not ordinary_tokens(streams(jnp.ones((2, 6))), jnp.zeros((2, 6), jnp.int32)).any()


def test_norms_of_a_narrow_dtype_do_not_overflow():
    x = streams(jnp.full((2, 6), 40000.0)).astype(jnp.float16)
    assert ordinary_tokens(x, SEGMENTS).sum() == 6
