from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qscope_jax.errors import ConfigError, InputError, SourceError
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.metrics import evaluate_sae
from qscope_jax.training.activations import ActivationConfig, ActivationStream, geometric_median, mean_squared_norm
from qscope_jax.training.loop import LoopConfig, train
from qscope_jax.training.sae import SAEConfig, SAEState, SAETraining, fold_scale, replace_param, sae_loss, sae_step

N, F, D, K, AUX_K = 48, 40, 12, 4, 6
PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")


# A dense computation in float64, by the formulas of the docstrings.


class Reference:
    """One SAE trained by dense arrays, with gradients written out by hand and Adam by its paper."""

    def __init__(self, sae, config, scale):
        self.p = {name: np.asarray(getattr(sae, name)[...], np.float64) for name in PARAMETERS}
        self.config, self.scale = config, float(scale)
        self.m, self.v, self.count = {n: 0 for n in PARAMETERS}, {n: 0 for n in PARAMETERS}, 0

    def loss(self, x, dead):
        """FVU, AuxK and the gradient of FVU + weight * AuxK."""
        p, x = self.p, np.asarray(x, np.float64) / self.scale
        z = x @ p["W_enc"].T + p["b_enc"]
        a = largest(z, K)
        error = x - (a @ p["W_dec"] + p["b_dec"])
        spread = np.sum((x - x.mean(axis=0)) ** 2)
        aux_a = largest(np.where(dead, z, -np.inf), AUX_K)
        rest = error - aux_a @ p["W_dec"]
        aux_spread = np.sum((error - error.mean(axis=0)) ** 2)
        aux = np.sum(rest**2) / aux_spread if dead.any() else 0.0
        down = -2 * error / spread
        aux_down = -2 * rest / aux_spread * self.config.aux_weight * dead.any()
        dz = (down @ p["W_dec"].T) * (a > 0) + (aux_down @ p["W_dec"].T) * (aux_a > 0)
        gradient = {"W_enc": dz.T @ x, "b_enc": dz.sum(axis=0), "W_dec": a.T @ down + aux_a.T @ aux_down, "b_dec": down.sum(axis=0)}
        return np.sum(error**2) / spread, aux, gradient

    def projected_and_clipped(self, gradient):
        rows = self.p["W_dec"]
        gradient = gradient | {"W_dec": gradient["W_dec"] - np.sum(gradient["W_dec"] * rows, axis=1, keepdims=True) * rows}
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        return {name: g * min(1, self.config.clip / norm) for name, g in gradient.items()}, norm

    def step(self, x, dead):
        gradient, norm = self.projected_and_clipped(self.loss(x, dead)[2])
        rate = float(self.config.schedule()(self.count))
        self.count += 1
        for name, g in gradient.items():
            self.m[name], self.v[name] = 0.9 * self.m[name] + 0.1 * g, 0.999 * self.v[name] + 0.001 * g**2
            mean, square = self.m[name] / (1 - 0.9**self.count), self.v[name] / (1 - 0.999**self.count)
            self.p[name] = self.p[name] - rate * mean / (np.sqrt(square) + 1e-8)
        self.p["W_dec"] /= np.linalg.norm(self.p["W_dec"], axis=1, keepdims=True)
        return norm


def largest(z, k):
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    kept = np.zeros_like(z)
    np.put_along_axis(kept, order, np.maximum(np.take_along_axis(z, order, axis=1), 0), axis=1)
    return kept


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def x():
    """Streams about as long as the square root of 5, around a mean."""
    return jnp.asarray(np.random.default_rng(1).standard_normal((N, D)) * 0.5 + 0.4, jnp.float32)


@pytest.fixture
def sae() -> SparseAutoencoder:
    rng = np.random.default_rng(0)
    W_enc, W_dec = unit(rng.standard_normal((F, D))) + 0.1, unit(rng.standard_normal((F, D)))
    arrays = (W_enc, W_dec, 0.1 * rng.standard_normal(F), 0.3 * rng.standard_normal(D))
    return SparseAutoencoder(*(jnp.asarray(array, jnp.float32) for array in arrays), k=K)


@pytest.fixture
def dead():
    return jnp.arange(F, dtype=jnp.int32) % 5 < 2


def loss(sae, x, dead, aux_weight=1 / 32, aux_k=AUX_K):
    code = jax.lax.stop_gradient(sae.encode(x))
    return sae_loss(sae, code=code, x_ND=x, dead_F=dead, aux_k=aux_k, aux_weight=aux_weight)


gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(3, 4))
aux_gradient = jax.jit(jax.grad(lambda sae, x, dead: loss(sae, x, dead)[1][1]))


def state_of(sae, optimizer, since=None, scale=1.0) -> SAEState:
    since = jnp.zeros((sae.num_features,), jnp.int32) if since is None else since
    return SAEState(jax.tree.map(jnp.array, sae), optimizer.init(sae), since, jnp.float32(scale))


# An optimiser that changes nothing and keeps the gradient that it was given.
RECORD = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g))
RECORDED = {clip: SAEConfig(F, K, 10, clip=clip, dead_after_tokens=100) for clip in (1e-3, 1e3)}
recorded_step = jax.jit(partial(sae_step, RECORD), static_argnums=(0, 1))


# The loss.


def test_loss_and_all_gradients_equal_a_dense_computation(sae, x, dead):
    (total, (fvu, aux)), got = gradients(sae, x, dead)
    expected_fvu, expected_aux, expected = Reference(sae, SAEConfig(F, K, 10), 1).loss(x, np.asarray(dead))
    assert (fvu, aux, total) == pytest.approx((expected_fvu, expected_aux, expected_fvu + expected_aux / 32), rel=1e-5)
    for name in PARAMETERS:
        np.testing.assert_allclose(getattr(got, name)[...], expected[name], rtol=1e-4, atol=1e-6)


def test_auxk_is_0_and_adds_no_gradient_without_dead_features(sae, x):
    (total, (fvu, aux)), got = gradients(sae, x, jnp.zeros((F,), bool))
    (_, (fvu_alone, aux_alone)), alone = gradients(sae, x, None)
    # Nothing is rebuilt, so the quotient is |e|^2 / |e - mean e|^2: a number, but one without a gradient.
    assert np.isfinite(total) and fvu == fvu_alone and aux_alone == 0
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8), got, alone)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(aux_gradient(sae, x, jnp.zeros((F,), bool))))


def test_auxk_reaches_dead_encoders_and_directions_and_nothing_else(sae, x, dead):
    got, living = aux_gradient(sae, x, dead), ~np.asarray(dead)
    for name in ("W_enc", "b_enc", "W_dec"):
        rows = np.abs(np.asarray(getattr(got, name)[...])).reshape(F, -1).max(axis=1)
        assert not rows[living].any() and (rows[~living] > 0).mean() > 0.5
    assert not np.any(got.b_dec[...])


@pytest.mark.parametrize("few", [1, 3])
def test_auxk_works_with_fewer_dead_features_than_slots(few, sae, x):
    dead = jnp.arange(F, dtype=jnp.int32) < few
    (_, (_, aux)), got = gradients(sae, x, dead)
    _, expected_aux, expected = Reference(sae, SAEConfig(F, K, 10), 1).loss(x, np.asarray(dead))
    assert aux == pytest.approx(expected_aux, rel=1e-5)
    np.testing.assert_allclose(got.W_enc[...], expected["W_enc"], rtol=1e-4, atol=1e-6)


def by_hand(W_dec):
    eye, zeros = jnp.eye(2, dtype=jnp.float32), jnp.zeros((2,), jnp.float32)
    return SparseAutoencoder(eye, jnp.asarray(W_dec, jnp.float32), zeros, zeros, k=1)


def test_the_loss_of_two_tokens_worked_out_by_hand():
    # Feature 0 wins both tokens and leaves e = (0, 1), (0, 2): FVU = 5 / 1. The dead feature explains half: 1.25 / 0.5.
    x = jnp.asarray([[2, 1], [3, 2]], jnp.float32)
    (total, parts), _ = gradients(by_hand([[1, 0], [0, 0.5]]), x, jnp.asarray([False, True]), 1 / 32, 1)
    assert parts == (5.0, 2.5) and total == 5 + 2.5 / 32


def test_a_denominator_of_0_gives_0_and_finite_gradients():
    same = jnp.full((2, 2), 2, jnp.float32)
    # Here e is the same for both tokens, though x is not.
    shifted = jnp.asarray([[2, 1], [3, 1]], jnp.float32)
    for x in (same, shifted):
        (total, (fvu, aux)), got = gradients(by_hand([[1, 0], [0, 0.5]]), x, jnp.asarray([False, True]), 1 / 32, 1)
        assert aux == 0 and np.isfinite(total) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
        assert (fvu == 0) == (x is same)


def test_an_encoder_that_sees_x_minus_b_dec_has_the_gradient_of_that(sae, x, dead):
    subtracting = SparseAutoencoder(*(getattr(sae, name)[...] for name in PARAMETERS), k=K, apply_b_dec_to_input=True)

    def folded(parameters):
        W_enc, W_dec, b_enc, b_dec = parameters
        return loss(SparseAutoencoder(W_enc, W_dec, b_enc - W_enc @ b_dec, b_dec, k=K), x, dead)[0]

    got = gradients(subtracting, x, dead)[1]
    for name, expected in zip(PARAMETERS, jax.jit(jax.grad(folded))([getattr(sae, name)[...] for name in PARAMETERS]), strict=True):
        np.testing.assert_allclose(getattr(got, name)[...], expected, rtol=1e-4, atol=1e-6)


# The step.


@pytest.mark.parametrize("clip", RECORDED)
def test_the_optimiser_gets_the_projected_and_clipped_gradient(clip, sae, x, dead):
    since = jnp.where(dead, jnp.int32(500), jnp.int32(0))
    after, metrics = recorded_step(RECORDED[clip], AUX_K, state_of(sae, RECORD, since, scale=1.7), x)
    reference = Reference(sae, RECORDED[clip], 1.7)
    z = np.asarray(x, np.float64) / 1.7 @ reference.p["W_enc"].T + reference.p["b_enc"]
    still_dead = np.asarray(dead) & ~(largest(z, K) > 0).any(axis=0)
    fvu, aux, gradient = reference.loss(x, still_dead)
    expected, norm = reference.projected_and_clipped(gradient)
    for name in PARAMETERS:
        np.testing.assert_allclose(getattr(after.optimizer, name)[...], expected[name], rtol=1e-4, atol=2e-6 * min(clip, 1))
    along = np.sum(np.asarray(after.optimizer.W_dec[...]) * np.asarray(sae.W_dec[...]), axis=1)
    assert np.abs(along).max() < 1e-6 and still_dead.any()
    got = {name: float(metrics[name]) for name in ("fvu", "aux", "gradient_norm", "dead", "l0")}
    wanted = {"fvu": fvu, "aux": aux, "gradient_norm": norm, "dead": still_dead.mean(), "l0": (largest(z, K) > 0).sum(axis=1).mean()}
    assert got == pytest.approx(wanted, rel=1e-4)


def test_steps_equal_adam_on_dense_gradients_and_keep_directions_of_unit_length(sae, x, dead):
    config = SAEConfig(F, K, 20, learning_rate=0.01, warmup_steps=2, dead_after_tokens=100)
    optimizer = optax.adam(config.schedule())
    step = jax.jit(partial(sae_step, optimizer, config, AUX_K))
    state, reference = state_of(sae, optimizer, jnp.where(dead, jnp.int32(10_000), jnp.int32(0)), 1.3), Reference(sae, config, 1.3)
    since = np.where(dead, 10_000, 0)
    for number in range(4):
        batch = x + 0.1 * number
        z = np.asarray(batch, np.float64) / 1.3 @ reference.p["W_enc"].T + reference.p["b_enc"]
        since = np.where((largest(z, K) > 0).any(axis=0), 0, since + N)
        reference.step(batch, since >= 100)
        state, _ = step(state, batch)
        np.testing.assert_array_equal(state.tokens_since_fired, since)
    assert not np.allclose(state.sae.W_enc[...], sae.W_enc[...], atol=1e-3)
    for name in PARAMETERS:
        np.testing.assert_allclose(getattr(state.sae, name)[...], reference.p[name], atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec[...], axis=1), 1, atol=1e-6)
    assert state.scale == jnp.float32(1.3)


def test_counters_restart_when_a_feature_fires_and_stop_before_they_overflow(sae, x):
    since = jnp.full((F,), 2_000_000_000 - 1, jnp.int32)
    after, metrics = recorded_step(RECORDED[1e3], AUX_K, state_of(sae, RECORD, since), x)
    fired = (largest(np.asarray(sae.pre_activations(x), np.float64), K) > 0).any(axis=0)
    np.testing.assert_array_equal(after.tokens_since_fired, np.where(fired, 0, 2_000_000_000))
    # The features of this very batch are alive before AuxK chooses.
    assert metrics["dead"] == pytest.approx(1 - fired.mean())


def test_the_rate_follows_the_width_and_warms_up_and_decays():
    for thousands, expected in ((16, 2e-4), (32, 1.41e-4), (64, 1e-4), (80, 0.89e-4), (128, 0.71e-4)):
        assert SAEConfig(thousands * 1024, 50, 100_000).schedule()(50_000) == pytest.approx(expected, rel=0.01)
    schedule = SAEConfig(16384, 50, 10_000, learning_rate=1.0).schedule()
    steps = {0: 0, 500: 0.5, 1000: 1, 7999: 1, 9000: 0.5, 9999: 0.0005, 10_000: 0}
    assert {step: float(schedule(step)) for step in steps} == pytest.approx(steps, abs=1e-6)
    assert SAEConfig(16384, 50, 100, learning_rate=1.0).schedule()(10) == 1
    assert SAEConfig(16384, 50, 100, learning_rate=0.0).schedule()(50) == 0


@pytest.mark.parametrize("changes", [{"k": 0}, {"k": 41}, {"steps": 0}, {"decay_share": 1.5}, {"dead_after_tokens": 0}, {"aux_k": 0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        SAEConfig(**{"num_features": 40, "k": 4, "steps": 10, **changes})


@pytest.mark.parametrize("kind", ["released form", "subtracts b_dec", "threshold"])
def test_folding_the_scale_leaves_codes_and_reconstructions_in_raw_units(kind, sae, x):
    settings = {"released form": {}, "subtracts b_dec": {"apply_b_dec_to_input": True}, "threshold": {"activation": "jumprelu"}}[kind]
    if kind == "threshold":
        settings["threshold"] = jnp.full((F,), 0.3, jnp.float32)
    scaled = SparseAutoencoder(*(getattr(sae, name)[...] for name in PARAMETERS), k=K, **settings)
    scale = jnp.float32(7.3)
    folded = fold_scale(scaled, scale)
    code, raw = scaled.encode(x / scale), folded.encode(x)
    assert (np.asarray(code.values) == 0).any() == (kind == "threshold")
    np.testing.assert_array_equal(np.where(code.values > 0, code.indices, -1), np.where(raw.values > 0, raw.indices, -1))
    np.testing.assert_allclose(raw.values, code.values * scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(folded.decode(raw), scaled.decode(code) * scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(folded.W_dec[...], scaled.W_dec[...])


def test_replacing_a_parameter_leaves_the_module_and_its_other_parameters(sae):
    changed = replace_param(sae, "b_enc", sae.b_enc[...] + 1)
    np.testing.assert_array_equal(changed.b_enc[...], sae.b_enc[...] + 1)
    for name in ("W_enc", "W_dec", "b_dec"):
        assert getattr(changed, name)[...] is getattr(sae, name)[...]


# Learning.


def recovered(truth=128, width=64, features=256, active=3, steps=300) -> float:
    """Share of planted directions found, when half of the features begin too quiet to be among the active ones.

    Without AuxK they stay so, and three quarters are found.
    """
    truth_PD = jnp.asarray(unit(np.random.default_rng(0).standard_normal((truth, width))), jnp.float32)
    W = jnp.asarray(unit(np.random.default_rng(1).standard_normal((features, width))), jnp.float32)
    config = SAEConfig(features, active, steps, learning_rate=3e-3, dead_after_tokens=5000)
    optimizer = optax.adam(config.schedule())
    b_enc = jnp.where(jnp.arange(features, dtype=jnp.int32) < features // 2, jnp.float32(0), jnp.float32(-0.4))
    state = state_of(SparseAutoencoder(W, W, b_enc, jnp.zeros((width,), jnp.float32), k=active), optimizer, scale=active**0.5)

    def step(state, key):
        which, size = jax.random.split(key)
        draws = jax.random.uniform(which, (256, truth), jnp.float32)
        chosen = draws >= jax.lax.top_k(draws, active)[0][:, -1:]
        strengths = jax.random.uniform(size, (256, truth), jnp.float32, 0.5, 1.5)
        state, _ = sae_step(optimizer, config, width // 2, state, jnp.where(chosen, strengths, jnp.float32(0)) @ truth_PD)
        return state, None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(2), steps)))(state)
    return float(np.mean(np.max(truth_PD @ state.sae.W_dec[...].T, axis=1) > 0.9))


def test_planted_directions_are_recovered_also_by_features_that_began_dead():
    assert recovered() >= 0.95


# The recipe.


LAYERS = (0, 1)


@pytest.fixture(scope="module")
def recipe(model, token_stream):
    """Factory of recipes: tiny SAEs, a buffer of four batches."""

    def make(layers=LAYERS, held_out=(), width=F, **changes) -> SAETraining:
        activations = ActivationConfig(**{"layers": layers, "batch_tokens": 32, "buffer_batches": 4, **changes})
        config = SAEConfig(width, K, 12, learning_rate=0.01, dead_after_tokens=64)
        return SAETraining(model, token_stream, activations, config, held_out)

    return make


def assert_same_states(got, expected):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def settings(folder="", **changes) -> LoopConfig:
    return LoopConfig(**{"steps": 12, "log_every": 4, "checkpoint_every": 5, "progress": False, "run_dir": str(folder), **changes})


def test_the_first_state_is_tied_of_unit_rows_and_centred_on_the_geometric_median(recipe, model, token_stream):
    training = recipe()
    states = training.init()
    first = ActivationStream(model.decoder, token_stream(), training.activations).peek()
    for state, x in zip(states, first, strict=True):
        assert state.scale == pytest.approx(float(jnp.sqrt(mean_squared_norm(x))))
        np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec[...], axis=1), 1, atol=1e-6)
        np.testing.assert_array_equal(state.sae.W_enc[...], state.sae.W_dec[...])
        np.testing.assert_allclose(state.sae.b_dec[...], geometric_median(x / state.scale), atol=1e-5)
        np.testing.assert_allclose(state.sae.pre_activations(state.sae.b_dec[...][None]), 0, atol=1e-5)
        assert not np.any(state.tokens_since_fired)
    assert not np.array_equal(states[0].sae.W_dec[...], states[1].sae.W_dec[...])
    np.testing.assert_array_equal(next(training.stream()), first[:, :32])


@pytest.fixture(scope="module")
def trained(recipe):
    return train(recipe(), settings())


def test_each_layers_sae_equals_the_one_trained_alone_to_the_bit(recipe, trained):
    for place, layer in enumerate(LAYERS):
        assert_same_states(train(recipe((layer,)), settings()), trained[place : place + 1])


def test_a_recipe_can_be_trained_twice(recipe, trained):
    training = recipe()
    for _ in range(2):
        assert_same_states(train(training, settings()), trained)


def test_a_resumed_run_equals_the_uninterrupted_one_with_buffer_and_data(recipe, trained, tmp_path):
    interrupted = recipe()
    steps, step = [], interrupted.step

    def fail(state, batch):
        steps.append(batch)
        if len(steps) > 7:
            raise KeyboardInterrupt
        return step(state, batch)

    interrupted.step = fail
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, settings(tmp_path / "run"))
    assert_same_states(train(recipe(), settings(tmp_path / "run", resume=True)), trained)


def test_an_sae_of_another_width_cannot_continue_a_run(recipe, tmp_path):
    train(recipe(), settings(tmp_path / "run", steps=1))
    with pytest.raises(SourceError, match=r"W_dec.value is float32\[40,32\], this run has float32\[48,32\]"):
        train(recipe(width=48), settings(tmp_path / "run", resume=True))


def test_exported_saes_are_in_raw_units_and_measured_so(recipe, model, trained, documents):
    texts = documents(8, seed=5, shortest=10)
    training = recipe(held_out=texts)
    saes = training.export(trained)
    assert [sae.layer for sae in saes] == [0, 1] and saes[1].metadata["layer"] == 1 and saes[0].metadata["folds"] == ["input scale"]
    x = next(recipe().stream())[0]
    state = trained[0]
    expected = state.sae.decode(state.sae.encode(x / state.scale)) * state.scale
    np.testing.assert_allclose(saes[0].decode(saes[0].encode(x)), expected, rtol=1e-4, atol=1e-4)
    measured, evaluated = evaluate_sae(model, saes, texts, splice=False), training.evaluate(trained)
    assert evaluated["fvu"] == [measured[0]["fvu"], measured[1]["fvu"]] and evaluated["l0"] == [measured[0]["l0"], measured[1]["l0"]]
    assert evaluated["fvu"][0] < 1
    assert recipe().evaluate(trained) == {}


def test_metrics_are_lists_over_layers_and_the_loss_their_mean(recipe):
    training = recipe()
    states = training.init()
    batch = next(training.stream())
    _, metrics = training.step(states, batch)
    assert metrics["fvu"].shape == (2,) and metrics["loss"] == pytest.approx(float(np.mean(metrics["fvu"])))
    assert training.units(batch) == 32


def test_a_layer_the_model_lacks_is_refused(recipe):
    with pytest.raises(InputError, match="layer 2 is out of range"):
        recipe((0, 2))
