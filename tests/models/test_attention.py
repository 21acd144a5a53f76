from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.attention import Attention, attend, causal_mask, in_blocks

SCALE = 8**-0.5


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Loops over rows, heads and queries, in double precision. Queries that see nothing are left out."""
    out = np.zeros(q.shape)
    shared = q.shape[2] // k.shape[1]
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        if seen.size:
            scores = k[b, h // shared][seen].astype(np.float64) @ q[b, t, h] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ v[b, h // shared][seen] / weights.sum()
    return out


@pytest.fixture
def operands():
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 6, 8), (2, 3, 7, 8), (2, 3, 7, 8)))
    mask = generator.random((2, 5, 7)) < 0.6
    mask[0, 2] = False
    return q, k, v, mask


def test_reference_equals_plain_loops(operands):
    q, k, v, mask = operands
    out = np.asarray(attend(*map(jnp.asarray, operands), SCALE))
    seeing = mask.any(axis=-1)
    np.testing.assert_allclose(out[seeing], plain_attention(q, k, v, mask)[seeing], atol=1e-5)


def test_a_query_that_sees_nothing_gets_a_finite_number(operands):
    assert np.isfinite(attend(*map(jnp.asarray, operands), SCALE)[0, 2]).all()


def test_hidden_keys_and_values_do_not_matter_however_large(operands):
    q, k, v, mask = operands
    mask[:, :, 4] = False
    large_k, large_v = k.copy(), v.copy()
    large_k[:, :, 4] = large_v[:, :, 4] = 1e6
    one = attend(*map(jnp.asarray, operands), SCALE)
    two = attend(jnp.asarray(q), jnp.asarray(large_k), jnp.asarray(large_v), jnp.asarray(mask), SCALE)
    seeing = mask.any(axis=-1)
    assert np.array_equal(np.asarray(one)[seeing], np.asarray(two)[seeing])


@pytest.mark.parametrize("length", [1, 64, 96, 128, 256, 300, 331])
def test_blocks_of_queries_equal_attention_to_all_keys(length):
    generator = np.random.default_rng(length)
    q, k, v = (jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in ((2, length, 4, 8), (2, 2, length, 8), (2, 2, length, 8)))
    ids = jnp.asarray(np.sort(generator.integers(0, 4, (2, length)), axis=1), jnp.int32)  # padding on the left, then three documents
    mask = causal_mask(ids, ids, jnp.int32(0))
    seeing = np.asarray(mask.any(axis=-1))
    whole, blocks = attend(q, k, v, mask, SCALE), in_blocks(partial(attend, scale=SCALE), q, k, v, mask)
    np.testing.assert_allclose(np.asarray(blocks)[seeing], np.asarray(whole)[seeing], atol=1e-6)
    assert np.isfinite(blocks).all()


def test_half_precision_takes_its_softmax_in_float32(operands):
    *arrays, mask = operands
    q, k, v = (jnp.asarray(array, jnp.bfloat16) for array in arrays)
    out = np.asarray(attend(q, k, v, jnp.asarray(mask), SCALE), np.float32)
    expected = plain_attention(np.asarray(q, np.float32), np.asarray(k, np.float32), np.asarray(v, np.float32), mask)
    seeing = mask.any(axis=-1)
    assert out.dtype == np.float32 and np.abs(out[seeing] - expected[seeing]).max() < 0.02


def test_mask_allows_the_past_of_the_same_document():
    ids = np.asarray([[0, 1, 1, 2, 2, 0]])
    mask = np.asarray(causal_mask(jnp.asarray(ids), jnp.asarray(ids), jnp.int32(0)))[0]
    assert [np.flatnonzero(row).tolist() for row in mask] == [[], [1], [1, 2], [3], [3, 4], []]


def test_a_window_ends_what_a_query_sees():
    ids = jnp.asarray([[0, 1, 1, 1, 1, 2]])
    mask = np.asarray(causal_mask(ids, ids, jnp.int32(0), 3))[0]
    assert [np.flatnonzero(row).tolist() for row in mask] == [[], [1], [1, 2], [1, 2, 3], [2, 3, 4], [5]]


def test_scores_are_capped_before_the_mask(operands):
    q, k, v, mask = operands
    seeing = mask.any(axis=-1)
    out = np.asarray(attend(*map(jnp.asarray, operands), 0.3, 0.5))
    for b, t, h in np.ndindex(*q.shape[:3]):
        if seeing[b, t]:
            scores = 0.5 * np.tanh(0.3 * (k[b, h // 2].astype(np.float64) @ q[b, t, h]) / 0.5)
            weights = np.where(mask[b, t], np.exp(scores), 0)
            np.testing.assert_allclose(out[b, t, h], weights @ v[b, h // 2] / weights.sum(), atol=1e-5)


def test_mask_of_a_continued_cache_counts_from_its_slot():
    keys = np.asarray([[0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    mask = np.asarray(causal_mask(jnp.asarray([[1], [0]]), jnp.asarray(keys), jnp.int32(3)))
    assert np.flatnonzero(mask[0, 0]).tolist() == [1, 2, 3] and not mask[1].any()


def test_each_row_may_be_at_a_slot_of_its_own():
    keys = np.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    mask = np.asarray(causal_mask(jnp.asarray([[1], [1]]), jnp.asarray(keys), jnp.asarray([3, 4]), 3))
    assert np.flatnonzero(mask[0, 0]).tolist() == [1, 2, 3] and np.flatnonzero(mask[1, 0]).tolist() == [2, 3, 4]


def test_gains_of_query_and_key_norms_are_per_channel_of_a_head(tiny_config):
    attention, without = (jax.eval_shape(lambda c=c: Attention(c, jax.random.key(0))) for c in (tiny_config(), tiny_config(qk_norm=False)))
    assert attention.q_norm.shape == attention.k_norm.shape == (12,)
    assert attention.q_proj.shape == attention.o_proj.shape[::-1] == (48, 32) and attention.k_proj.shape == attention.v_proj.shape == (24, 32)
    assert not hasattr(without, "q_norm")
