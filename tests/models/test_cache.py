import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.cache import init_cache


@pytest.mark.parametrize(("period", "repeats"), [(1, 4), (2, 2), (4, 1)])
def test_an_empty_cache_has_room_for_every_layer(tiny_config, period, repeats):
    cache = init_cache(tiny_config(layers=4, period=period, dtype="bfloat16"), batch=3, slots=7)
    assert len(cache.layers) == period
    assert {leaf.shape for leaf in jax.tree.leaves(cache.layers)} == {(repeats, 3, 2, 7, 12)}
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    assert cache.segment_ids_BS.shape == (3, 7) and not np.any(cache.segment_ids_BS)
    assert int(cache.slot) == 0 and cache.lengths_B.tolist() == [0, 0, 0]
