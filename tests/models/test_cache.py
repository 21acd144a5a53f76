from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.models.cache import Cache, align_left, copy_rows, init_cache


@pytest.mark.parametrize(("period", "repeats"), [(1, 4), (2, 2), (4, 1)])
def test_an_empty_cache_has_room_for_every_layer(tiny_config, period, repeats):
    cache = init_cache(tiny_config(layers=4, period=period, dtype="bfloat16"), batch=3, slots=7)
    assert len(cache.layers) == period
    assert {leaf.shape for leaf in jax.tree.leaves(cache.layers)} == {(repeats, 3, 2, 7, 12)}
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    assert cache.segment_ids_BS.shape == (3, 7) and not np.any(cache.segment_ids_BS)
    assert int(cache.slot) == 0 and cache.lengths_B.tolist() == [0, 0, 0]


@pytest.fixture
def mixed(tiny_config) -> Callable[..., Cache]:
    """Factory of caches of a delta net and an attention layer, whose every number tells its place."""

    def make(batch: int, slots: int, lengths: list[int]) -> Cache:
        sizes = dict(delta_key_heads=2, delta_value_heads=4, delta_key_dim=8, delta_value_dim=6)
        empty = init_cache(tiny_config(2, mixers=("gated_delta", "full_attention"), **sizes), batch, slots)
        layers = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), empty.layers)
        ids = jnp.asarray([[0] * (slots - length) + [1] * length for length in lengths], jnp.int32)
        return Cache(layers, ids, jnp.int32(slots), jnp.asarray(lengths, jnp.int32), jnp.asarray(lengths, jnp.int32) + 1)

    return make


def test_prompts_padded_on_the_left_move_to_the_first_slots(mixed):
    before = mixed(3, 5, [2, 5, 0])
    after = align_left(before)
    assert after.segment_ids_BS.tolist() == [[1, 1, 0, 0, 0], [1] * 5, [0] * 5] and after.slot.tolist() == [2, 5, 0]
    for name in ("k_RBGSC", "v_RBGSC"):
        old, new = (getattr(cache.layers[1], name) for cache in (before, after))
        assert np.array_equal(new[:, 0, :, :2], old[:, 0, :, 3:]) and np.array_equal(new[:, 1], old[:, 1])
    assert after.layers[0] is before.layers[0]


def test_rows_that_begin_anew_are_those_copied_and_the_others_stay(mixed):
    old, source = align_left(mixed(4, 9, [3, 9, 4, 2])), align_left(mixed(2, 5, [2, 4]))
    source = jax.tree.map(lambda x: -x - 1 if x.dtype == jnp.float32 else x, source)
    new = copy_rows(old, source, jnp.asarray([-1, 1, 0, 1], jnp.int32))
    assert new.slot.tolist() == new.lengths_B.tolist() == [3, 4, 2, 4] and new.prompt_lengths_B.tolist() == [4, 5, 3, 5]
    assert new.segment_ids_BS.sum(axis=1).tolist() == [3, 4, 2, 4] and not np.any(new.segment_ids_BS[1, 4:])
    for before, other, after in zip(*(jax.tree.leaves(cache.layers) for cache in (old, source, new)), strict=True):
        assert np.array_equal(after[:, 0], before[:, 0])
        for row, place in ((1, 1), (2, 0), (3, 1)):
            copied = after[:, row]
            assert np.array_equal(copied[tuple(slice(size) for size in other[:, place].shape)], other[:, place])
