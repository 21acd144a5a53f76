import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qscope_jax.errors import ConfigError
from qscope_jax.models.decoder import Decoder
from qscope_jax.parallel.mesh import make_mesh
from qscope_jax.parallel.rules import batch_sharding, keep_rows, leaf_name, parameter_sharding, partition_spec, replicated, shard_tree


@pytest.fixture(scope="module")
def mesh():
    return make_mesh("data=2,fsdp=2,tensor=2")


def test_logical_names_become_mesh_axes(mesh):
    assert partition_spec(("vocabulary", "embed"), (8, 4), mesh) == PartitionSpec("tensor", "fsdp")
    assert partition_spec(("layers", "heads", None), (8, 4, 2), mesh) == PartitionSpec(None, "tensor", None)


def test_a_dimension_that_does_not_divide_is_replicated(mesh):
    assert partition_spec(("kv_heads", "embed"), (3, 4), mesh) == PartitionSpec(None, "fsdp")


def test_an_axis_of_one_device_splits_nothing():
    assert partition_spec(("heads", "embed"), (8, 4), make_mesh()) == PartitionSpec(None, None)


def test_one_mesh_axis_for_two_dimensions_is_refused(mesh):
    with pytest.raises(ConfigError, match="one mesh axis cannot split two dimensions"):
        partition_spec(("heads", "hidden"), (8, 8), mesh)


def test_leading_dimensions_are_stacked_layers(mesh):
    assert parameter_sharding("q_proj", (28, 8, 4), mesh).spec == PartitionSpec(None, "tensor", "fsdp")
    assert parameter_sharding("o_proj", (4, 8), mesh).spec == PartitionSpec("fsdp", "tensor")
    assert parameter_sharding("W_enc", (8, 4), mesh).spec == PartitionSpec("tensor", None)


def test_every_parameter_of_a_decoder_has_a_rule_and_keeps_its_values(tiny_config, mesh):
    abstract = jax.eval_shape(lambda: Decoder(tiny_config(1), jax.random.key(0)))
    decoder = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).random(leaf.shape), leaf.dtype), abstract)
    placed = shard_tree(decoder, mesh)
    for (path, before), after in zip(jax.tree_util.tree_flatten_with_path(decoder)[0], jax.tree.leaves(placed), strict=True):
        assert after.sharding == parameter_sharding(leaf_name(path), before.shape, mesh)
        assert np.array_equal(before, after)
    assert placed.layers[0].mixer.q_proj[...].sharding.shard_shape((1, 48, 32)) == (1, 24, 16)


def test_a_batch_is_split_over_data_and_fsdp(mesh):
    array = jax.device_put(jnp.zeros((8, 5)), batch_sharding(mesh, 2))
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 5)}
    assert {shard.data.shape for shard in jax.device_put(array, replicated(mesh)).addressable_shards} == {(8, 5)}


def test_rows_and_heads_stay_where_they_are(mesh):
    def spec(shape, *args, **settings) -> PartitionSpec:
        with jax.set_mesh(mesh):
            return jax.jit(lambda x: keep_rows(x, *args, **settings))(jnp.zeros(shape)).sharding.spec  # trailing whole dimensions are left out

    assert spec((4, 5)) == PartitionSpec(("data", "fsdp"))
    assert spec((3, 8, 2, 5), 1, heads=2) == PartitionSpec(None, ("data", "fsdp"), "tensor")
    assert spec((3, 8, 1, 5), 1, heads=2) == PartitionSpec(None, ("data", "fsdp"))
