"""The forms of the delta rule agree with each other and with documents run alone; the convolution with numpy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.delta_net import chunked_delta_rule, delta_rule, short_convolution

B, G, J, K, V = 2, 2, 3, 8, 12


def operands(length: int, seed: int = 0, decay: float = 1.0) -> tuple[jax.Array, ...]:
    """Unit keys, values, decays and strengths such as a layer makes."""
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((B, length, G, K)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g, beta = -decay * rng.exponential(size=(B, length, G, J)), rng.random((B, length, G, J))
    arrays = (q, k, rng.standard_normal((B, length, G, J, V)), g, beta, rng.standard_normal((B, G, J, K, V)))
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def by_hand(q, k, v, g, beta, memory, documents) -> tuple[np.ndarray, np.ndarray]:
    """Head by head and token by token, in double precision."""
    q, k, v, g, beta, memory = (np.array(x, np.float64) for x in (q, k, v, g, beta, memory))
    out = np.zeros(v.shape)
    for b, h, j in np.ndindex(B, G, J):
        state, current = memory[b, h, j], 0
        for t in range(q.shape[1]):
            state = np.exp(g[b, t, h, j]) * (state if documents[b, t] == current else 0 * state)
            current = documents[b, t]
            state = state + np.outer(k[b, t, h], beta[b, t, h, j] * (v[b, t, h, j] - state.T @ k[b, t, h]))
            out[b, t, h, j] = state.T @ q[b, t, h]
        memory[b, h, j] = state
    return out, memory


def packed(length: int) -> np.ndarray:
    """Documents that begin off the chunks' boundaries; the first row's first goes on from the memory."""
    documents = np.zeros((B, length), np.int32)
    documents[0, length // 3 :] = 1
    documents[0, length // 3 + 1 :] = 2
    documents[1] = 1
    documents[1, -3:] = 2
    return documents


def assert_near(got, expected, tolerance=1e-5):
    for one, two in zip(got, expected, strict=True):
        assert np.abs(np.asarray(one) - two).max() <= tolerance * max(np.abs(two).max(), 1)


@pytest.mark.parametrize("length", [1, 5, 37, 150])
def test_the_reference_form_is_the_formula(length):
    arrays, documents = operands(length), packed(max(length, 4))[:, :length]
    assert_near(delta_rule(*arrays, jnp.asarray(documents)), by_hand(*arrays, documents))


@pytest.mark.parametrize("chunk", [4, 16, 32, 64])
@pytest.mark.parametrize("length", [7, 64, 101])
@pytest.mark.parametrize("decay", [0.0, 0.3, 40.0])
def test_chunks_of_any_size_give_what_single_tokens_give(chunk, length, decay):
    arrays, documents = operands(length, decay=decay), jnp.asarray(packed(length))
    expected = delta_rule(*arrays, documents)
    assert_near(jax.jit(chunked_delta_rule, static_argnames="chunk")(*arrays, documents, chunk=chunk), [np.asarray(x) for x in expected], 1e-4)


def test_both_forms_have_the_same_gradients():
    arrays, documents = operands(23), jnp.asarray(packed(23))

    def gradients(rule, **settings):
        def loss(*arrays):
            out, memory = rule(*arrays, documents, **settings)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(memory))

        return jax.jit(jax.grad(loss, argnums=range(6)))(*arrays)

    assert_near(gradients(chunked_delta_rule, chunk=8), [np.asarray(x) for x in gradients(delta_rule)], 1e-4)


def test_padding_leaves_the_memory_as_it_is():
    q, k, v, _, _, memory = operands(9)
    zero = jnp.zeros((B, 9, G, J))
    for rule in (delta_rule, chunked_delta_rule):
        np.testing.assert_array_equal(rule(q, k, v, zero, zero, memory, jnp.zeros((B, 9), jnp.int32))[1], memory)


def test_a_convolution_sees_its_own_document_and_what_the_cache_held():
    rng = np.random.default_rng(0)
    x, weight, before = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 6, 5), (5, 1, 4), (1, 3, 5)))
    ids = np.array([[0, 1, 1, 1, 1, 2, 2, 2, 2]], np.int32)  # the first three are the cache's: padding, then two tokens of document 1
    got, kept = short_convolution(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(before), jnp.asarray(ids))
    seen, total = np.concatenate([before, x], axis=1), np.zeros((1, 6, 5))
    for t in range(6):
        for tap in range(4):
            total[0, t] += weight[:, 0, tap] * seen[0, t + tap] * (ids[0, t + tap] == ids[0, t + 3])
    np.testing.assert_allclose(got, total / (1 + np.exp(-total)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(kept, seen[:, -3:])
