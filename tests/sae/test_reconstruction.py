import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.layer_sae import from_arrays
from qscope_jax.sae.reconstruction import DENSITY_EDGES, ReconstructionMetrics, reconstruction_sums

D = 32


def measure(sae, batches, masks=None) -> ReconstructionMetrics:
    metrics = ReconstructionMetrics()
    for index, batch in enumerate(batches):
        mask = np.ones(len(batch), bool) if masks is None else masks[index]
        metrics.add(from_arrays(sae, 0).autoencoder, jnp.asarray(batch), jnp.asarray(mask))
    return metrics


@pytest.fixture
def batches():
    """Three batches that differ in mean and spread, as texts do."""
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((40, D)) * scale + shift).astype(np.float32) for scale, shift in ((1, 0), (3, 0.5), (0.5, -1))]


@pytest.fixture
def masks():
    rng = np.random.default_rng(2)
    return [rng.random(40) < 0.6, rng.random(40) < 0.3, np.zeros(40, bool)]


def test_every_metric_equals_float64_over_all_batches(random_sae, oracle, batches):
    assert measure(random_sae(), batches).result() == pytest.approx(oracle(random_sae(), batches), rel=1e-5)


@pytest.mark.parametrize("spoilt", [1e6, np.inf, np.nan])
def test_masked_tokens_do_not_count_whatever_they_hold(random_sae, oracle, batches, masks, spoilt):
    kept = [batch[mask] for batch, mask in zip(batches, masks, strict=True)][:2]
    held = [np.where(mask[:, None], batch, spoilt).astype(np.float32) for batch, mask in zip(batches, masks, strict=True)]
    assert measure(random_sae(), held, masks).result() == pytest.approx(oracle(random_sae(), kept), rel=1e-5)
    # An empty batch first must not spoil the pooled mean either.
    assert measure(random_sae(), held[::-1], masks[::-1]).result() == pytest.approx(oracle(random_sae(), kept), rel=1e-5)


def test_masks_that_share_a_pass_are_measured_as_if_alone(random_sae, batches, masks):
    sae, x = from_arrays(random_sae(), 0).autoencoder, jnp.asarray(batches[0])
    every, some = np.ones(40, bool), masks[0]
    together = reconstruction_sums(sae, x, (jnp.asarray(every), jnp.asarray(some)))
    for sums, mask in zip(together, (every, some), strict=True):
        shared = ReconstructionMetrics()
        shared.add_sums(sums)
        assert shared.result() == pytest.approx(measure(random_sae(), batches[:1], [mask]).result(), rel=1e-6)


@pytest.mark.parametrize("b_dec", [0.0, 1000.0])
def test_a_large_mean_does_not_cancel_the_variance(random_sae, oracle, b_dec, batches):
    sae = random_sae(b_dec=b_dec)
    shifted = [(batch + 1000).astype(np.float32) for batch in batches]
    got, expected = measure(sae, shifted).result(), oracle(sae, shifted)
    for name in ("fvu", "frac_variance_explained", "explained_variance_legacy", "saebench_explained_variance"):
        assert got[name] == pytest.approx(expected[name], rel=1e-3), name


def test_a_constant_error_escapes_dictionary_learning_s_metric_alone(random_sae, batches):
    biased = random_sae()
    biased.b_dec[:] = 100.0
    right, wrong = (measure(sae, batches).result() for sae in (random_sae(), biased))
    assert wrong["frac_variance_explained"] == pytest.approx(right["frac_variance_explained"], rel=1e-4)
    assert wrong["fvu"] > 1000 * right["fvu"] and wrong["explained_variance_legacy"] < -1000


def test_tokens_at_their_batch_s_mean_are_left_out_of_the_legacy_metric(random_sae):
    one = [np.ones((1, D), np.float32)]
    result = measure(random_sae(), one).result()
    assert result["tokens"] == 1 and np.isnan([result[name] for name in ("explained_variance_legacy", "frac_variance_explained")]).all()
    pair = np.stack([np.zeros(D), np.full(D, 2.0)]).astype(np.float32)
    joined = [np.concatenate([pair, np.ones((1, D), np.float32)])]
    legacy = measure(random_sae(), [pair]).result()["explained_variance_legacy"]
    assert measure(random_sae(), joined).result()["explained_variance_legacy"] == pytest.approx(legacy, rel=1e-6)


def test_firing_rates_are_shares_of_counted_tokens_and_their_histogram_holds_every_feature(random_sae, batches):
    sae = random_sae()
    sae.b_enc[:7] = -1e3
    metrics = measure(sae, batches)
    z = np.concatenate(batches) @ sae.W_enc.T + sae.b_enc
    order = np.argsort(-z, axis=1)[:, :5]
    fired = np.zeros(z.shape, bool)
    np.put_along_axis(fired, order, np.take_along_axis(z, order, axis=1) > 0, axis=1)
    rate = fired.mean(axis=0)
    np.testing.assert_allclose(metrics.firing_rate, rate, rtol=1e-6)
    histogram = metrics.density_histogram()
    assert histogram["silent"] == np.sum(rate == 0) >= 7 and histogram["silent"] + histogram["counts"].sum() == 64
    between = [np.sum((np.log10(rate[rate > 0]) >= low) & (np.log10(rate[rate > 0]) < high)) for low, high in zip(DENSITY_EDGES, DENSITY_EDGES[1:])]
    assert histogram["counts"].tolist() == between and (DENSITY_EDGES[0], DENSITY_EDGES[-1]) == (-7, 0)


def test_a_feature_that_always_fires_is_in_the_last_bin_and_a_rarer_one_than_the_first_edge_in_the_first(random_sae, batches):
    metrics = measure(random_sae(), batches)
    metrics._sums["fired_F"][:] = 0
    metrics._sums["fired_F"][:2] = (120, 1e-6)
    counts = metrics.density_histogram()["counts"]
    assert (counts[-1], counts[0], counts.sum()) == (1, 1, 2)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_streams_have_no_fvu(random_sae, value):
    assert np.isnan(measure(random_sae(), [np.full((39, D), value, np.float32)]).result()["fvu"])
