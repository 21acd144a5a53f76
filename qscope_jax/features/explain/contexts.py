"""Where features fire: their texts from the tables, then stretches of those texts around the peak from the codes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer
from scipy.sparse import coo_array, csr_array

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.explain.feature_card import Context
from qscope_jax.features.store.feature_store import TOKENS_FILE, FeatureStore, TextCode, shard_name
from qscope_jax.sae.formats.mapped_tensors import map_safetensors

# Entries of the texts' tables in memory at a time, of 12 bytes each, and as much again while they are turned.
_ENTRIES = 2**24
# A text asked for by itself costs about as much as so many that are read in passing.
_ONE_BY_ONE = 16
_LONGEST_VALUE = 100


@dataclass(frozen=True)
class Window:
    """How much of a text a context shows."""

    before: int = 24
    """Tokens before the peak."""
    after: int = 12
    """Tokens after it."""

    def __post_init__(self):
        """Check the sizes."""
        if min(self.before, self.after) < 0:
            raise ConfigError(f"a context has {self.before} tokens before its peak and {self.after} after; expected 0 or more")

    def around(self, peak: int, length: int) -> slice:
        """The stretch around a position of a text of so many tokens."""
        return slice(max(peak - self.before, 0), min(peak + self.after + 1, length))


class FiringTexts(NamedTuple):
    """The C texts in which a feature fires, highest maximum first.

    Attributes:
        feature: The feature.
        texts: Their indices in the store.
        maxima: The feature's largest activation in each.
        counts: Counted tokens of each at which it fires.
    """

    feature: int
    texts: Int[np.ndarray, " C"]
    maxima: Float[np.ndarray, " C"]
    counts: Int[np.ndarray, " C"]


def firing_texts(store: FeatureStore, layer: int, features: Sequence[int] | None = None, *, entries: int = _ENTRIES) -> Iterator[FiringTexts]:
    """For each feature the texts in which it fires, in the order of `features`.

    The texts' tables are read shard by shard, once for all features whose entries together fit into memory: once altogether for most stores.

    Args:
        store: The store.
        layer: 0-based layer.
        features: Features; by default all.
        entries: Table entries in memory at a time, of 24 bytes each.

    Raises:
        InputError: there is no such layer or feature.
    """
    wanted = check_features(store, layer, features)
    return _firing_texts(store, layer, wanted, entries)


def check_features(store: FeatureStore, layer: int, features: Sequence[int] | None) -> Int[np.ndarray, " C"]:
    """Features of a layer, by default all.

    Raises:
        InputError: there is no such layer or feature, or one is given twice.
    """
    count = store.num_features[store.check_layer(layer)]
    wanted = np.arange(count) if features is None else np.asarray(list(features), np.int64)
    if outside := [int(feature) for feature in wanted if not 0 <= feature < count]:
        raise InputError(f"feature {outside[0]} is out of range; layer {layer} of {store.folder} has features 0 to {count - 1}")
    if len(np.unique(wanted)) < len(wanted):
        raise InputError(f"features {', '.join(map(str, wanted[:20].tolist()))}: one is given twice; give each once")
    return wanted


def read_contexts(
    store: FeatureStore, layer: int, features: Sequence[int] | Int[np.ndarray, " R"], texts: Sequence[int] | Int[np.ndarray, " R"], window: Window
) -> list[Context]:
    """The stretch around a feature's highest activation in a text, for R pairs of a feature and a text, in order.

    Tokens that do not count (a text's first, outliers of the norm) show as 0. Many pairs are read in one pass over the codes, few text by text.

    Args:
        store: The store, with codes.
        layer: 0-based layer.
        features: A feature for each pair.
        texts: A text for each pair.
        window: How much to show.

    Raises:
        InputError: there is no such layer or text, or the store keeps no codes.
    """
    store.check_codes()
    pairs = np.asarray(features, np.int64), np.asarray(texts, np.int64)
    if outside := [int(text) for text in pairs[1] if not 0 <= text < store.num_texts]:
        raise InputError(f"text {outside[0]} is out of range; {store.folder} has texts 0 to {store.num_texts - 1}")
    order = np.argsort(pairs[1], kind="stable")
    about = TextFacts(store)
    found: list[Context | None] = [None] * len(order)
    bounds = np.flatnonzero(np.diff(pairs[1][order], prepend=-1))
    asked = {int(pairs[1][order[begin]]): order[begin:end] for begin, end in zip(bounds, [*bounds[1:], len(order)], strict=True)}
    for text, code, token_ids in _codes(store, layer, list(asked)):
        for pair in asked[text]:
            activation = code.activation(int(pairs[0][pair])) * code.counted
            found[pair] = _context(text, activation, int(activation.argmax()), token_ids, window, about)
    return [context for context in found if context is not None]


def read_silent_contexts(
    store: FeatureStore, layer: int, feature: int, texts: Iterable[int], count: int, window: Window, rng: np.random.Generator
) -> list[Context]:
    """Stretches around a random token in which a feature does not fire, not even at a token that does not count.

    Args:
        store: The store, with codes.
        layer: 0-based layer.
        feature: The feature.
        texts: Texts to take one stretch each from, tried in order until there are enough.
        count: Stretches, at most.
        window: How much to show.
        rng: Draws the tokens.

    Raises:
        InputError: there is no such layer or text, or the store keeps no codes.
    """
    about = TextFacts(store)
    contexts: list[Context] = []
    for text in texts:
        if len(contexts) == count:
            break
        activation, token_ids = store.code(layer, text).activation(feature), store.token_ids(text)
        context = _context(text, activation, int(rng.integers(len(token_ids))), token_ids, window, about)
        if not any(context.activations):
            contexts.append(context)
    return contexts


class TextFacts:
    """A text's own columns as text, read once."""

    def __init__(self, store: FeatureStore):
        """Nothing is read yet."""
        self._store = store
        self._columns: dict[str, list[Any]] | None = None
        self._known: dict[int, Mapping[str, str]] = {}

    def __call__(self, text: int) -> Mapping[str, str]:
        """What is known of a text: short values only, long ones cut."""
        if self._columns is None:
            self._columns = {name: self._store.column(name) for name in self._store.columns}
        if text not in self._known:
            values = {name: column[text] for name, column in self._columns.items()}
            self._known[text] = {name: _short(str(value)) for name, value in values.items() if isinstance(value, str | int | float)}
        return self._known[text]


def _firing_texts(store: FeatureStore, layer: int, wanted: Int[np.ndarray, " C"], entries: int) -> Iterator[FiringTexts]:
    sizes = np.zeros(store.num_features[layer], np.int64)
    for shard in range(len(store.shard_texts)):
        sizes += np.bincount(store.shard_features(layer, shard).maxima.indices, minlength=len(sizes))
    # Blocks of consecutive features that together stay below the bound; one that exceeds it alone is a block of its own.
    begin, total = 0, 0
    for end, size in enumerate(sizes[wanted]):
        if end > begin and total + size > entries:
            yield from _block(store, layer, wanted[begin:end])
            begin, total = end, 0
        total += int(size)
    yield from _block(store, layer, wanted[begin:])


def _block(store: FeatureStore, layer: int, features: Int[np.ndarray, " C"]) -> Iterator[FiringTexts]:
    """The columns of some features, turned into rows."""
    place = np.full(store.num_features[layer], -1, np.int32)
    place[features] = np.arange(len(features))
    parts: list[tuple[np.ndarray, ...]] = [(*(np.zeros(0, np.int32),) * 3, np.zeros(0, np.float32))]
    first = 0
    for shard, size in enumerate(store.shard_texts):
        table = store.shard_features(layer, shard)
        local = place[table.maxima.indices]
        kept = local >= 0
        rows = np.repeat(np.arange(first, first + size, dtype=np.int32), np.diff(table.maxima.indptr))
        parts.append((local[kept], rows[kept], np.asarray(table.firing_counts.data)[kept], np.asarray(table.maxima.data)[kept]))
        first += size
    of, text, count, maximum = (np.concatenate(column) for column in zip(*parts, strict=True))
    # SciPy turns a table by counting, which is several times faster than sorting it.
    turned = csr_array(coo_array((np.arange(len(of)), (of, text)), shape=(len(features), max(first, 1))))
    places_of: Int[np.ndarray, " E"] = np.asarray(turned.data)
    for row, feature in enumerate(features.tolist()):
        entries = places_of[turned.indptr[row] : turned.indptr[row + 1]]
        entries = entries[np.argsort(-maximum[entries], kind="stable")]
        yield FiringTexts(feature, text[entries], maximum[entries], count[entries])


def _codes(store: FeatureStore, layer: int, texts: list[int]) -> Iterator[tuple[int, TextCode, Integer[np.ndarray, " T"]]]:
    """The codes and tokens of texts, given in ascending order."""
    if len(texts) * _ONE_BY_ONE < store.num_texts:
        for text in texts:
            yield text, store.code(layer, text), store.token_ids(text)
        return
    for shard, (first, offsets, code) in enumerate(store.code_shards(layer)):
        token_ids = map_safetensors(store.folder / shard_name(shard) / TOKENS_FILE)["token_ids"]
        begin, end = np.searchsorted(texts, [first, first + len(offsets) - 1])
        for text in texts[begin:end]:
            span = slice(offsets[text - first], offsets[text - first + 1])
            yield text, TextCode(code.values[span], code.indices[span], code.counted[span]), token_ids[span]


def _context(
    text: int, activation: Float[np.ndarray, " T"], peak: int, token_ids: Integer[np.ndarray, " T"], window: Window, about: TextFacts
) -> Context:
    part = window.around(peak, len(token_ids))
    return Context(text, peak - part.start, part.start, tuple(token_ids[part].tolist()), tuple(activation[part].tolist()), about(text))


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else value[: _LONGEST_VALUE - 1] + "…"
