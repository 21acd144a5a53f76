"""Everything a store knows of features, a card each; fast for all features of a layer."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.explain.cofiring import Cofiring, cofiring, sampled_cofiring
from qscope_jax.features.explain.contexts import FiringTexts, Window, check_features, firing_texts, read_contexts
from qscope_jax.features.explain.feature_card import FeatureCard, GroupRate, QuantileContexts
from qscope_jax.features.store.feature_store import Dictionary, FeatureStore

# Contexts in memory at a time, of some 2 KB each. Every block is a pass over the codes.
_CONTEXTS = 2**16
# A column with more values than this is no grouping unless it is asked for.
_MOST_GROUPS = 50


@dataclass(frozen=True)
class ExplainConfig:
    """What a card holds."""

    top: int = 10
    """Contexts of highest maximum."""
    quantiles: int = 4
    """Ranges that a feature's texts are split into by their maximum, with as many texts in each."""
    per_quantile: int = 2
    """Contexts drawn at random from each; the top ones are left out."""
    window: Window = field(default_factory=Window)
    """How much of a text a context shows."""
    bins: int = 20
    """Bins of the histogram, from 0 to the maximum."""
    columns: tuple[str, ...] | None = None
    """Columns to group texts by; by default all whose few values are text, whole numbers or booleans."""
    cofiring: int = 10
    """Features that fire at the same tokens; 0 looks for none."""
    cofiring_tokens: int = 100_000
    """Tokens that these are looked for in when all features of a layer are explained. Given features are counted over the whole store."""
    seed: int = 0
    """Seed of all draws. A feature's contexts do not depend on which others are explained."""

    def __post_init__(self):
        """Check the sizes."""
        for name, least in (("top", 0), ("quantiles", 0), ("per_quantile", 0), ("bins", 1), ("cofiring", 0), ("cofiring_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {least} or more")

    @property
    def contexts(self) -> int:
        """Contexts of a feature, at most."""
        return self.top + self.quantiles * self.per_quantile


def explain_features(
    store: FeatureStore, layer: int, features: Sequence[int] | None = None, config: ExplainConfig | None = None
) -> Iterator[FeatureCard]:
    """A card for each feature, in the order given; made while they are asked for.

        for card in explain_features(read_store("store"), 4, [17]):
            print(card.density, card.top[0])

    Args:
        store: The store. Without codes there are neither contexts nor co-firing features, without a dictionary no tokens and no neighbours.
        layer: 0-based layer.
        features: Features; by default all.
        config: What a card holds.

    Raises:
        InputError: there is no such layer, feature or column.
    """
    config = config or ExplainConfig()
    wanted = check_features(store, layer, features)
    return _cards(store, layer, wanted, features is None, config, Groups(store, config.columns))


class Groups:
    """The texts' groups, column by column."""

    def __init__(self, store: FeatureStore, columns: Sequence[str] | None = None):
        """Read the columns, by default those that group texts.

        Raises:
            InputError: the store has no such column, or it holds lists or the like.
        """
        self._columns: dict[str, tuple[list[str], Int[np.ndarray, " B"]]] = {}
        for name in store.columns if columns is None else columns:
            values = store.column(name)
            plain = all(value is None or isinstance(value, str | int) for value in values)
            if columns is not None and not plain:
                raise InputError(f"{store.folder}: column {name!r} holds other things than text and whole numbers; group by another column")
            # No array of strings: it would give every row the room of the longest.
            shown = ["–" if value is None else str(value) for value in values] if plain else []
            names = sorted(set(shown))
            if plain and (columns is not None or 2 <= len(names) <= _MOST_GROUPS):
                place = {group: number for number, group in enumerate(names)}
                self._columns[name] = names, np.array([place[group] for group in shown], np.int64)

    def rates(self, found: FiringTexts, counted_tokens: Int[np.ndarray, " B"]) -> dict[str, tuple[GroupRate, ...]]:
        """How often a feature fires in each group, most firing first."""
        return {name: _rates(names, codes, found, counted_tokens) for name, (names, codes) in self._columns.items()}


def quantile_rows(size: int, quantiles: int) -> list[Int[np.ndarray, " _Q"]]:
    """Rows of texts that are sorted by maximum, split into ranges of equal size; ranges are fewer where texts are."""
    return np.array_split(np.arange(size), min(quantiles, size)) if quantiles and size else []


class _Range(NamedTuple):
    """Texts of one quantile, before their contexts are read."""

    low: float
    high: float
    size: int
    texts: list[int]


class _Draft(NamedTuple):
    """A card without contexts, and the texts that they are to be of."""

    card: FeatureCard
    top: list[int]
    ranges: list[_Range]


def _cards(
    store: FeatureStore, layer: int, wanted: Int[np.ndarray, " C"], whole: bool, config: ExplainConfig, groups: Groups
) -> Iterator[FeatureCard]:
    counted = np.concatenate([store.shard_features(layer, shard).counted_tokens for shard in range(len(store.shard_texts))])
    dictionary = store.dictionary(layer)
    partners = _partners(store, layer, wanted, whole, config)
    drafts: list[_Draft] = []
    at_once = max(_CONTEXTS // max(config.contexts, 1), 1)
    for row, found in enumerate(firing_texts(store, layer, wanted.tolist())):
        card = _card(layer, found, counted, groups, dictionary, config.bins)
        drafts.append(_draft(replace(card, cofiring=partners.of(row) if partners else ()), found, config))
        if len(drafts) == at_once:
            yield from _with_contexts(store, drafts, config.window)
            drafts = []
    yield from _with_contexts(store, drafts, config.window)


def _partners(store: FeatureStore, layer: int, wanted: Int[np.ndarray, " C"], whole: bool, config: ExplainConfig) -> Cofiring | None:
    """Features that fire with others: exactly for given ones, over a sample for a whole layer."""
    if not (config.cofiring and store.has_codes):
        return None
    if whole:
        return sampled_cofiring(store, layer, config.cofiring, tokens=config.cofiring_tokens, seed=config.seed)
    return cofiring(store, layer, wanted.tolist(), config.cofiring)


def _card(layer: int, found: FiringTexts, counted: Int[np.ndarray, " B"], groups: Groups, dictionary: Dictionary | None, bins: int) -> FeatureCard:
    """What the texts' tables and the dictionary say of a feature."""
    fires = len(found.texts) > 0
    heights, edges = np.histogram(found.maxima, bins, (0, float(found.maxima[0]))) if fires else (np.zeros(0, int), np.zeros(1))
    return FeatureCard(
        layer,
        found.feature,
        density=float(found.counts.sum() / max(counted.sum(), 1)),
        text_rate=float(len(found.texts) / max((counted > 0).sum(), 1)),
        maximum=float(found.maxima[0]) if fires else 0.0,
        mean_maximum=float(found.maxima.mean()) if fires else 0.0,
        histogram=tuple(zip(edges[:-1].tolist(), edges[1:].tolist(), heights.tolist(), strict=True)),
        groups=groups.rates(found, counted),
        promoted=_pairs(dictionary.promoted, dictionary.promoted_logits, found.feature) if dictionary else (),
        suppressed=_pairs(dictionary.suppressed, dictionary.suppressed_logits, found.feature) if dictionary else (),
        neighbours=_pairs(dictionary.neighbours, dictionary.cosines, found.feature) if dictionary else (),
    )


def _draft(card: FeatureCard, found: FiringTexts, config: ExplainConfig) -> _Draft:
    """Choose texts to show. A feature's draws depend on nothing but the seed, so a card alone is that of the whole layer."""
    generator = np.random.default_rng([config.seed, card.layer, card.feature])
    ranges = []
    for rows in quantile_rows(len(found.texts), config.quantiles):
        rest = rows[rows >= config.top]
        drawn = np.sort(generator.choice(rest, min(config.per_quantile, len(rest)), replace=False))
        ranges.append(_Range(float(found.maxima[rows[-1]]), float(found.maxima[rows[0]]), len(rows), found.texts[drawn].tolist()))
    return _Draft(card, found.texts[: config.top].tolist(), ranges)


def _with_contexts(store: FeatureStore, drafts: list[_Draft], window: Window) -> Iterator[FeatureCard]:
    """Finished cards; the contexts of all of them are read at once."""
    if not store.has_codes:
        yield from (draft.card for draft in drafts)
        return
    asked = [(draft.card.feature, text) for draft in drafts for text in (*draft.top, *(text for part in draft.ranges for text in part.texts))]
    features, texts = zip(*asked, strict=True) if asked else ((), ())
    read = iter(read_contexts(store, drafts[0].card.layer, features, texts, window) if asked else ())
    for draft in drafts:
        top = tuple(itertools.islice(read, len(draft.top)))
        ranges = [QuantileContexts(part.low, part.high, part.size, tuple(itertools.islice(read, len(part.texts)))) for part in draft.ranges]
        yield replace(draft.card, top=top, quantiles=tuple(ranges))


def _rates(names: list[str], codes: Int[np.ndarray, " B"], found: FiringTexts, counted: Int[np.ndarray, " B"]) -> tuple[GroupRate, ...]:
    of = codes[found.texts]
    size = len(names)
    texts = np.bincount(codes[counted > 0], minlength=size)
    tokens = np.bincount(codes, counted, minlength=size)
    rates = np.bincount(of, minlength=size) / np.maximum(texts, 1)
    densities = np.bincount(of, found.counts, minlength=size) / np.maximum(tokens, 1)
    means = np.bincount(of, found.maxima, minlength=size) / np.maximum(texts, 1)
    order = np.lexsort((-densities, -rates))
    columns = (texts.tolist(), rates.tolist(), densities.tolist(), means.tolist())
    return tuple(GroupRate(names[group], *(column[group] for column in columns)) for group in order.tolist())


def _pairs(names: Integer[np.ndarray, "F W"], values: Float[np.ndarray, "F W"], feature: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(names[feature].tolist(), values[feature].tolist(), strict=True))
