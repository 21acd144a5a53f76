import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.shards import Shards

ROWS, COLUMNS = 8, 4


def on_mesh(axes, function, out) -> jax.Array:
    """What `function` of a device's Shards and its part of [8, 4] gives, tokens over data and features over tensor."""
    mesh = make_mesh(axes)
    x = jnp.arange(ROWS * COLUMNS, dtype=jnp.int32).reshape(ROWS, COLUMNS)
    over = jax.shard_map(
        lambda part: function(Shards.of(mesh), part), mesh=mesh, in_specs=PartitionSpec("data", "tensor"), out_specs=out, check_vma=False
    )
    return jax.jit(over)(x)


X = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
MESHES = ("data=1", "data=4", "tensor=4", "data=2,tensor=2", "data=2,fsdp=2,tensor=2")


@pytest.mark.parametrize("axes", MESHES)
def test_sums_and_gathers_are_those_of_the_whole(axes):
    np.testing.assert_array_equal(on_mesh(axes, lambda s, x: s.sum_tokens(jnp.sum(x, axis=0)), PartitionSpec("tensor")), X.sum(axis=0))
    np.testing.assert_array_equal(on_mesh(axes, lambda s, x: s.sum_features(jnp.sum(x, axis=1)), PartitionSpec("data")), X.sum(axis=1))
    assert on_mesh(axes, lambda s, x: s.sum(jnp.sum(x)), PartitionSpec()) == X.sum()
    assert on_mesh(axes, lambda s, x: s.largest(jnp.max(x)), PartitionSpec()) == X.max()
    np.testing.assert_array_equal(on_mesh(axes, lambda s, x: s.gather_features(x), PartitionSpec("data")), X)
    np.testing.assert_array_equal(on_mesh(axes, lambda s, x: s.any_token(jnp.any(x == 30, axis=0)), PartitionSpec("tensor")), [0, 0, 1, 0])


@pytest.mark.parametrize("axes", MESHES)
def test_a_device_knows_its_place_and_how_many_there_are(axes):
    mesh = make_mesh(axes)
    counts = on_mesh(axes, lambda s, x: jnp.stack([jnp.int32(s.all_tokens(x.shape[0])), jnp.int32(s.all_features(x.shape[1]))]), PartitionSpec())
    np.testing.assert_array_equal(counts, [ROWS, COLUMNS])
    places = on_mesh(axes, lambda s, x: s.feature_shard[None], PartitionSpec("tensor"))
    np.testing.assert_array_equal(places, np.arange(mesh.shape["tensor"]))
    before = on_mesh(axes, lambda s, x: s.earlier_tokens(jnp.sum(x, dtype=jnp.int32))[None], PartitionSpec("data"))
    own = [part[:, : COLUMNS // mesh.shape["tensor"]].sum() for part in np.split(X, mesh.shape["data"])]
    np.testing.assert_array_equal(before, np.cumsum([0, *own[:-1]]))
