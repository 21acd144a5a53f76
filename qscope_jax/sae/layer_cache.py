"""A small cache of loaded layers: the least recently used one makes room before the next is loaded."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from qscope_jax.errors import InputError

T = TypeVar("T")


class LayerCache(Generic[T]):
    """Layers loaded on demand, at most `max_layers` of them held at any moment, also while one is being loaded.

    One layer of a released SAE is 0.5 to 3.4 GB, so room is made first: a `load` that fails leaves the cache one layer shorter.
    """

    def __init__(self, load: Callable[[int], T], max_layers: int) -> None:
        """Make an empty cache.

        Args:
            load: Loads one layer by its 0-based index.
            max_layers: How many to hold, at least 1.

        Raises:
            InputError: `max_layers` is below 1.
        """
        if max_layers < 1:
            raise InputError(f"max_layers is {max_layers}, expected at least 1")
        self._load = load
        self._max_layers = max_layers
        self._held: OrderedDict[int, T] = OrderedDict()

    @property
    def layers(self) -> list[int]:
        """Layers held now, the least recently used first."""
        return list(self._held)

    def get(self, layer: int) -> T:
        """The layer, loaded if it is not held; it becomes the most recently used."""
        if layer in self._held:
            self._held.move_to_end(layer)
            return self._held[layer]
        while len(self._held) >= self._max_layers:
            self._held.popitem(last=False)
        self._held[layer] = value = self._load(layer)
        return value
