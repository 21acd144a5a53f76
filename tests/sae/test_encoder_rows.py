import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.encoder_rows import EncoderRows, encoder_rows
from qscope_jax.sae.layer_sae import LayerSAE, from_arrays

F, D = 24, 8
FEATURES = [17, 3, 23]
KINDS = {
    "topk": {"k": 2},
    "jumprelu": {"k": F, "activation": "jumprelu", "threshold": np.full(F, 5, np.float32)},
    "less b_dec": {"k": 2, "apply_b_dec_to_input": True},
}


def layer_sae(kind: str = "topk", **settings) -> LayerSAE:
    rng = np.random.default_rng(0)
    W_enc, W_dec, b_enc, b_dec = (rng.standard_normal(shape).astype(np.float32) for shape in ((F, D), (F, D), F, D))
    return from_arrays(SAEArrays(W_enc, W_dec, b_enc, b_dec, **KINDS[kind]), 5, **settings)


def streams(dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((6, D)), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_give_the_pre_activations_of_their_features_whatever_the_activation(kind, dtype):
    sae = layer_sae(kind)
    found = encoder_rows(sae, FEATURES)(streams(dtype))
    expected = sae.autoencoder.pre_activations(streams(dtype), jnp.asarray(FEATURES))
    assert found.dtype == jnp.float32 and np.min(found) < 0
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(found, sae.autoencoder.pre_activations(streams(dtype))[:, np.asarray(FEATURES)], atol=2e-6)
    np.testing.assert_array_equal(encoder_rows(sae, FEATURES).activations(streams(dtype)), np.maximum(found, 0))


def test_the_decoders_bias_is_in_the_rows_where_the_encoder_subtracts_it():
    plain, less = (encoder_rows(layer_sae(kind), FEATURES) for kind in ("topk", "less b_dec"))
    arrays = layer_sae().to_arrays()
    np.testing.assert_array_equal(plain.W_SD, less.W_SD)
    np.testing.assert_allclose(plain.b_S - less.b_S, arrays.W_enc[FEATURES].astype(np.float64) @ arrays.b_dec, atol=1e-6)


def test_rows_of_an_sae_that_is_split_over_devices_are_whole():
    whole, split = (encoder_rows(layer_sae(mesh=make_mesh(axes)), FEATURES) for axes in ("", "tensor=2"))
    np.testing.assert_array_equal(whole.W_SD, split.W_SD)
    np.testing.assert_array_equal(whole.b_S, split.b_S)


def test_bfloat16_parameters_become_float32_rows():
    sae = layer_sae()
    half = dataclasses.replace(sae, autoencoder=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sae.autoencoder))
    rows = encoder_rows(half, FEATURES)
    assert rows.W_SD.dtype == rows.b_S.dtype == jnp.float32
    np.testing.assert_array_equal(rows.W_SD, half.autoencoder.W_enc[...][np.asarray(FEATURES)].astype(jnp.float32))


def test_rows_pass_through_jit_and_their_gradient_reaches_the_stream():
    rows = encoder_rows(layer_sae(), FEATURES)

    @jax.jit
    def total(rows: EncoderRows, x: jax.Array) -> jax.Array:
        return jnp.sum(rows(x))

    np.testing.assert_allclose(jax.grad(total, argnums=1)(rows, streams()), np.tile(np.sum(rows.W_SD, axis=0), (6, 1)), rtol=1e-5, atol=1e-6)


def test_features_that_are_not_there_are_refused():
    with pytest.raises(InputError, match="feature 24 is out of range; the SAE of layer 5 has features 0 to 23"):
        encoder_rows(layer_sae(), [3, 24])
    with pytest.raises(InputError, match="feature -1 is out of range"):
        encoder_rows(layer_sae(), [-1])
    with pytest.raises(InputError, match="no feature of layer 5"):
        encoder_rows(layer_sae(), [])
