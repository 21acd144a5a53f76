import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.sae.recovery import planted_directions, planted_streams, recovered


@pytest.fixture(scope="module")
def directions():
    return planted_directions(jax.random.key(0), 24, 32)


def test_directions_have_norm_1_and_depend_on_the_key_alone(directions):
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(directions, planted_directions(jax.random.key(0), 24, 32))
    assert not np.allclose(directions, planted_directions(jax.random.key(1), 24, 32))


def test_every_token_is_a_sum_of_as_many_directions_as_asked_for_with_strengths_between_a_half_and_one_and_a_half(directions):
    x = planted_streams(jax.random.key(1), directions, active=3, tokens=400)
    # 24 independent directions in 32 dimensions: the coefficients are unique.
    coefficients, residual, _, _ = np.linalg.lstsq(np.asarray(directions, np.float64).T, np.asarray(x, np.float64).T, rcond=None)
    assert x.shape == (400, 32) and residual.max() < 1e-9
    present = np.abs(coefficients) > 1e-4
    assert (present.sum(axis=0) == 3).all()
    strengths = coefficients[present]
    assert 0.5 - 1e-5 < strengths.min() < 0.51 and 1.49 < strengths.max() < 1.5 + 1e-5
    # 400 * 3 / 24 = 50 tokens each, with a standard deviation of 7.
    assert present.sum(axis=1).min() > 25 and present.sum(axis=1).max() < 75


def test_noise_has_the_norm_asked_for(directions):
    clean, noisy = (planted_streams(jax.random.key(2), directions, active=2, tokens=500, noise=noise) for noise in (0.0, 0.3))
    assert np.sqrt(np.mean(np.sum(np.square(noisy - clean), axis=1))) == pytest.approx(0.3, rel=0.03)


def test_a_dictionary_that_holds_the_directions_in_any_order_and_length_recovers_all(directions):
    rng = np.random.default_rng(0)
    rows = np.asarray(directions)[rng.permutation(24)] * rng.uniform(0.1, 5, (24, 1))
    share, cosines = recovered(directions, np.concatenate([rng.standard_normal((40, 32)), rows]))
    assert share == 1 and cosines.shape == (24,)
    np.testing.assert_allclose(cosines, 1, atol=1e-6)


def test_a_row_that_points_the_other_way_recovers_nothing(directions):
    share, cosines = recovered(directions, -directions)
    expected = np.max(-np.asarray(directions, np.float64) @ np.asarray(directions, np.float64).T, axis=1)
    assert share == 0
    np.testing.assert_allclose(cosines, expected, atol=1e-6)


def test_a_direction_counts_above_the_threshold_only():
    found = np.asarray([[np.cos(angle), np.sin(angle)] for angle in (np.arccos(0.91), np.pi)])
    share, cosines = recovered(np.eye(2), found)
    np.testing.assert_allclose(cosines, [0.91, np.sin(np.arccos(0.91))], rtol=1e-6)
    assert share == 0.5 and recovered(np.eye(2), found, threshold=0.3)[0] == 1


@pytest.mark.parametrize("size", [dict(active=0, tokens=1), dict(active=25, tokens=1), dict(active=1, tokens=0)])
def test_impossible_streams_are_refused(directions, size):
    with pytest.raises(InputError, match="give 1 to 24, in 1 token or more"):
        planted_streams(jax.random.key(0), jnp.asarray(directions), **size)
