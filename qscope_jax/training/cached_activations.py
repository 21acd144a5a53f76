"""Batches of residual streams read back from an activation cache, in a new order every epoch.

Blocks of neighbouring rows are permuted over the whole cache, so that the disk reads stretches; then rows are permuted inside windows of
several batches, so that a batch mixes thousands of documents. The order depends on the cache, the seed, the epoch and these sizes alone,
not on layers, devices or processes, and any batch of it can be read without those before.
"""

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from grain import experimental
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qscope_jax.data.resumable import MANIFEST_FILE
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.training.activation_files import DTYPES, ActivationCache, read_cache
from qscope_jax.training.checkpoint import StreamState

# Files of shards that are mapped at a time: a process may have about a thousand open.
_MAPPED = 64
# Threads that copy rows out of them.
_READERS = 4
_MAX_SEED = 2**32 - 1


class CachedActivations:
    """Batches [M, N, D] from a cache: endless, seeded, and resumable exactly, at the cost of reading one window again.

    A stream as the training loop wants it, like `ActivationStream`. Every row is served once an epoch; where one epoch ends and the next
    begins, a batch may hold rows of both. Host memory: about three windows of `buffer_batches` batches.
    """

    def __init__(
        self,
        folder: str | Path,
        layers: Sequence[int] | None = None,
        batch_tokens: int = 2048,
        *,
        seed: int = 0,
        buffer_batches: int = 16,
        block_tokens: int = 16,
        mesh: Mesh | None = None,
        d_model: int | None = None,
        verify: bool = False,
    ):
        """Check the files; nothing is read before the first batch.

        Args:
            folder: A finished cache.
            layers: 0-based, in the order of the batches' first axis; default all that the cache has. Files of others need not be there.
            batch_tokens: Rows of a batch (N).
            seed: Of the order.
            buffer_batches: Batches of a window.
            block_tokens: Neighbouring rows that stay in one window. More read faster from a slow disk and mix fewer documents.
            mesh: Place batches as `PartitionSpec("fsdp", "data", None)` where layers and rows divide; each process reads its rows only.
                Default one device.
            d_model: The width that rows should have.
            verify: Compare checksums too, which reads everything.

        Raises:
            ConfigError: a size or the seed is out of range, or the cache holds less than one batch.
            InputError: a layer that the cache does not have, none, or one given twice.
            ShapeError: the cache has rows of another width.
            SourceError: this is no finished cache, or files are missing, short or changed.
        """
        for name, value in (("batch_tokens", batch_tokens), ("buffer_batches", buffer_batches), ("block_tokens", block_tokens)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, expected 1 or more")
        if not 0 <= seed <= _MAX_SEED:
            raise ConfigError(f"seed is {seed}, expected 0 to {_MAX_SEED}")
        self.cache = read_cache(folder)
        """What the manifest says."""
        self.layers = self.cache.layers if layers is None else tuple(layers)
        self.cache.check(self.layers, d_model=d_model, verify=verify)
        if self.cache.tokens < batch_tokens:
            raise ConfigError(f"{folder}: holds {self.cache.tokens} tokens, fewer than a batch of {batch_tokens}; lower batch_tokens")
        self.batch_tokens, self.buffer_batches = batch_tokens, buffer_batches
        order = RowOrder(self.cache.tokens, seed, block_tokens=block_tokens, window_tokens=batch_tokens * buffer_batches)
        self._reader = _Reader(self.cache, self.layers, order, batch_tokens, mesh)
        # What must agree for a saved place to mean the same batch.
        self._identity: dict[str, Any] = {
            "cache": hashlib.sha256((self.cache.folder / MANIFEST_FILE).read_bytes()).hexdigest()[:16], "seed": seed,
            "batch_tokens": batch_tokens, "buffer_batches": buffer_batches, "block_tokens": block_tokens,
        }  # fmt: skip
        self._dataset = self._reader.batches(ahead=buffer_batches)
        self._open({"next_index": 0})

    def __next__(self) -> Float[Array, "M N D"]:
        """The next batch, in the cache's dtype."""
        return next(self._iterator)

    def peek(self) -> Float[Array, "M N D"]:
        """The next `buffer_batches` batches as one, or those left in the epoch, without moving on: for statistics."""
        start = self.batch_tokens * self._iterator.get_state()["next_index"]
        left = self.cache.tokens - start % self.cache.tokens
        batches = min(self.buffer_batches, max(left // self.batch_tokens, 1))
        return self._reader.at(start, batches * self.batch_tokens)

    @property
    def counts(self) -> Mapping[str, int]:
        """Nothing: what was left out was so when the cache was written, and its manifest says how much."""
        return {}

    def get_state(self) -> StreamState:
        """The place: a few numbers."""
        return StreamState({}, {"stream": dict(self._identity), "place": self._iterator.get_state()})

    def set_state(self, state: StreamState) -> None:
        """Go to a place that `get_state` gave, here or in another process, on this mesh or another.

        Raises:
            InputError: the state was saved for another cache or another order, or is not such a state.
        """
        saved = state.cursor.get("stream")
        if not isinstance(saved, dict) or "place" not in state.cursor:
            raise InputError("the data state is not one that cached activations saved; restore from another checkpoint")
        if differing := [f"{key} was {saved.get(key)}, is {value}" for key, value in self._identity.items() if saved.get(key) != value]:
            raise InputError(f"the data state belongs to other batches ({'; '.join(differing)}); resume with the cache and settings of then")
        self.close()
        self._open(state.cursor["place"])

    def close(self) -> None:
        """Stop reading ahead. No batches can be asked for afterwards, except after `set_state`."""
        self._finalizer()

    def _open(self, place: dict[str, Any]) -> None:
        # A fresh iterator: what an old one has read ahead must not leak into the place. Its threads do not end by themselves.
        iterator = iter(self._dataset)
        iterator.set_state(place)
        self._opened = [iterator]
        self._finalizer = weakref.finalize(self, _close, self._opened)

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._opened:
            raise ValueError("this stream was closed; set its state, or open another")
        return self._opened[0]


def _close(opened: list[grain.DatasetIterator]) -> None:
    """Close an iterator and forget it: one that is still there when Python ends complains."""
    while opened:
        opened.pop().close()


class RowOrder:
    """The endless order in which rows are served: a function from positions to rows, of which any part can be computed alone."""

    def __init__(self, tokens: int, seed: int, *, block_tokens: int, window_tokens: int):
        """Describe the order.

        Args:
            tokens: Rows of an epoch.
            seed: Of all permutations.
            block_tokens: Neighbouring rows that are moved together.
            window_tokens: Rows that are mixed with each other after that.
        """
        self.tokens, self.seed, self.block_tokens, self.window_tokens = tokens, seed, block_tokens, window_tokens
        self.windows = -(-tokens // window_tokens)
        """Windows of an epoch; the last may be smaller."""
        self._blocks = lru_cache(maxsize=2)(self._shuffled_blocks)

    def locate(self, position: int) -> tuple[int, int]:
        """The window that a position lies in, counted over all epochs, and the place there."""
        epoch, place = divmod(position, self.tokens)
        return epoch * self.windows + place // self.window_tokens, place % self.window_tokens

    def start(self, window: int) -> int:
        """The first position of a window."""
        epoch, place = divmod(window, self.windows)
        return epoch * self.tokens + place * self.window_tokens

    def window(self, index: int) -> np.ndarray:
        """The rows of a window, in the order in which they are served."""
        epoch, place = divmod(index, self.windows)
        start = place * self.window_tokens
        rows = self._rows_by_block(epoch, np.arange(start, min(start + self.window_tokens, self.tokens)))
        return np.random.default_rng([self.seed, epoch, place]).permutation(rows)

    def _rows_by_block(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Rows at positions of an epoch whose blocks are permuted but whose rows are not."""
        blocks = self._blocks(epoch)
        # The block that holds the cache's end may be short: positions behind it count as if it were not.
        missing = len(blocks) * self.block_tokens - self.tokens
        end = (int(np.flatnonzero(blocks == len(blocks) - 1)[0]) + 1) * self.block_tokens - missing
        slots, inside = np.divmod(positions + missing * (positions >= end), self.block_tokens)
        return blocks[slots].astype(np.int64) * self.block_tokens + inside

    def _shuffled_blocks(self, epoch: int) -> np.ndarray:
        count = -(-self.tokens // self.block_tokens)
        return np.random.default_rng([self.seed, epoch]).permutation(np.arange(count, dtype=np.int32 if count < 2**31 else np.int64))


class _Reader:
    """Rows of a cache in a given order, as batches on this process's devices."""

    def __init__(self, cache: ActivationCache, layers: tuple[int, ...], order: RowOrder, batch_tokens: int, mesh: Mesh | None):
        self._cache, self._layers, self._order, self._batch_tokens, self._mesh = cache, layers, order, batch_tokens, mesh
        self._own_layers, self._own_rows = self._own(batch_tokens)
        self._map = lru_cache(maxsize=_MAPPED)(self._mapped)
        # Batches are asked for in order, so the window of the last one is all that is worth keeping.
        self._window = lru_cache(maxsize=1)(self._read_window)

    def batches(self, ahead: int) -> grain.IterDataset:
        """All batches: read into host memory by one thread, `ahead` of them in advance, and put on devices by another, one in advance."""
        indices = grain.MapDataset.range(1).repeat(None)
        on_host = indices.map_with_index(lambda index, _: self._batch(index))
        on_host = on_host.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead))
        placed = on_host.map(lambda rows: self._placed(rows, self._own_layers, self._own_rows, self._batch_tokens))
        return experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=1)

    def at(self, start: int, count: int) -> Array:
        """The rows at some positions of the order, on devices."""
        layers, own = self._own(count)
        first, place = self._order.locate(start)
        last, _ = self._order.locate(start + count - 1)
        rows = np.concatenate([self._order.window(window) for window in range(first, last + 1)])[place : place + count][own]
        values, ranks = self._read(layers, rows)
        return self._placed(values[:, ranks], layers, own, count)

    def _batch(self, index: int) -> np.ndarray:
        """This process's part of a batch, on the host."""
        out = np.empty((len(self._own_layers), len(self._own_rows), self._cache.d_model), self._cache.bits)
        position, stop, filled = index * self._batch_tokens, (index + 1) * self._batch_tokens, 0
        while position < stop:
            window, place = self._order.locate(position)
            size, own, values, ranks = self._window(window)
            end = min(place + stop - position, size)
            chosen = ranks[slice(*np.searchsorted(own, (place, end)))]
            for part, layer in zip(out, values, strict=True):
                # Not by indexing: a window of the element type bfloat16 or of whole rows would be copied far slower.
                np.take(layer, chosen, axis=0, out=part[filled : filled + len(chosen)], mode="clip")
            position, filled = position + end - place, filled + len(chosen)
        return out

    def _read_window(self, window: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Size of a window, places in it that this process serves, their rows as on disk, and the rank of each place among these."""
        rows = self._order.window(window)
        own = np.flatnonzero(np.isin((self._order.start(window) + np.arange(len(rows))) % self._batch_tokens, self._own_rows))
        return len(rows), own, *self._read(self._own_layers, rows[own])

    def _read(self, layers: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of some of the layers in the order of the disk, as bits [M, N, D], and the rank that each row asked for has there."""
        ascending = np.argsort(rows)
        ranks = np.empty_like(ascending)
        ranks[ascending] = np.arange(len(rows))
        shards, inside = np.divmod(rows[ascending], self._cache.shard_tokens)
        values = np.empty((len(layers), len(rows), self._cache.d_model), self._cache.bits)

        def fill(part: np.ndarray, layer: int, shard: int) -> None:
            start, stop = np.searchsorted(shards, (shard, shard + 1))
            np.take(self._map(layer, shard), inside[start:stop], axis=0, out=part[start:stop], mode="clip")

        # Several at a time: a disk answers one that waits for its answer no faster than it answers many.
        with ThreadPoolExecutor(_READERS, thread_name_prefix="rows") as pool:
            tasks = [
                pool.submit(fill, part, int(layer), int(shard)) for part, layer in zip(values, layers, strict=True) for shard in np.unique(shards)
            ]
            for task in tasks:
                task.result()
        return values, ranks

    def _mapped(self, layer: int, shard: int) -> np.ndarray:
        return self._cache.map_rows(self._layers[layer], shard).view(self._cache.bits)

    def _own(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the layers, and of the rows of a batch of `count`, that this process's devices hold."""
        if self._mesh is None:
            return np.arange(len(self._layers)), np.arange(count)
        sharding, shape = self._sharding(count)
        slices = sharding.addressable_devices_indices_map(shape).values()
        layers, rows = ({index for part in slices if part for index in range(shape[axis])[part[axis]]} for axis in (0, 1))
        return np.array(sorted(layers)), np.array(sorted(rows))

    def _placed(self, values: np.ndarray, layers: np.ndarray, rows: np.ndarray, count: int) -> Array:
        """A batch of `count` rows, of which this process holds `values`."""
        values = values.view(DTYPES[self._cache.dtype])
        if self._mesh is None:
            return jax.device_put(values)
        sharding, shape = self._sharding(count)

        def part(index: Any) -> np.ndarray:
            wanted = [range(size)[one] for size, one in zip(shape, index, strict=False)]
            starts = [int(np.searchsorted(held, one.start)) for held, one in zip((layers, rows), wanted, strict=False)]
            return values[starts[0] : starts[0] + len(wanted[0]), starts[1] : starts[1] + len(wanted[1])]

        return jax.make_array_from_callback(shape, sharding, part)

    def _sharding(self, count: int) -> tuple[NamedSharding, tuple[int, int, int]]:
        """Where a batch of `count` rows lies, and its shape."""
        assert self._mesh is not None
        shape = (len(self._layers), count, self._cache.d_model)
        axes = [name if size % self._mesh.shape[name] == 0 else None for name, size in zip(("fsdp", "data"), shape, strict=False)]
        return NamedSharding(self._mesh, PartitionSpec(*axes, None)), shape
