import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.models.linear import linear
from qscope_jax.models.low_rank import LowRank


def weight(dtype="float32"):
    base, A, B = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate(((6, 8), (2, 8), (6, 2))))
    return LowRank(base.astype(dtype), A, B, 0.5)


X = jax.random.normal(jax.random.key(9), (3, 8))


def test_both_parts_give_what_the_one_matrix_gives():
    expected = np.asarray(X, np.float64) @ np.asarray(weight().multiplied_out(), np.float64).T
    np.testing.assert_allclose(linear(X, weight()), expected, rtol=1e-5)
    assert weight()[...].scale == 0.5


def test_no_gradient_reaches_the_weight_below():
    gradient = jax.grad(lambda w: jnp.sum(jnp.square(linear(X, w))))(weight())
    assert not np.any(gradient.base[...]) and np.all(np.any(gradient.lora_A[...], axis=1)) and np.all(np.any(gradient.lora_B[...], axis=1))


def test_the_one_matrix_keeps_the_weight_s_dtype():
    assert weight("bfloat16").multiplied_out().dtype == jnp.bfloat16
