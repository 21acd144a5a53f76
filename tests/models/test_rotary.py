import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.config import Llama3Scaling
from qscope_jax.models.rotary import apply_rotary, rotary_tables, scale_frequencies


def rotate(x, positions, theta: float = 1e4) -> np.ndarray:
    return np.asarray(apply_rotary(x, *rotary_tables(jnp.asarray(positions, jnp.int32)[None], x.shape[-1], theta)))


def heads(length: int, width: int = 16, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((1, length, 2, width)), dtype)


def test_channels_c_and_c_plus_half_turn_by_position_times_frequency():
    x, positions = heads(6), np.asarray([0, 1, 2, 77, 600, 30000])
    angles = positions[:, None] * 1e4 ** (-np.arange(8) / 8)
    turned = (np.asarray(x[..., :8]) + 1j * np.asarray(x[..., 8:])) * np.exp(1j * angles)[None, :, None, :]
    # Float32 resolves the angle 30,000 to about 1e-3.
    np.testing.assert_allclose(rotate(x, positions), np.concatenate([turned.real, turned.imag], axis=-1), atol=5e-3)
    np.testing.assert_allclose(rotate(x[:, :4], positions[:4]), np.concatenate([turned.real, turned.imag], axis=-1)[:, :4], atol=2e-5)


def test_position_0_changes_nothing_and_lengths_are_kept():
    x = heads(5)
    assert np.array_equal(rotate(x, [0] * 5), x)
    np.testing.assert_allclose(np.linalg.norm(rotate(x, [9, 8, 7, 6, 500]), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_scores_depend_on_the_difference_of_positions():
    q, k = heads(1), heads(2)[:, 1:]
    scores = [float(np.sum(rotate(q, [p + 7]) * rotate(k, [p]))) for p in (0, 3, 250)]
    np.testing.assert_allclose(scores, scores[0], atol=1e-3)


def test_bfloat16_heads_at_position_257_are_not_those_of_256():
    x = heads(1, dtype=jnp.bfloat16)
    assert rotate(x, [257]).dtype == jnp.bfloat16
    assert not np.array_equal(rotate(x, [257]), rotate(x, [256]))
    np.testing.assert_allclose(rotate(x, [257]).astype(np.float32), rotate(x.astype(jnp.float32), [257]), atol=0.02)


def test_frequencies_equal_those_of_transformers():
    import torch

    theirs = 1.0 / (1e6 ** (torch.arange(0, 128, 2, dtype=torch.float) / 128))
    cos, _ = rotary_tables(jnp.asarray([[1]], jnp.int32), 128, 1e6)
    np.testing.assert_allclose(np.arccos(np.float64(cos[0, 0, 0, :20])), theirs[:20], rtol=1e-4)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_scaled_frequencies_are_those_of_transformers(theta):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(rope_type="llama3", rope_theta=theta, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = theta ** (-np.arange(64) / 64)
    ours = scale_frequencies(plain, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    # All three bands are there: kept, interpolated, stretched.
    assert (ours == plain).any() and np.isclose(ours, plain / 8).any() and (~np.isclose(ours, plain) & ~np.isclose(ours, plain / 8)).any()
