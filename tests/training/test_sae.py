import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, SourceError
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.metrics import evaluate_sae
from qscope_jax.training.activations import ActivationConfig, ActivationStream, geometric_median, mean_squared_norm
from qscope_jax.training.loop import LoopConfig, train
from qscope_jax.training.sae import SAETraining, first_encoder_norm, fold_scale
from qscope_jax.training.sae_config import SAEConfig
from tests.training.dense_sae import PARAMETERS, largest, unit

F, D, K = 40, 12, 4


@pytest.mark.parametrize("kind", ["released form", "subtracts b_dec", "threshold"])
def test_folding_the_scale_leaves_codes_and_reconstructions_in_raw_units(kind):
    rng = np.random.default_rng(0)
    W_enc, W_dec, b_enc, b_dec = unit(rng.standard_normal((F, D))), unit(rng.standard_normal((F, D))), rng.standard_normal(F), rng.standard_normal(D)
    sae = SparseAutoencoder(*(jnp.asarray(array, jnp.float32) for array in (W_enc, W_dec, 0.1 * b_enc, 0.3 * b_dec)), k=K)
    x = jnp.asarray(rng.standard_normal((48, D)) * 0.5 + 0.4, jnp.float32)
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


def test_the_encoders_first_norm_rebuilds_with_the_least_error():
    rng = np.random.default_rng(0)
    x, directions = (jnp.asarray(array, jnp.float32) for array in (rng.standard_normal((64, 12)), unit(rng.standard_normal((200, 12)))))
    norm = float(first_encoder_norm(x, directions, 8))
    code = largest(np.asarray(x, np.float64) @ np.asarray(directions, np.float64).T, 8)

    def error(norm):
        return np.sum((np.asarray(x, np.float64) - norm * code @ np.asarray(directions, np.float64)) ** 2)

    assert 0 < norm < 0.5 and error(norm) < min(error(0.99 * norm), error(1.01 * norm)) < error(1.0)
    assert first_encoder_norm(x, directions, 1) == pytest.approx(1, rel=1e-5)
    assert first_encoder_norm(jnp.zeros((4, 12)), directions, 8) == 1


# The recipe.


LAYERS = (0, 1)


@pytest.fixture(scope="module")
def recipe(model, token_stream):
    """Factory of recipes: tiny SAEs, a buffer of four batches."""

    def make(layers=LAYERS, held_out=(), width=F, **changes) -> SAETraining:
        activations = ActivationConfig(layers, batch_tokens=32, buffer_batches=4)
        config = SAEConfig(**{"num_features": width, "k": K, "steps": 12, "learning_rate": 0.01, "dead_after_tokens": 64, **changes})
        return SAETraining(model, layers, lambda: ActivationStream(model.decoder, token_stream(), activations), config, held_out)

    return make


def at(state, place):
    return jax.tree.map(lambda leaf: leaf[place], state)


def assert_same_states(got, expected):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def settings(folder="", **changes) -> LoopConfig:
    return LoopConfig(**{"steps": 12, "log_every": 4, "checkpoint_every": 5, "progress": False, "run_dir": str(folder), **changes})


def test_the_first_state_has_unit_directions_an_encoder_along_them_and_the_geometric_median(recipe):
    training = recipe()
    states = training.init()
    first = training.activations().peek()
    for place, x in enumerate(first):
        state = at(states, place)
        assert state.scale == pytest.approx(float(jnp.sqrt(mean_squared_norm(x))))
        np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec[...], axis=1), 1, atol=1e-6)
        norm = first_encoder_norm(x[:256] / state.scale - state.sae.b_dec[...], state.sae.W_dec[...], K)
        np.testing.assert_allclose(state.sae.W_enc[...], norm * state.sae.W_dec[...], rtol=1e-4)
        np.testing.assert_allclose(state.sae.b_dec[...], geometric_median(x / state.scale), atol=1e-5)
        np.testing.assert_allclose(state.sae.pre_activations(state.sae.b_dec[...][None]), 0, atol=1e-5)
        assert not np.any(state.tokens_since_fired)
    assert not np.array_equal(states.sae.W_dec[0], states.sae.W_dec[1])
    np.testing.assert_array_equal(next(training.stream()), first[:, :32])


@pytest.fixture(scope="module")
def trained(recipe):
    return train(recipe(), settings())


def test_seeds_of_a_layer_are_exported_side_by_side(recipe):
    training = recipe(num_seeds=2, seed=3)
    saes = training.export(training.init())
    assert [(sae.layer, sae.metadata["seed"]) for sae in saes] == [(0, 3), (0, 4), (1, 3), (1, 4)]


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
    with pytest.raises(SourceError, match=r"W_dec.value is float32\[2,40,32\], this run has float32\[2,48,32\]"):
        train(recipe(width=48), settings(tmp_path / "run", resume=True))


def test_exported_saes_are_in_raw_units_and_measured_so(recipe, model, trained, documents):
    texts = documents(8, seed=5, shortest=10)
    training = recipe(held_out=texts)
    saes = training.export(trained)
    assert [sae.layer for sae in saes] == [0, 1] and saes[1].metadata["layer"] == 1 and saes[0].metadata["folds"] == ["input scale"]
    x = next(recipe().stream())[0]
    state = at(trained, 0)
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


def test_metrics_tell_what_the_stream_left_out(recipe, tmp_path):
    training = recipe()
    train(training, settings(tmp_path / "run"))
    stream = training.activations()
    for _ in range(12):
        next(stream)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {name: lines[-1][name] for name in stream.counts} == stream.counts
    assert lines[-1]["dropped_tokens"] > 0 == lines[-1]["damaged_tokens"]


def test_a_layer_the_model_lacks_is_refused(recipe):
    with pytest.raises(InputError, match="layer 2 is out of range"):
        recipe((0, 2))
