import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import PartitionSpec

from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.shards import Shards
from qscope_jax.sae.topk import batch_winners, block_top_k, shard_winners, top_k

# Few distinct values, so that nearly every row is full of ties, and rows of nothing but zeros or -inf occur.
VALUES = st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
blockwise = jax.jit(block_top_k, static_argnums=(1, 2))
whole = jax.jit(jax.lax.top_k, static_argnums=1)


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(arrays.arrays(np.float32, (3, 48), elements=VALUES))
def test_block_selection_equals_top_k_with_ties_zeros_negatives_and_infinities(z):
    assert_same(blockwise(z, 5, 8), whole(z, 5))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(arrays.arrays(np.float32, (16, 48), elements=VALUES))  # rows in parts
def test_as_many_slots_as_blocks_are_enough(z):
    assert_same(blockwise(z, 6, 8), whole(z, 6))


@pytest.mark.parametrize("fill", [0.0, -np.inf, -1.0, 7.0])
def test_equal_values_go_to_the_lowest_features(fill):
    _, indices = top_k(jnp.full((2, 1024), fill, jnp.float32), 6)
    np.testing.assert_array_equal(indices, np.tile(np.arange(6), (2, 1)))


@pytest.mark.parametrize(
    "rows, width, k",
    [(5, 64 * 12, 6), (3, 64 * 11, 6), (7, 1000, 4), (1, 64 * 30, 1), (4, 10, 10), (2, 2048, 1024)],
    ids=["blocks", "too few blocks", "no multiple of the block", "one", "all of them", "half of them"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_shape_equals_top_k_of_the_row_in_float32(rows, width, k, dtype):
    z = jnp.asarray(np.random.default_rng(width).standard_normal((rows, width)), dtype)
    assert_same(top_k(z, k), whole(z.astype(jnp.float32), k))


def test_wide_rows_are_not_ranked_as_a_whole():
    program = jax.make_jaxpr(lambda z: top_k(z, 4))(jnp.zeros((2, 4096), jnp.float32))
    ranked = [equation.invars[0].aval.shape for equation in program.eqns if equation.primitive.name == "top_k"]
    assert ranked == [(2, 64), (2, 256)]


def test_a_nan_comes_first_and_is_not_hidden():
    z = jnp.zeros((1, 1024), jnp.float32).at[0, 700].set(jnp.nan).at[0, 3].set(9)
    values, indices = top_k(z, 2)
    assert np.isnan(values[0, 0]) and indices[0].tolist() == [700, 3]


def over_mesh(axes, function):
    """A function of Shards and of a device's part of [tokens, features], as one of the whole."""
    mesh = make_mesh(axes)
    spec = PartitionSpec("data", "tensor")
    return jax.jit(jax.shard_map(lambda z: function(Shards.of(mesh), z), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def kept(values, indices, winners, features) -> jax.Array:
    """Winners' values in their places, [N, F]."""
    rows = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((values.shape[0], features)).at[rows, indices].add(jnp.where(winners, values, jnp.float32(0)))


@pytest.mark.parametrize("axes", ["tensor=2", "tensor=8", "data=2,tensor=4"])
def test_winners_over_shards_are_those_of_one_device_ties_included(axes):
    def select(shards, z):
        values, indices = top_k(z, min(5, z.shape[1]))
        return kept(values, indices, shard_winners(values, 5, shards), z.shape[1])

    z = np.random.default_rng(0).integers(-2, 4, (64, 32)).astype(np.float32)
    expected = np.zeros_like(z)
    order = np.argsort(-z, axis=1, kind="stable")[:, :5]
    np.put_along_axis(expected, order, np.take_along_axis(z, order, axis=1), axis=1)
    np.testing.assert_array_equal(over_mesh(axes, select)(jnp.asarray(z)), expected)


@pytest.mark.parametrize("axes", ["data=1", "data=4", "tensor=4", "data=2,tensor=4"])
@pytest.mark.parametrize("total", [1, 40, 150, 100_000])
def test_winners_of_a_batch_are_its_largest_positive_values_ties_to_the_earlier(axes, total):
    def select(shards, z):
        values, indices = top_k(z, z.shape[1])
        return kept(values, indices, batch_winners(jnp.maximum(values, 0), total, shards)[0], z.shape[1])

    z = np.random.default_rng(0).integers(-2, 4, (24, 16)).astype(np.float32)
    expected = np.zeros(z.size, np.float32)
    # Equal values win by token, and within one by feature.
    order = np.argsort(-z.reshape(-1), kind="stable")[:total]
    expected[order] = np.maximum(z.reshape(-1)[order], 0)
    np.testing.assert_array_equal(over_mesh(axes, select)(jnp.asarray(z)), expected.reshape(z.shape))


def test_the_least_winner_is_told_and_is_0_where_none_is_positive():
    z = jnp.asarray([[3.0, 0.5], [2.0, 0.0]], jnp.float32)
    assert batch_winners(z, 2, Shards())[1] == 2.0
    winners, least = batch_winners(jnp.zeros((2, 2), jnp.float32), 2, Shards())
    assert least == 0 and not winners.any()
