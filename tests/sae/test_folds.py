import ml_dtypes
import numpy as np
import pytest

from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.folds import b_dec_into_input, b_dec_out_of_input, gate_to_threshold, input_scale, input_scale_into_biases, unit_decoder

F, D, K = 96, 32, 8


@pytest.fixture
def x():
    return np.random.default_rng(7).standard_normal((50, D))


def made(dtype=np.float32, **settings) -> SAEArrays:
    rng = np.random.default_rng(0)
    W_dec = rng.standard_normal((F, D)) * rng.uniform(0.2, 3, (F, 1))
    drawn = {"W_enc": rng.standard_normal((F, D)), "W_dec": W_dec, "b_enc": rng.uniform(-8, 0, F), "b_dec": rng.standard_normal(D)}
    return SAEArrays(**{**{name: array.astype(dtype) for name, array in drawn.items()}, "k": K, **settings})


def jump(**settings) -> SAEArrays:
    return made(activation="jumprelu", threshold=np.random.default_rng(1).uniform(0, 3, F).astype(np.float32), k=0, **settings)


def run(sae, x) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstructions in float64."""
    W_enc, W_dec, b_enc, b_dec = (array.astype(np.float64) for array in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    z = (x - b_dec * sae.apply_b_dec_to_input) @ W_enc.T + b_enc
    if sae.activation == "topk":
        codes = np.where(z >= np.sort(z, axis=1)[:, -sae.k, None], np.maximum(z, 0), 0)
    else:
        codes = np.where(z > sae.threshold, np.maximum(z, 0), 0)
    return codes, codes @ W_dec + b_dec


def same(one, other, x, factor=1.0):
    (codes, xhat), (other_codes, other_xhat) = run(one, x), run(other, x)
    np.testing.assert_array_equal(codes > 0, other_codes > 0)
    np.testing.assert_allclose(other_codes, codes * factor, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(other_xhat, xhat, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("make", [made, jump])
def test_b_dec_is_taken_out_of_the_input_and_put_back(make, x):
    sae = make(apply_b_dec_to_input=True)
    out = b_dec_out_of_input(sae)
    back = b_dec_into_input(out)
    assert (out.apply_b_dec_to_input, back.apply_b_dec_to_input) == (False, True)
    same(sae, out, x)
    same(sae, back, x)
    assert (out.b_enc != sae.b_enc).any()
    np.testing.assert_allclose(back.b_enc, sae.b_enc, rtol=0, atol=2e-6)
    assert back.metadata["folds"] == ["b_dec_out_of_input", "b_dec_into_input"]
    assert out.W_enc is sae.W_enc and b_dec_out_of_input(out) is out and b_dec_into_input(sae) is sae


def test_a_fold_is_rounded_once():
    sae = made(apply_b_dec_to_input=True)
    exact = sae.b_enc.astype(np.float64) - sae.W_enc.astype(np.float64) @ sae.b_dec.astype(np.float64)
    np.testing.assert_array_equal(b_dec_out_of_input(sae).b_enc, exact.astype(np.float32))


@pytest.mark.parametrize(
    "dtype, expected", [(ml_dtypes.bfloat16, np.float32), (np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)]
)
def test_narrow_types_are_folded_in_float32_and_wide_ones_stay(dtype, expected, x):
    sae = made(dtype, apply_b_dec_to_input=True)
    out = b_dec_out_of_input(sae)
    assert (out.b_enc.dtype, out.W_enc.dtype) == (expected, np.dtype(dtype))
    same(sae, out, x)
    assert unit_decoder(jump(W_enc=sae.W_enc)).W_enc.dtype == expected


def test_unit_rows_keep_the_function_of_an_sae_with_thresholds(x):
    sae = jump(apply_b_dec_to_input=True)
    unit = unit_decoder(sae)
    same(sae, unit, x, np.linalg.norm(sae.W_dec.astype(np.float64), axis=1))
    assert unit.metadata["unit_norm_decoder"] and unit.metadata["folds"] == ["unit_decoder"]
    np.testing.assert_array_equal(unit_decoder(sae, threshold_is_rescaled=True).threshold, sae.threshold)


def test_unit_rows_would_change_what_a_topk_of_plain_activations_selects(x):
    assert (run(made(), x)[0] > 0).tolist() != (run(unit_decoder(made()), x)[0] > 0).tolist()


def test_a_row_of_zeros_stays_finite(x):
    sae = jump()
    W_dec = sae.W_dec.copy()
    W_dec[3] = 0
    unit = unit_decoder(jump(W_dec=W_dec))
    assert all(np.isfinite(array).all() for array in unit.tensors().values()) and not unit.W_dec[3].any()


@pytest.mark.parametrize("scale_out", [None, 0.7])
def test_an_input_scale_goes_into_the_matrices(scale_out, x):
    sae, s_out = jump(), scale_out or 0.25
    codes, xhat = run(sae, 0.25 * x)
    found, rebuilt = run(input_scale(sae, 0.25, scale_out), x)
    np.testing.assert_array_equal(found > 0, codes > 0)
    np.testing.assert_allclose(found, codes, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(rebuilt, xhat / s_out, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("fold", [input_scale, input_scale_into_biases])
@pytest.mark.parametrize("make", [made, jump])
def test_an_input_scale_is_folded_also_where_the_input_is_centred(make, fold, x):
    sae = make(apply_b_dec_to_input=True)
    codes, xhat = run(sae, 0.25 * x)
    found, rebuilt = run(fold(sae, 0.25), x)
    np.testing.assert_array_equal(found > 0, codes > 0)
    np.testing.assert_allclose(found, codes * (1 if fold is input_scale else 4), rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(rebuilt, xhat * 4, rtol=2e-5, atol=1e-4)


def test_two_scales_and_a_centred_input_do_not_go_together():
    with pytest.raises(ValueError, match="take b_dec out of the input first"):
        input_scale(made(apply_b_dec_to_input=True), 0.5, 0.6)


@pytest.mark.parametrize("flag", [True, False])
def test_a_gate_becomes_a_threshold_with_the_same_support(flag, x):
    rng = np.random.default_rng(3)
    gate_bias, mag_bias, log_r = (rng.uniform(*span, F).astype(np.float32) for span in ((-6, 1), (-3, 1), (-1, 1)))
    sae = jump(apply_b_dec_to_input=flag)
    folded = gate_to_threshold(sae, gate_bias, mag_bias, log_r)
    u = (x - sae.b_dec.astype(np.float64) * flag) @ sae.W_enc.astype(np.float64).T
    codes = np.where(u + gate_bias > 0, np.maximum(np.exp(log_r.astype(np.float64)) * u + mag_bias, 0), 0)
    found, rebuilt = run(folded, x)
    np.testing.assert_array_equal(found > 0, codes > 0)
    np.testing.assert_allclose(found, codes, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(rebuilt, codes @ sae.W_dec.astype(np.float64) + sae.b_dec, rtol=2e-5, atol=2e-5)


def test_blocks_of_a_large_matrix_fit_together(x, monkeypatch):
    sae = jump(apply_b_dec_to_input=True)
    whole = [unit_decoder(sae), b_dec_out_of_input(sae), input_scale(sae, 0.3)]
    monkeypatch.setattr("qscope_jax.sae.arrays._BLOCK_BYTES", 5 * D * 4)
    for expected, found in zip(whole, [unit_decoder(sae), b_dec_out_of_input(sae), input_scale(sae, 0.3)], strict=True):
        for name, array in expected.tensors().items():
            np.testing.assert_allclose(found.tensors()[name], array, rtol=1e-6, atol=1e-6)
