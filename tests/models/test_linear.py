import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.models.linear import linear, precision_for, rms_norm, soft_cap


def normal(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def test_linear_multiplies_by_the_transposed_weight():
    x, w = normal(2, 3, 8), normal(5, 8)
    np.testing.assert_allclose(linear(x, w), np.asarray(x) @ np.asarray(w).T, rtol=1e-5, atol=1e-6)


def test_a_weight_of_another_dtype_follows_the_activations():
    x = normal(2, 8, dtype=jnp.bfloat16)
    assert linear(x, normal(5, 8)).dtype == jnp.bfloat16
    assert np.array_equal(linear(x, normal(5, 8)), linear(x, normal(5, 8, dtype=jnp.bfloat16)))


def test_float32_products_ask_for_full_precision_and_half_ones_do_not():
    assert precision_for(jnp.dtype("float32")) == jax.lax.Precision.HIGHEST
    assert precision_for(jnp.dtype("bfloat16")) == jax.lax.Precision.DEFAULT
    assert "HIGHEST" in str(jax.make_jaxpr(linear)(normal(2, 8), normal(5, 8)))


def test_norm_equals_that_of_transformers_in_both_dtypes():
    import torch
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for dtype in ("float32", "bfloat16"):
        x, gain = normal(4, 3, 32, dtype=dtype) * jnp.asarray(7, dtype), 1 + normal(32, dtype=dtype)
        norm = Qwen3RMSNorm(32, 1e-6).to(getattr(torch, dtype))
        norm.weight.data = torch.from_numpy(np.array(gain, np.float32)).to(getattr(torch, dtype))
        expected = norm(torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, dtype))).float().detach().numpy()
        np.testing.assert_allclose(np.asarray(rms_norm(x, gain, 1e-6), np.float32), expected, rtol=1e-6 if dtype == "float32" else 0.008)


def test_norm_of_half_precision_values_whose_squares_overflow_is_right():
    x = jnp.full((1, 64), 3e4, jnp.float16)
    np.testing.assert_allclose(np.asarray(rms_norm(x, jnp.ones(64, jnp.float16), 1e-6), np.float32), 1, rtol=1e-3)


def test_norm_of_zeros_is_zero():
    assert not np.any(rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-6))


def test_a_unit_offset_multiplies_by_one_more_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16)), jnp.bfloat16)
    w = jnp.linspace(-0.3, 0.3, 16).astype(jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(axis=-1, keepdims=True) + 1e-6) * (1 + np.asarray(w, np.float64))
    assert np.array_equal(rms_norm(x, w, 1e-6, True), expected.astype(np.float32).astype(jnp.bfloat16))


def test_soft_caps_bound_and_0_is_no_cap():
    x = jnp.asarray([-1e6, -1.0, 0.0, 2.0, 1e6], jnp.float32)
    np.testing.assert_allclose(soft_cap(x, 3.0), 3 * np.tanh(np.asarray(x) / 3), rtol=1e-6)
    assert soft_cap(x, 0.0) is x
