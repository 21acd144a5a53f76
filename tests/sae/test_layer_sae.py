import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.sae import layer_sae
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.layer_sae import SAECollection, from_arrays, load_sae
from qscope_jax.sae.formats.qwen_scope import write_layer
from qscope_jax.sae.formats.own_format import write_folder

F, D, K = 1024, 12, 5
LAYERS = (0, 1, 3)


def made(layer=0, **settings) -> SAEArrays:
    rng = np.random.default_rng(layer)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in dict(W_enc=(F, D), W_dec=(F, D), b_enc=F, b_dec=D).items()}
    return SAEArrays(**tensors, **{"k": K, "metadata": {"layer": layer, "source": "here"}, **settings})


@pytest.fixture(params=["Qwen-Scope", "own"])
def folder(request, tmp_path):
    """Layers 0, 1 and 3 in either format."""
    path = tmp_path / f"SAE-Res-Tiny-W1K-L0_{K}"
    if request.param == "own":
        write_folder(path, {layer: made(layer) for layer in LAYERS})
    else:
        path.mkdir()
        for layer in LAYERS:
            write_layer(path / f"layer{layer}.sae.pt", made(layer))
    return path


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(9).standard_normal((6, D)), jnp.float32)


def test_a_loaded_sae_holds_what_was_written(folder, x):
    sae, expected = load_sae(folder, 3), made(3)
    assert (sae.layer, sae.k, sae.num_features, sae.d_model) == (3, K, F, D)
    back = sae.to_arrays()
    for name, array in expected.tensors().items():
        np.testing.assert_array_equal(getattr(back, name), array, strict=True)
    assert (back.k, back.activation, back.apply_b_dec_to_input, back.threshold) == (K, "topk", False, None)
    np.testing.assert_array_equal(sae.direction(17), expected.W_dec[17])
    # Of a released file W_dec is transposed; codes would be finite all the same, and wrong.
    code = sae.encode(x)
    z = np.asarray(x, np.float64) @ expected.W_enc.T + expected.b_enc
    np.testing.assert_array_equal(np.sort(code.indices, axis=1), np.sort(np.argsort(-z, axis=1)[:, :K], axis=1))
    rebuilt = np.einsum("nk,nkd->nd", code.values, expected.W_dec[np.asarray(code.indices)]) + expected.b_dec
    np.testing.assert_allclose(sae.decode(code), rebuilt, rtol=1e-5, atol=1e-5)


def test_leading_axes_are_flattened_to_tokens(x):
    sae = from_arrays(made(), 0)
    flat = sae.encode(x)
    for stacked in (x.reshape(2, 3, D), np.asarray(x).reshape(3, 1, 2, D)):
        np.testing.assert_array_equal(sae.encode(stacked).indices, flat.indices)
        np.testing.assert_array_equal(sae.encode(stacked).values, flat.values)
    assert sae.encode(x[0]).values.shape == (1, K)


def test_one_compilation_serves_all_layers(x, count_compilations):
    saes = [from_arrays(made(layer), layer) for layer in range(3)]
    saes[0].decode(saes[0].encode(x))
    with count_compilations() as compilations:
        for sae in saes[1:]:
            sae.decode(sae.encode(x))
    assert compilations.count == 0


def test_the_layer_may_be_left_out_where_there_is_one(tmp_path):
    write_folder(tmp_path / "one", {2: made(2)})
    assert load_sae(tmp_path / "one").layer == 2


def test_a_file_that_does_not_name_its_layer_needs_one(tmp_path):
    write_layer(tmp_path / "ae.pt", made())
    with pytest.raises(InputError, match="pass layer="):
        load_sae(tmp_path / "ae.pt", k=K)
    assert load_sae(tmp_path / "ae.pt", 4, k=K).layer == 4


def test_k_given_by_the_caller_wins(folder, x):
    assert load_sae(folder, 0, k=3).encode(x).values.shape == (6, 3)


def test_a_layer_that_is_not_there_is_named_with_those_that_are(folder):
    with pytest.raises(InputError, match="no layer 2; it holds 0-1, 3"):
        load_sae(folder, 2)
    with pytest.raises(InputError, match="no SAE for layer 2; it has layers 0, 1, 3"):
        SAECollection(folder)[2]


@pytest.mark.parametrize("feature", [-1, F])
def test_a_feature_out_of_range_is_refused_not_wrapped(feature):
    sae = from_arrays(made(), 7)
    with pytest.raises(InputError, match=f"feature {feature} is out of range; the SAE of layer 7 has features 0 to {F - 1}"):
        sae.direction(feature)


def test_streams_of_another_width_are_refused(x):
    sae = from_arrays(made(), 0)
    with pytest.raises(ShapeError, match="here: reads residual streams 12 wide, but these residual streams has width 11"):
        sae.encode(x[:, :11])


def test_an_sae_without_slots_is_refused_and_says_what_to_give():
    arrays = made(activation="jumprelu", threshold=np.zeros(F, np.float32), k=0)
    with pytest.raises(InputError, match="k is 0.*pass k="):
        from_arrays(arrays, 0)


def test_a_threshold_survives_the_way_to_the_device_and_back(tmp_path):
    threshold = np.linspace(0, 3, F, dtype=np.float32)
    write_folder(tmp_path / "a", {0: made(activation="jumprelu", threshold=threshold, apply_b_dec_to_input=True)})
    back = load_sae(tmp_path / "a", 0).to_arrays()
    np.testing.assert_array_equal(back.threshold, threshold, strict=True)
    assert (back.activation, back.apply_b_dec_to_input) == ("jumprelu", True)


def test_a_collection_loads_a_layer_when_asked_and_lets_the_least_recent_go(folder, monkeypatch):
    loads = []
    load = layer_sae.load_sae
    monkeypatch.setattr(layer_sae, "load_sae", lambda source, layer, **settings: loads.append(layer) or load(source, layer, **settings))
    saes = SAECollection(folder, max_layers=2)
    assert saes.layers == [0, 1, 3] and loads == []
    first = saes[0]
    saes[1]
    assert saes[0] is first and loads == [0, 1]
    assert saes[3].layer == 3
    assert saes[0] is first and loads == [0, 1, 3]
    assert saes[1].layer == 1 and loads == [0, 1, 3, 1]


def test_features_are_spread_over_the_tensor_axis_and_codes_do_not_change(x):
    whole, spread = from_arrays(made(), 0), from_arrays(made(), 0, make_mesh("tensor=2"))
    assert spread.autoencoder.W_enc[...].sharding.shard_shape((F, D)) == (F // 2, D)
    assert spread.autoencoder.b_dec[...].sharding.is_fully_replicated
    got, expected = spread.encode(x), whole.encode(x)
    np.testing.assert_array_equal(got.indices, expected.indices)
    np.testing.assert_allclose(got.values, expected.values, rtol=1e-6)
    np.testing.assert_allclose(spread.decode(got), whole.decode(expected), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(spread.to_arrays().W_dec, made().W_dec)
