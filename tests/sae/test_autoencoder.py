import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.autoencoder import SparseAutoencoder, SparseCode, densify

N, F, D, K = 16, 96, 24, 6


def whole_numbers(seed=0, **changes) -> dict[str, np.ndarray]:
    """Parameters and streams of small whole numbers: every product is exact, so ties are ties however it is computed."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": F, "b_dec": D, "x": (N, D)}
    return {name: rng.integers(-2, 3, shape).astype(np.float32) for name, shape in shapes.items()} | changes


def random_numbers(seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(array.shape).astype(np.float32) for name, array in whole_numbers().items()}


def build(a, **settings) -> SparseAutoencoder:
    parameters = {name: jnp.asarray(a[name]) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return SparseAutoencoder(**parameters, **{"k": K, **settings})


def expected_code(z, k) -> np.ndarray:
    """The k largest positive entries of every row, lower features first among equals; the rest 0."""
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    kept = np.zeros_like(z)
    np.put_along_axis(kept, order, np.maximum(np.take_along_axis(z, order, axis=1), 0), axis=1)
    return kept


def assert_same(code, expected):
    np.testing.assert_array_equal(code.values, expected.values)
    np.testing.assert_array_equal(code.indices, expected.indices)


def identity(width, k, **settings) -> SparseAutoencoder:
    eye, zero = jnp.eye(width, dtype=jnp.float32), jnp.zeros((width,), jnp.float32)
    return SparseAutoencoder(eye, eye, zero, zero, k=k, **settings)


def test_the_two_largest_positive_pre_activations_survive():
    x = jnp.asarray([[3, -1, 0.5], [-1, 2, -3]], jnp.float32)
    code = densify(identity(3, 2).encode(x), 3)
    np.testing.assert_array_equal(code, [[3, 0, 0.5], [0, 2, 0]])


def test_codes_equal_a_plain_computation_with_ties_to_the_lower_feature():
    a = whole_numbers()
    code = build(a).encode(jnp.asarray(a["x"]))
    z = a["x"] @ a["W_enc"].T + a["b_enc"]
    expected = expected_code(z, K)
    # The case must contain what it is about: rows whose last slot was contested.
    ordered = -np.sort(-z, axis=1)
    assert np.any(ordered[:, K - 1] == ordered[:, K])
    np.testing.assert_array_equal(densify(code, F), expected)
    np.testing.assert_array_equal(np.diff(code.values, axis=1) <= 0, True)
    np.testing.assert_array_equal(build(a).decode(code), expected @ a["W_dec"] + a["b_dec"])


def test_random_streams_select_the_same_features_and_are_rebuilt_to_1e_5():
    a = random_numbers()
    sae = build(a)
    code = sae.encode(jnp.asarray(a["x"]))
    expected = expected_code(a["x"] @ a["W_enc"].T + a["b_enc"], K)
    np.testing.assert_array_equal(densify(code, F) > 0, expected > 0)
    rebuilt = expected @ a["W_dec"] + a["b_dec"]
    assert np.abs(sae.decode(code) - rebuilt).max() <= 1e-5 * np.abs(rebuilt).max()


def test_slots_without_a_positive_pre_activation_are_empty_and_decode_to_the_bias():
    a = whole_numbers(b_enc=np.full(F, -1000, np.float32))
    a["b_enc"][[5, 90]] = 1000
    sae = build(a)
    code = sae.encode(jnp.asarray(a["x"]))
    assert (np.asarray(code.values) > 0).sum(axis=1).tolist() == [2] * N
    assert np.min(code.values) == 0
    nothing = build(a | {"b_enc": np.full(F, -1000, np.float32)})
    np.testing.assert_array_equal(nothing.decode(nothing.encode(jnp.asarray(a["x"]))), np.tile(a["b_dec"], (N, 1)))


def test_a_bfloat16_stream_is_encoded_in_float32():
    a = random_numbers()
    x = jnp.asarray(a["x"], jnp.bfloat16)
    narrow, wide = (build(a).encode(stream) for stream in (x, x.astype(jnp.float32)))
    assert_same(narrow, wide)
    assert narrow.values.dtype == jnp.float32


def test_bfloat16_parameters_are_used_in_float32():
    a = random_numbers()
    half = {name: jnp.asarray(array, jnp.bfloat16) for name, array in a.items()}
    x = jnp.asarray(a["x"])
    narrow, wide = build(half), build({name: array.astype(jnp.float32) for name, array in half.items()})
    code = wide.encode(x)
    assert_same(narrow.encode(x), code)
    np.testing.assert_array_equal(narrow.decode(code), wide.decode(code))
    np.testing.assert_array_equal(narrow.pre_activations(x), wide.pre_activations(x))
    assert narrow.direction(3).dtype == jnp.float32


@pytest.mark.parametrize("activation", ["jumprelu", "batch_topk"])
def test_features_must_exceed_their_threshold_and_the_largest_of_them_fill_the_slots(activation):
    a = whole_numbers()
    threshold = np.random.default_rng(1).integers(0, 12, F).astype(np.float32)
    z = a["x"] @ a["W_enc"].T + a["b_enc"]
    assert np.any(z == threshold)
    passed = np.where(z > threshold, z, 0)
    for k in (F, K):
        code = build(a, k=k, activation=activation, threshold=jnp.asarray(threshold)).encode(jnp.asarray(a["x"]))
        np.testing.assert_array_equal(densify(code, F), expected_code(passed, k))


def test_a_negative_threshold_lets_no_negative_value_through():
    x = jnp.asarray([[-1, 2, 0]], jnp.float32)
    sae = identity(3, 3, activation="jumprelu", threshold=jnp.full((3,), -5, jnp.float32))
    np.testing.assert_array_equal(densify(sae.encode(x), 3), [[0, 2, 0]])


def test_subtracting_b_dec_from_the_input_equals_folding_it_into_the_encoder_bias():
    a = whole_numbers()
    x = jnp.asarray(a["x"])
    subtracting = build(a, apply_b_dec_to_input=True)
    folded = build(a | {"b_enc": a["b_enc"] - a["W_enc"] @ a["b_dec"]})
    np.testing.assert_array_equal(subtracting.pre_activations(x), folded.pre_activations(x))
    assert_same(subtracting.encode(x), folded.encode(x))
    plain = build(a).encode(x)
    assert not np.array_equal(densify(plain, F), densify(folded.encode(x), F))


def test_pre_activations_of_some_features_are_those_columns():
    a = whole_numbers()
    features = jnp.asarray([7, 0, 95], jnp.int32)
    for applied in (False, True):
        sae = build(a, apply_b_dec_to_input=applied)
        x = jnp.asarray(a["x"])
        np.testing.assert_array_equal(sae.pre_activations(x, features), sae.pre_activations(x)[:, features])
    np.testing.assert_array_equal(build(a).pre_activations(x), a["x"] @ a["W_enc"].T + a["b_enc"])


@pytest.mark.parametrize("applied", [False, True])
def test_gradients_reach_active_rows_only_and_equal_those_of_the_dense_form(applied):
    a = random_numbers()
    x, sae = jnp.asarray(a["x"]), build(a, apply_b_dec_to_input=applied)
    active = np.asarray(densify(sae.encode(x), F)) > 0

    def dense(sae, x):
        z = sae.pre_activations(x)
        return jnp.where(active, z, jnp.float32(0)) @ sae.W_dec[...] + sae.b_dec[...]

    def gradients(rebuild):
        return jax.jit(jax.grad(lambda sae, x: jnp.sum(jnp.sin(rebuild(sae, x))), argnums=(0, 1)))(sae, x)

    got, expected = gradients(lambda sae, x: sae.decode(sae.encode(x))), gradients(dense)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    silent = ~active.any(axis=0)
    assert silent.any() and not silent.all()
    for name in ("W_enc", "b_enc", "W_dec"):
        rows = np.asarray(getattr(got[0], name)[...])
        assert not np.any(rows[silent]) and np.all(np.abs(rows.reshape(F, -1)[~silent]).max(axis=1) > 0)


def test_a_direction_is_the_decoder_row_as_stored():
    a = whole_numbers()
    np.testing.assert_array_equal(build(a).direction(5), a["W_dec"][5])
    np.testing.assert_array_equal(jax.jit(lambda sae, f: sae.direction(f))(build(a), jnp.int32(5)), a["W_dec"][5])


def test_a_dense_code_adds_nothing_for_empty_slots():
    code = SparseCode(jnp.asarray([[2.0, 0.0, 0.0]], jnp.float32), jnp.asarray([[1, 1, 0]], jnp.int32))
    np.testing.assert_array_equal(densify(code, 3), [[0, 2, 0]])


def test_an_sae_is_a_pytree_of_its_parameters_alone():
    a = random_numbers()
    leaves, structure = jax.tree.flatten(build(a))
    assert sorted(leaf.shape for leaf in leaves) == [(D,), (F,), (F, D), (F, D)]
    again = jax.tree.unflatten(structure, leaves)
    assert (again.k, again.activation, again.apply_b_dec_to_input) == (K, "topk", False)
    assert structure != jax.tree.structure(build(a, k=K + 1))


def test_a_code_keeps_to_the_features_and_slots_it_is_allowed():
    a = random_numbers()
    sae, x = build(a), jnp.asarray(a["x"])
    allowed = jnp.arange(F) % 2 == 0
    code = sae.encode(x, k=4, allowed_F=allowed)
    z = np.where(np.asarray(allowed), sae.pre_activations(x), -np.inf)
    assert code.values.shape == (len(x), 4)
    np.testing.assert_array_equal(code.indices, np.argsort(-z, axis=1, kind="stable")[:, :4])
