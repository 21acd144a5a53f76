"""Which features fire at the same tokens, by the Jaccard index: tokens at which both fire over tokens at which either does."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, csr_array, vstack

from qscope_jax.errors import ConfigError
from qscope_jax.features.explain.contexts import check_features
from qscope_jax.features.store.feature_store import FeatureStore, TextCode

# Entries of the tables of two features' common tokens that are in memory at a time, of 4 to 12 bytes each.
_ENTRIES = 2**25


class Cofiring(NamedTuple):
    """The partners of R features, W each, highest index first.

    Attributes:
        features: The features.
        partners: Their partners; -1 where there are fewer that ever fire with them.
        jaccard: The indices, 0 there.
        tokens: Counted tokens that this is over.
    """

    features: Int[np.ndarray, " R"]
    partners: Int[np.ndarray, "R W"]
    jaccard: Float[np.ndarray, "R W"]
    tokens: int

    def of(self, row: int) -> tuple[tuple[int, float], ...]:
        """The partners of one row, as plain values."""
        there = self.partners[row] >= 0
        return tuple(zip(self.partners[row][there].tolist(), self.jaccard[row][there].tolist(), strict=True))


def cofiring(store: FeatureStore, layer: int, features: Sequence[int], count: int = 10, *, entries: int = _ENTRIES) -> Cofiring:
    """Partners of given features, exactly: over every counted token of the store.

    Args:
        store: The store, with codes.
        layer: 0-based layer.
        features: Features.
        count: Partners of each, at most.
        entries: Pairs of features whose common tokens are counted in one pass over the codes; more take several passes.

    Raises:
        InputError: there is no such layer or feature, or the store keeps no codes.
    """
    store.check_codes()
    _check_count(count)
    wanted = check_features(store, layer, features)
    at_once = max(entries // store.num_features[layer], 1)
    parts = [_exact(store, layer, wanted[first : first + at_once], count) for first in range(0, len(wanted), at_once)]
    return _joined(parts, count)


def sampled_cofiring(store: FeatureStore, layer: int, count: int = 10, *, tokens: int = 100_000, seed: int = 0, entries: int = _ENTRIES) -> Cofiring:
    """Partners of every feature of a layer, over counted tokens drawn at random without replacement: all of them where the store has fewer.

    Args:
        store: The store, with codes.
        layer: 0-based layer.
        count: Partners of each, at most.
        tokens: Tokens drawn. Their codes are in memory.
        seed: Seed of the draw.
        entries: Pairs of features whose common tokens are counted at a time.

    Raises:
        InputError: there is no such layer, or the store keeps no codes.
        ConfigError: no token is asked for.
    """
    store.check_codes()
    _check_count(count)
    if tokens < 1:
        raise ConfigError(f"tokens is {tokens}, expected 1 or more")
    num_features = store.num_features[store.check_layer(layer)]
    fires = csr_array(vstack(list(_sample(store, layer, tokens, seed)), format="csr"))
    columns = csc_array(fires)
    totals = np.diff(columns.indptr)
    at_once = max(entries // num_features, 1)
    parts = []
    for first in range(0, num_features, at_once):
        block = np.arange(first, min(first + at_once, num_features))
        both = csr_array(columns[:, block].T @ fires)
        parts.append(_best(both, block, totals, count, len(fires.indptr) - 1))
    return _joined(parts, count)


def _exact(store: FeatureStore, layer: int, wanted: Int[np.ndarray, " R"], count: int) -> Cofiring:
    num_features = store.num_features[layer]
    both = np.zeros((len(wanted), num_features), np.int32)
    totals, tokens = np.zeros(num_features, np.int64), 0
    for _, _, code in store.code_shards(layer):
        fires = _firing(code, np.flatnonzero(code.counted), num_features)
        found = csr_array(fires[:, wanted].T @ fires).tocoo()
        both[found.row, found.col] += found.data
        totals += np.bincount(fires.indices, minlength=num_features)
        tokens += int(code.counted.sum())
    return _best(csr_array(both), wanted, totals, count, tokens)


def _sample(store: FeatureStore, layer: int, tokens: int, seed: int) -> Iterator[csr_array]:
    """Firing at tokens drawn from all that count, shard by shard."""
    counted = [int(store.shard_features(layer, shard).counted_tokens.sum()) for shard in range(len(store.shard_texts))]
    total = sum(counted)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(tokens, total), replace=False))
    first = 0
    for size, (_, _, code) in zip(counted, store.code_shards(layer), strict=True):
        begin, end = np.searchsorted(drawn, [first, first + size])
        yield _firing(code, np.flatnonzero(code.counted)[drawn[begin:end] - first], store.num_features[layer])
        first += size


def _firing(code: TextCode, rows: Int[np.ndarray, " R"], num_features: int) -> csr_array:
    """1 where a feature fires at a token, for some tokens."""
    active: Bool[np.ndarray, "R K"] = code.values[rows] > 0
    indices = code.indices[rows][active]
    indptr = np.concatenate([[0], np.cumsum(active.sum(axis=1))])
    return csr_array((np.ones(len(indices), np.int32), indices, indptr), shape=(len(rows), num_features))


def _best(both: csr_array, features: Int[np.ndarray, " R"], totals: Int[np.ndarray, " F"], count: int, tokens: int) -> Cofiring:
    """The highest indices of each row, itself left out; of equal ones the lower feature first."""
    partners, jaccard = np.full((len(features), count), -1, np.int32), np.zeros((len(features), count), np.float32)
    for row, feature in enumerate(features.tolist()):
        part = slice(both.indptr[row], both.indptr[row + 1])
        common, others = both.data[part], both.indices[part]
        common, others = common[others != feature], others[others != feature]
        index = common / (totals[feature] + totals[others] - common)
        best = np.lexsort((others, -index))[:count]
        partners[row, : len(best)], jaccard[row, : len(best)] = others[best], index[best]
    return Cofiring(features, partners, jaccard, tokens)


def _joined(parts: list[Cofiring], count: int) -> Cofiring:
    empty = Cofiring(np.zeros(0, np.int64), np.zeros((0, count), np.int32), np.zeros((0, count), np.float32), 0)
    features, partners, jaccard = (np.concatenate(column) for column in zip(*(part[:3] for part in [empty, *parts]), strict=True))
    return Cofiring(features, partners, jaccard, parts[0].tokens if parts else 0)


def _check_count(count: int) -> None:
    if count < 1:
        raise ConfigError(f"count is {count}, expected 1 partner or more")
