from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.sae_gradient import loss_and_gradient
from tests.training.dense_sae import PARAMETERS, DenseSAE, largest, unit

N, F, D, K, AUX_K = 48, 40, 12, 4, 6
AFTER = 1000
VARIANTS = {
    "topk": {},
    "multi-topk": {"multi_topk_weight": 0.125},
    "batch_topk": {"activation": "batch_topk", "max_active": 20},
    "jumprelu": {"activation": "jumprelu", "max_active": 40, "bandwidth": 0.2},
}


def config_of(variant, **changes) -> SAEConfig:
    return SAEConfig(**{"num_features": F, "k": K, "steps": 10, "dead_after_tokens": AFTER, **VARIANTS[variant], **changes})


@pytest.fixture(scope="module")
def x():
    """Streams about as long as the square root of 5, around a mean."""
    return jnp.asarray(np.random.default_rng(1).standard_normal((N, D)) * 0.5 + 0.4, jnp.float32)


def make_sae(config) -> SparseAutoencoder:
    rng = np.random.default_rng(0)
    W_enc, W_dec = unit(rng.standard_normal((F, D))) + 0.1, unit(rng.standard_normal((F, D)))
    arrays = [jnp.asarray(array, jnp.float32) for array in (W_enc, W_dec, 0.1 * rng.standard_normal(F), 0.3 * rng.standard_normal(D))]
    # One feature in five is out of reach, so that some are silent.
    levels = np.where(np.arange(F) % 5 == 0, 9, rng.uniform(0.3, 0.9, F))
    threshold = None if config.activation == "topk" else jnp.asarray(levels, jnp.float32)
    return SparseAutoencoder(*arrays, k=config.slots, activation=config.activation, threshold=threshold)


@partial(jax.jit, static_argnames=("config", "aux_k"))
def compute(sae, x, since, weight=0.0, *, config, aux_k=AUX_K):
    return loss_and_gradient(sae, x, since, weight, config=config, aux_k=aux_k)


def counters(dead) -> jax.Array:
    """Counters with which exactly the silent ones of `dead` are dead after a batch."""
    return jnp.where(dead, jnp.int32(AFTER), jnp.int32(0))


def silent(sae, config, x, dead):
    return np.asarray(dead) & ~(DenseSAE(sae, config).activations(np.asarray(x, np.float64)) > 0).any(axis=0)


SOME = np.arange(F) % 5 < 2


@pytest.mark.parametrize("dead", [SOME, np.arange(F) < 36], ids=["some dead", "most dead"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_all_gradients_equal_a_dense_computation(variant, dead, x):
    config = config_of(variant)
    sae = make_sae(config)
    got = compute(sae, x, counters(dead), 0.7, config=config)
    still = silent(sae, config, x, dead)
    fvu, aux, expected = DenseSAE(sae, config).loss(x, still, 0.7)
    assert still.any() and aux > 0
    assert (got.losses.fvu, got.losses.aux) == pytest.approx((fvu, aux), rel=1e-5)
    assert got.losses.dead == pytest.approx(still.mean())
    for name, gradient in expected.items():
        np.testing.assert_allclose(getattr(got.parameters, name)[...], gradient, rtol=1e-4, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(got.along_F, np.sum(expected["W_dec"] * sae.W_dec[...], axis=1), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_change_no_gradient(variant, parts, x):
    whole, split = (config_of(variant, micro_batches=count) for count in (1, parts))
    sae = make_sae(whole)
    one, other = (compute(sae, x, counters(SOME), 0.7, config=config) for config in (whole, split))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6 * np.abs(left).max())


def test_few_dead_features_are_chosen_as_among_all(x):
    # 40 features, of which two are dead: AuxK over a list of 5 of them, and over all.
    config, dead = config_of("topk"), np.arange(F) >= 38
    sae = make_sae(config)
    few = compute(sae, x, counters(dead), config=config, aux_k=3)
    everything = DenseSAE(sae, config, aux_k=3).loss(x, silent(sae, config, x, dead))
    assert 0 < few.losses.dead <= 2 / F
    assert few.losses.aux == pytest.approx(everything[1], rel=1e-5)
    np.testing.assert_allclose(few.parameters.W_enc[...], everything[2]["W_enc"], rtol=1e-4, atol=1e-6)


def test_auxk_adds_nothing_without_dead_features(x):
    with_aux, without = (config_of("topk", aux_weight=weight) for weight in (1 / 32, 0.0))
    sae = make_sae(with_aux)
    one, other = (compute(sae, x, counters(np.zeros(F, bool)), config=config) for config in (with_aux, without))
    assert one.losses.aux == 0
    for left, right in zip(jax.tree.leaves(one.parameters), jax.tree.leaves(other.parameters), strict=True):
        np.testing.assert_array_equal(left, right)


def test_auxk_reaches_dead_encoders_and_directions_and_nothing_else(x):
    with_aux, without = (config_of("topk", aux_weight=weight) for weight in (1.0, 0.0))
    sae = make_sae(with_aux)
    one, other = (compute(sae, x, counters(SOME), config=config).parameters for config in (with_aux, without))
    dead = silent(sae, with_aux, x, SOME)
    for name in ("W_enc", "b_enc", "W_dec"):
        change = np.abs(np.asarray(getattr(one, name)[...] - getattr(other, name)[...])).reshape(F, -1).max(axis=1)
        assert not change[~dead].any() and (change[dead] > 0).mean() > 0.5
    np.testing.assert_array_equal(one.b_dec[...], other.b_dec[...])


def by_hand(W_dec):
    eye, zeros = jnp.eye(2, dtype=jnp.float32), jnp.zeros((2,), jnp.float32)
    return SparseAutoencoder(eye, jnp.asarray(W_dec, jnp.float32), zeros, zeros, k=1)


TWO = SAEConfig(2, 1, 10, dead_after_tokens=AFTER)


def test_the_loss_of_two_tokens_worked_out_by_hand():
    # Feature 0 wins both tokens and leaves e = (0, 1), (0, 2): FVU = 5 / 1. The dead feature explains half: 1.25 / 0.5.
    x = jnp.asarray([[2, 1], [3, 2]], jnp.float32)
    losses = compute(by_hand([[1, 0], [0, 0.5]]), x, counters(np.asarray([False, True])), config=TWO, aux_k=1).losses
    assert (losses.fvu, losses.aux, losses.l0, losses.dead) == (5.0, 2.5, 1.0, 0.5)


def test_a_denominator_of_0_gives_0_and_finite_gradients():
    same = jnp.full((2, 2), 2, jnp.float32)
    # Here e is the same for both tokens, though x is not.
    shifted = jnp.asarray([[2, 1], [3, 1]], jnp.float32)
    for x in (same, shifted):
        got = compute(by_hand([[1, 0], [0, 0.5]]), x, counters(np.asarray([False, True])), config=TWO, aux_k=1)
        assert got.losses.aux == 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
        assert (got.losses.fvu == 0) == (x is same)


def test_counters_restart_when_a_feature_fires_and_stop_before_they_overflow(x):
    config = config_of("topk")
    sae = make_sae(config)
    got = compute(sae, x, jnp.full((F,), 2_000_000_000 - 1, jnp.int32), config=config)
    fired = (largest(np.asarray(sae.pre_activations(x), np.float64), K) > 0).any(axis=0)
    np.testing.assert_array_equal(got.tokens_since_fired, np.where(fired, 0, 2_000_000_000))
    # The features of this very batch are alive before AuxK chooses.
    assert got.losses.dead == pytest.approx(1 - fired.mean())


def test_batch_topk_has_k_features_a_token_on_average_and_tells_its_least(x):
    config = config_of("batch_topk")
    sae = make_sae(config)
    got = compute(sae, x, counters(SOME), config=config)
    values = DenseSAE(sae, config).activations(np.asarray(x, np.float64))
    assert got.losses.l0 == K and len(set((values > 0).sum(axis=1))) > 3
    assert got.least_active == pytest.approx(values[values > 0].min(), rel=1e-5)
    assert got.losses.cut == 0


def test_tokens_that_reach_their_last_slot_are_counted(x):
    config = config_of("batch_topk", max_active=K)
    got = compute(make_sae(config), x, counters(SOME), config=config)
    assert 0 < got.losses.cut <= 1 and got.losses.l0 < K + 1e-6


def test_the_penalty_pushes_thresholds_up_where_too_many_features_fire(x):
    config = config_of("jumprelu")
    sae = make_sae(config)
    plain, pushed = (compute(sae, x, counters(SOME), weight, config=config) for weight in (0.0, 50.0))
    assert plain.losses.l0 > K and plain.losses.sparsity == pytest.approx((float(plain.losses.l0) / K - 1) ** 2, rel=1e-5)
    moved = np.asarray(pushed.parameters.threshold[...] - plain.parameters.threshold[...])
    assert (moved <= 0).all() and (moved < 0).mean() > 0.5
    for name in PARAMETERS:
        np.testing.assert_array_equal(getattr(plain.parameters, name)[...], getattr(pushed.parameters, name)[...])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_products_leave_float32_gradients_near(variant, x):
    exact, rounded = (config_of(variant, compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    sae = make_sae(exact)
    one, other = (compute(sae, x, counters(SOME), 0.7, config=config) for config in (exact, rounded))
    assert other.parameters.W_enc[...].dtype == jnp.float32
    assert other.losses.fvu == pytest.approx(float(one.losses.fvu), rel=0.02) and other.losses.fvu != one.losses.fvu
    left, right = np.asarray(one.parameters.W_dec[...]), np.asarray(other.parameters.W_dec[...])
    assert np.sum(left * right) / np.linalg.norm(left) / np.linalg.norm(right) > 0.98
