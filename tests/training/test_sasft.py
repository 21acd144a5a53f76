import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.sae.encoder_rows import EncoderRows
from qscope_jax.training.sasft import SASFTConfig, feature_ceiling, script_penalty


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    rows = tuple(EncoderRows(jnp.asarray(rng.standard_normal((2, 8)), jnp.float32), jnp.zeros(2)) for _ in range(3))
    return LanguageFeatures(
        language="zh",
        languages=("en", "zh", "ko"),
        layers=(1, 2, 3),
        features_MS=np.array([[4, 9], [0, 7], [3, 5]]),
        scores_MS=np.ones((3, 2), np.float32),
        alpha_MKS=rng.standard_normal((3, 3, 2)).astype(np.float32),
        tokens_K=np.array([100, 100, 100]),
        model="m",
        sae="s",
        rows=rows,
    )


def test_the_loss_holds_the_levels_that_were_measured(features):
    loss = feature_ceiling(features, SASFTConfig(weight=0.02))
    assert (loss.layers, loss.weight, loss.form, loss.aim, int(loss.target)) == ((1, 2, 3), 0.02, "paper", "reduce", 1)
    np.testing.assert_array_equal(loss.alpha_MKS, features.alpha_MKS)


def test_a_single_layer_a_single_feature_and_levels_of_zero_are_options(features):
    loss = feature_ceiling(features, SASFTConfig(layers=(2,), num_features=1, alpha="zero", aim="raise", form="code"))
    assert loss.layers == (2,) and loss.alpha_MKS.shape == (1, 3, 1) and not np.any(loss.alpha_MKS)
    np.testing.assert_array_equal(loss.rows[0].W_SD, features.rows[1].W_SD[:1])


def test_losses_that_weigh_nothing_are_none(features):
    assert feature_ceiling(features, SASFTConfig(weight=0.0)) is None
    assert script_penalty(np.array([True, False]), ("en", "zh"), "zh", 0.0) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [({"weight": -1.0}, "weight of the auxiliary loss is -1.0"), ({"form": "book"}, "form is book, expected one of paper, code"),
     ({"aim": "hold"}, "aim is hold"), ({"alpha": "max"}, "alpha is max, expected one of mean, zero"), ({"weight": float("nan")}, "weight")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        SASFTConfig(**change)


def test_a_layer_that_was_not_measured_is_refused(features):
    with pytest.raises(InputError, match="no language features of layer 7"):
        feature_ceiling(features, SASFTConfig(layers=(7,)))


def test_a_penalty_on_no_token_or_on_an_unknown_language_is_refused():
    with pytest.raises(InputError, match="no token of the vocabulary"):
        script_penalty(np.array([False, False]), ("en", "zh"), "zh", 0.1)
    with pytest.raises(InputError, match="ru, whose tokens are penalised, is not among them"):
        script_penalty(np.array([True]), ("en", "zh"), "ru", 0.1)
    with pytest.raises(ConfigError, match="penalty is -0.1"):
        script_penalty(np.array([True]), ("en", "zh"), "zh", -0.1)


def test_the_penalty_marks_the_tokens_and_the_language():
    penalty = script_penalty(np.array([True, False, True]), ("en", "zh"), "zh", 0.3)
    assert penalty.unwanted.tolist() == [True, False, True] and int(penalty.target) == 1 and penalty.weight == 0.3
