"""Which target features a data set fires: covered, missing, weakly covered, and the share (Qwen-Scope report, section 6, Eqs. 18-23)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csc_array

from qscope_jax.errors import InputError
from qscope_jax.features.store.feature_store import FeatureStore
from qscope_jax.features.synthesis.feature_reader import FeatureReader
from qscope_jax.features.synthesis.targets import Target, check_targets
from qscope_jax.features.text_features import TextFeatures


@dataclass(frozen=True, eq=False)
class Coverage:
    """How often texts fire each of T targets.

    Attributes:
        targets: The targets.
        counts: Texts that fire each of them.
        strongest: Largest activation of each in any text, also where it stays below the threshold.
        texts: Number of texts.
    """

    targets: tuple[Target, ...]
    counts: Int[np.ndarray, " T"]
    strongest: Float[np.ndarray, " T"]
    texts: int

    @property
    def share(self) -> float:
        """Cov(D): share of the targets that at least one text fires (Eq. 23)."""
        return float((self.counts > 0).mean())

    @property
    def covered(self) -> list[Target]:
        """Targets that a text fires, c = 1 (Eq. 18)."""
        return self.fired_by(1)

    @property
    def missing(self) -> list[Target]:
        """Targets that no text fires (Eq. 20)."""
        return self.fired_by(0, 0)

    def weak(self, below: int) -> list[Target]:
        """Targets that some texts fire, but fewer than `below`.

        Raises:
            InputError: `below` is less than 1.
        """
        if below < 1:
            raise InputError(f"weakly covered means fired by fewer than {below} texts; expected 1 or more")
        return self.fired_by(1, below - 1)

    def fired_by(self, least: int, most: int | None = None) -> list[Target]:
        """Targets that at least `least` and at most `most` texts fire."""
        return [
            target for target, count in zip(self.targets, self.counts.tolist(), strict=True) if least <= count <= (count if most is None else most)
        ]

    def by_layer(self) -> dict[int, tuple[int, int]]:
        """{layer: targets covered, targets}."""
        found: dict[int, tuple[int, int]] = {}
        for target, count in zip(self.targets, self.counts.tolist(), strict=True):
            covered, total = found.get(target.layer, (0, 0))
            found[target.layer] = (covered + (count > 0), total + 1)
        return dict(sorted(found.items()))

    def joined(self, other: "Coverage") -> "Coverage":
        """The coverage of both sets of texts together.

        Raises:
            InputError: they are about different targets.
        """
        if [target.key for target in self.targets] != [target.key for target in other.targets]:
            raise InputError("coverages of different targets cannot be joined")
        return Coverage(self.targets, self.counts + other.counts, np.maximum(self.strongest, other.strongest), self.texts + other.texts)


def coverage(targets: Sequence[Target], features: Mapping[int, TextFeatures], *, threshold: float = 0.0) -> Coverage:
    """Count the texts that fire each target, at a token that counts.

    Args:
        targets: The targets.
        features: Tables of the same texts at every layer of the targets.
        threshold: A feature fires where its activation exceeds this and the target's own threshold.

    Raises:
        InputError: no target, one that the tables lack, tables of different texts, or a negative threshold.
    """
    texts = _number_of_texts(features)
    hits = firing(targets, features, threshold=threshold)
    strongest = np.zeros(len(targets), np.float32)
    for places, columns in _columns(targets, features):
        if texts:
            strongest[places] = columns.max(axis=0).toarray().reshape(-1)
    return Coverage(tuple(targets), np.diff(hits.indptr).astype(np.int64), strongest, texts)


def firing(targets: Sequence[Target], features: Mapping[int, TextFeatures], *, threshold: float = 0.0) -> csc_array:
    """Which texts fire which targets, as a sparse table [B, T] of booleans, stored where it is true: h in the paper.

    Raises:
        InputError: as `coverage`.
    """
    if not threshold >= 0:
        raise InputError(f"threshold is {threshold}, expected 0 or more: activations are positive")
    check_targets(targets, {layer: table.num_features for layer, table in features.items()})
    texts = _number_of_texts(features)
    rows: list[np.ndarray] = [np.zeros(0, np.int64)] * len(targets)
    for places, columns in _columns(targets, features):
        for column, place in enumerate(places):
            part = slice(columns.indptr[column], columns.indptr[column + 1])
            rows[place] = columns.indices[part][columns.data[part] > max(threshold, targets[place].threshold)]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    indices = np.concatenate(rows)
    return csc_array((np.ones(len(indices), bool), indices, indptr), shape=(texts, len(targets)))


def firing_of_texts(
    targets: Sequence[Target], texts: Sequence[str], read: FeatureReader, *, threshold: float = 0.0
) -> tuple[csc_array, Float[np.ndarray, "B T"]]:
    """Read texts, of which blank ones fire nothing: which of them fire which targets, and how strongly each target is active in them.

    Raises:
        InputError: as `coverage`.
    """
    check = np.array([row for row, text in enumerate(texts) if text.strip()], np.int64)
    activations = np.zeros((len(texts), len(targets)), np.float32)
    if not check.size:
        return csc_array(activations.shape, dtype=bool), activations
    tables = read([text for text in texts if text.strip()])
    hits = firing(targets, tables, threshold=threshold)
    for places, columns in _columns(targets, tables):
        activations[np.ix_(check, np.asarray(places))] = columns.toarray()
    return csc_array((hits.data, check[hits.indices], hits.indptr), shape=activations.shape), activations


def store_coverage(targets: Sequence[Target], store: FeatureStore, *, threshold: float = 0.0, texts: Sequence[int] | None = None) -> Coverage:
    """The coverage of a store's texts, or of some of them, a shard in memory at a time.

    Raises:
        InputError: as `coverage`, a layer that the store lacks, or a text out of range.
    """
    chosen = np.arange(store.num_texts) if texts is None else np.unique(np.asarray(texts, np.int64))
    if chosen.size and not 0 <= chosen[0] <= chosen[-1] < store.num_texts:
        raise InputError(f"text {chosen[0] if chosen[0] < 0 else chosen[-1]} is out of range; {store.folder} has texts 0 to {store.num_texts - 1}")
    check_targets(targets, dict(store.num_features))
    layers = sorted({target.layer for target in targets})
    total = Coverage(tuple(targets), np.zeros(len(targets), np.int64), np.zeros(len(targets), np.float32), 0)
    first = 0
    for shard, count in enumerate(store.shard_texts):
        here = chosen[(chosen >= first) & (chosen < first + count)] - first
        first += count
        if here.size:
            tables = {layer: store.shard_features(layer, shard) for layer in layers}
            whole = here.size == count
            total = total.joined(
                coverage(targets, {layer: table if whole else table.select(here) for layer, table in tables.items()}, threshold=threshold)
            )
    return total


def strongest_contexts(
    targets: Sequence[Target], texts: Sequence[str], features: Mapping[int, TextFeatures], *, count: int = 8
) -> dict[str, list[str]]:
    """Texts that activate each target most, strongest first, by the target's key; a target that nothing activates has none.

    Raises:
        InputError: no target, or one that the tables lack.
    """
    check_targets(targets, {layer: table.num_features for layer, table in features.items()})
    columns = {layer: csc_array(table.maxima) for layer, table in features.items()}
    found = {}
    for target in targets:
        table = columns[target.layer]
        part = slice(table.indptr[target.feature], table.indptr[target.feature + 1])
        order = np.argsort(np.negative(np.asarray(table.data, np.float32)[part]), kind="stable")[:count]
        if order.size:
            found[target.key] = [texts[row] for row in table.indices[part][order]]
    return found


def _columns(targets: Sequence[Target], features: Mapping[int, TextFeatures]) -> list[tuple[list[int], csc_array]]:
    """For each layer, the places of its targets and the columns of its table of maxima that belong to them."""
    found = []
    for layer in sorted({target.layer for target in targets}):
        places = [place for place, target in enumerate(targets) if target.layer == layer]
        found.append((places, csc_array(features[layer].maxima)[:, [targets[place].feature for place in places]]))
    return found


def _number_of_texts(features: Mapping[int, TextFeatures]) -> int:
    sizes = {len(table) for table in features.values()}
    if len(sizes) != 1:
        raise InputError(f"tables of {sorted(sizes)} texts; expected tables of the same texts at every layer, and at least one")
    return sizes.pop()
