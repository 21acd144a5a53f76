import gc
import weakref

import pytest

from qscope_jax.errors import InputError
from qscope_jax.sae.layer_cache import LayerCache


class Layer:
    """Something whose lifetime can be watched."""


def test_layers_are_loaded_once_while_they_are_held():
    loaded = []
    cache = LayerCache(lambda layer: loaded.append(layer) or f"layer {layer}", max_layers=2)
    assert [cache.get(layer) for layer in (3, 3, 5, 3)] == ["layer 3", "layer 3", "layer 5", "layer 3"]
    assert loaded == [3, 5]


def test_the_least_recently_used_layer_makes_room():
    cache = LayerCache(str, max_layers=2)
    for layer in (0, 1, 0, 2):
        cache.get(layer)
    assert cache.layers == [0, 2]


def test_room_is_made_before_the_next_layer_is_loaded():
    alive: list[weakref.ref[Layer]] = []

    def load(_):
        gc.collect()
        assert sum(layer() is not None for layer in alive) < 2
        made = Layer()
        alive.append(weakref.ref(made))
        return made

    cache = LayerCache(load, max_layers=2)
    for layer in range(5):
        cache.get(layer)
    assert cache.layers == [3, 4]


def test_a_load_that_fails_is_not_remembered():
    def load(layer):
        if layer == 1:
            raise InputError("no layer 1")
        return layer

    cache = LayerCache(load, max_layers=1)
    cache.get(0)
    with pytest.raises(InputError):
        cache.get(1)
    assert cache.layers == []
    assert cache.get(0) == 0


def test_a_cache_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        LayerCache(str, max_layers=0)
