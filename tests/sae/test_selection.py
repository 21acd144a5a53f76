import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import shard_tree
from qscope_jax.sae import selection
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE
from qscope_jax.sae.selection import largest_features, largest_over_shards, pre_activations


def numbers(*shapes, seed=0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(-3, 4, shape), jnp.float32) for shape in shapes]


def test_the_largest_are_those_of_all_that_count():
    x, W, b = numbers((9, 5), (40, 5), (40,))
    z = np.asarray(pre_activations(x, W, b))
    np.testing.assert_array_equal(z, np.asarray(x) @ np.asarray(W).T + np.asarray(b))
    floor, allowed = jnp.full((40,), 1, jnp.float32), jnp.arange(40, dtype=jnp.int32) % 3 > 0
    for limits, counted in (({}, z), ({"floor_F": floor}, np.where(z > 1, z, -np.inf)), ({"allowed_F": allowed}, np.where(allowed, z, -np.inf))):
        values, indices = largest_features(x, W, b, 7, **limits)
        order = np.argsort(-counted, axis=1, kind="stable")[:, :7]
        np.testing.assert_array_equal(values, np.take_along_axis(counted, order, axis=1))
        assert (np.asarray(indices) == order)[np.isfinite(values)].all()


def test_no_more_are_chosen_than_there_are():
    x, W, b = numbers((3, 5), (6, 5), (6,))
    assert largest_features(x, W, b, 50)[0].shape == (3, 6)


def test_bfloat16_encoders_are_added_up_in_float32():
    x, W, b = numbers((4, 600), (8, 600), (8,))
    assert pre_activations(x, W.astype(jnp.bfloat16), b).dtype == jnp.float32
    # Small whole numbers are exact in bfloat16, their sums are not.
    np.testing.assert_array_equal(pre_activations(x, W.astype(jnp.bfloat16), b), pre_activations(x, W, b))


@pytest.mark.parametrize("tokens", [1023, 1024, 1400])
def test_tokens_encoded_in_chunks_have_the_codes_of_all_at_once(tokens, monkeypatch):
    rng = np.random.default_rng(0)
    W, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8192, 4), (tokens, 4)))
    sae = SparseAutoencoder(W, W, jnp.zeros((8192,)), jnp.zeros((4,)), k=3)
    got = jax.jit(lambda x: sae.encode(x))(x)
    monkeypatch.setattr(selection, "_CHUNK", 10_000)
    whole = jax.jit(lambda x: sae.encode(x))(x)
    np.testing.assert_array_equal(got.indices, whole.indices)
    np.testing.assert_allclose(got.values, whole.values, rtol=1e-6)


@pytest.mark.parametrize("axes", ["tensor=2", "tensor=8", "data=2,tensor=4"])
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_features_over_shards_give_the_codes_of_one_device_ties_included(axes, activation):
    rng = np.random.default_rng(0)
    W = rng.integers(-2, 3, (64, 6)).astype(np.float32)  # small integers: many equal pre-activations, also on different shards
    threshold = jnp.full((64,), 3, jnp.float32) if activation == "jumprelu" else None
    arrays = [jnp.asarray(W), jnp.asarray(W), jnp.zeros((64,), jnp.float32), jnp.zeros((6,), jnp.float32)]
    sae = SparseAutoencoder(*arrays, k=12, activation=activation, threshold=threshold)
    x = jnp.asarray(rng.integers(-2, 3, (32, 6)), jnp.float32)
    expected = LayerSAE(sae, 0).encode(x)
    code = LayerSAE(shard_tree(sae, make_mesh(axes)), 0).encode(x)
    np.testing.assert_array_equal(code.values, expected.values)
    np.testing.assert_array_equal(np.where(code.values > 0, code.indices, -1), np.where(expected.values > 0, expected.indices, -1))


def test_encoding_over_shards_gathers_candidates_alone(abstract_arrays):
    mesh = make_mesh("tensor=8")
    rows = jax.ShapeDtypeStruct((4096, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor", None)))
    bias = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor")))
    x = jax.ShapeDtypeStruct((128, 32), jnp.float32)
    with abstract_arrays(), jax.set_mesh(mesh):
        text = jax.jit(lambda x, W, b: largest_over_shards(x, W, b, 8)).lower(x, rows, bias).compile().as_text()
    gathered = [np.prod([int(n) for n in sizes.split(",")]) for sizes in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text)]
    assert gathered and max(gathered) <= 128 * 8 * 8
