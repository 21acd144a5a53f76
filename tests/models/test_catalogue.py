import math

import jax
import pytest

from qscope_jax.models.cache import init_cache
from qscope_jax.models.catalogue import model_size, published_sizes
from qscope_jax.models.decoder import Decoder


@pytest.fixture(scope="module")
def sizes():
    return published_sizes()


def test_a_count_is_that_of_the_arrays(tiny_config):
    for config in (tiny_config(), tiny_config(tie_embeddings=True, dtype="float16")):
        size = model_size("tiny", config)
        arrays = jax.tree.leaves(Decoder(config, jax.random.key(0)))
        assert size.parameters == sum(math.prod(array.shape) for array in arrays) and size.bytes_bfloat16 == 2 * size.parameters


def test_cache_bytes_are_what_another_slot_takes(tiny_config):
    config = tiny_config(dtype="bfloat16")
    grown, small = (sum(leaf.nbytes for leaf in jax.tree.leaves(init_cache(config, 1, slots).layers)) for slots in (64, 16))
    size = model_size("tiny", config)
    assert 48 * size.cache_bytes_per_token == grown - small and size.state_bytes == small - 16 * size.cache_bytes_per_token == 0


def test_grouped_heads_make_the_cache(sizes):
    # Keys and values of 8 heads of width 128 in 28 layers, two bytes each.
    assert sizes["Qwen3-1.7B"].cache_bytes_per_token == 2 * 8 * 128 * 28 * 2


def test_a_delta_net_has_a_state_that_does_not_grow(sizes):
    # 18 layers of 16 heads of 128 x 128 in float32, and 3 tokens of convolution over 6144 channels; keys and values in the 6 others.
    assert sizes["Qwen3.5-2B"].state_bytes == 18 * (16 * 128 * 128 * 4 + 3 * 6144 * 2)
    assert sizes["Qwen3.5-2B"].cache_bytes_per_token == 6 * 2 * 2 * 256 * 2
