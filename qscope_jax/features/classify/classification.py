"""A class of texts by the features that fire on it: no head and no training (Qwen-Scope, arXiv 2605.11887, section 5).

    h[i, f]  = 1 if feature f fires at a counted token of text i                       Eq. 13
    Delta_f  = P(h = 1 | positive) - P(h = 1 | negative)    on discovery texts         Eq. 14
    positive iff any of the K features of largest Delta fires                          Eq. 15, OR rule
    d(l)     = max_f Delta_f; the layer of largest d(l) is taken                       Eq. 16
    positive iff the best features of any of the m layers of largest d(l) fire         Eq. 17

Thresholds above 0 are an addition to the paper: Delta_f is then the largest that any threshold of the feature gives, so that a feature which
fires on most texts, but strongly on those of the class, is found too. Whoever calls gives discovery texts; nothing here splits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from qscope_jax.errors import ConfigError, InputError, ShapeError
from qscope_jax.features.classify.classification_scores import f1_of
from qscope_jax.features.classify.thresholds import Criterion, tune_thresholds
from qscope_jax.features.text_features import TextFeatures

Tables: TypeAlias = Mapping[int, TextFeatures]

Thresholds: TypeAlias = Literal["zero", "f1", "balanced"]

KS = (1, 2, 5, 10)
"""Numbers of features that the paper tries."""

_FOLDS = 3


class NoFeatureError(InputError):
    """No feature fires more often on texts of the class than on others."""


@dataclass(frozen=True)
class RuleConfig:
    """How a rule is chosen."""

    k: int | None = None
    """Features of each layer; None takes the one of `KS` with the highest F1 on thirds of the texts that are left out of a fit to the others."""
    layers: int = 1
    """Layers of largest d(l) that are used together."""
    by: Literal["difference", "f1"] = "difference"
    """What a layer is chosen by: its d(l), or the F1 of its own rule on thirds of the texts, as above."""
    thresholds: Thresholds = "zero"
    """What each feature must exceed: 0, or what gives the highest F1 or balanced accuracy, feature after feature."""

    def __post_init__(self):
        """Check ranges."""
        if (self.k is not None and self.k < 1) or self.layers < 1:
            raise ConfigError(f"k is {self.k} and layers is {self.layers}, expected 1 or more")


@dataclass(frozen=True)
class Term:
    """One feature of a rule.

    Attributes:
        layer: 0-based layer.
        feature: The feature.
        difference: Its Delta on the texts that the rule was fitted to; with tuned thresholds the largest over thresholds.
        threshold: It fires on a text where its largest activation exceeds this; 0 or more.
        scale: Its mean activation over the texts on which it fired, by which scores of features are made comparable.
    """

    layer: int
    feature: int
    difference: float
    threshold: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class FeatureRule:
    """A text is positive where any feature exceeds its threshold.

    Attributes:
        terms: The features, W of them, layer after layer, best first.
    """

    terms: tuple[Term, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers it reads, in the order of its terms."""
        return tuple(dict.fromkeys(term.layer for term in self.terms))

    def activations(self, tables: Tables) -> Float[np.ndarray, "B W"]:
        """Each text's largest activation of each feature.

        Raises:
            InputError: the tables lack a layer.
            ShapeError: a layer's table has fewer features than the rule needs.
        """
        columns: dict[Term, np.ndarray] = {}
        for layer in self.layers:
            if layer not in tables:
                raise InputError(f"the rule reads layer {layer}; the tables are of layers {', '.join(map(str, tables))}")
            terms = [term for term in self.terms if term.layer == layer]
            if (highest := max(term.feature for term in terms)) >= tables[layer].num_features:
                raise ShapeError(
                    f"the rule reads feature {highest} of layer {layer}, whose table has {tables[layer].num_features}; it is of another SAE"
                )
            found = tables[layer].maxima[:, [term.feature for term in terms]].toarray()
            columns |= dict(zip(terms, found.T, strict=True))
        return np.stack([columns[term] for term in self.terms], axis=1)

    def predict(self, activations_BW: Float[np.ndarray, "B W"]) -> Bool[np.ndarray, " B"]:
        """Whether each text is positive, by what `activations` gave."""
        return np.asarray(np.any(activations_BW > self._row("threshold"), axis=1))

    def score(self, activations_BW: Float[np.ndarray, "B W"]) -> Float[np.ndarray, " B"]:
        """How far the farthest feature of each text exceeds its threshold, in units of the feature's usual activation; positive texts exceed 0."""
        return ((activations_BW - self._row("threshold")) / self._row("scale")).max(axis=1)

    def strongest(self, tables: Tables, text: int) -> tuple[int, int]:
        """Layer and feature that exceed their threshold farthest in a text, or come nearest to it."""
        own = {layer: tables[layer].select([text]) for layer in self.layers}
        margins_W = (self.activations(own)[0] - self._row("threshold")) / self._row("scale")
        term = self.terms[int(np.argmax(margins_W))]
        return term.layer, term.feature

    def with_thresholds(self, activations_BW: Float[np.ndarray, "B W"], positive_B: Bool[np.ndarray, " B"], criterion: Criterion) -> "FeatureRule":
        """The same features with thresholds tuned, and scales taken, on these texts; see `tune_thresholds`."""
        tuned = tune_thresholds(activations_BW, positive_B, criterion)
        return FeatureRule(tuple(map(_rescaled, self.terms, tuned.tolist(), activations_BW.T)))

    def _row(self, name: str) -> Float[np.ndarray, " W"]:
        return np.array([getattr(term, name) for term in self.terms], np.float32)


def firing_differences(
    features: TextFeatures, positive_B: Bool[np.ndarray, " _"], rows: Int[np.ndarray, " _"] | None = None
) -> Float[np.ndarray, " F"]:
    """Delta of every feature: the share of positive texts it fires on less that of negative ones.

    Args:
        features: A layer's table.
        positive_B: The class of each of its texts.
        rows: Texts to look at; None is all.

    Raises:
        InputError: all texts are of one class.
        ShapeError: the table is of another number of texts.
    """
    classes = _classes(features, positive_B, rows)
    lengths = np.diff(features.maxima.indptr)
    hits, alarms = (np.bincount(features.maxima.indices[np.repeat(of_class_B, lengths)], minlength=features.num_features) for of_class_B in classes)
    return _difference(hits, alarms, int(classes[0].sum()), int(classes[1].sum()))


def threshold_differences(
    features: TextFeatures, positive_B: Bool[np.ndarray, " _"], rows: Int[np.ndarray, " _"] | None = None
) -> Float[np.ndarray, " F"]:
    """The largest Delta of every feature over all thresholds that it may have to exceed; 0 for one that never fires.

    Args, errors and shapes are those of `firing_differences`, whose threshold is 0.
    """
    inside_B, outside_B = _classes(features, positive_B, rows)
    looked_at_B = inside_B | outside_B
    lengths = np.diff(features.maxima.indptr)
    stored = np.repeat(looked_at_B, lengths)
    columns, values = np.asarray(features.maxima.indices)[stored], np.asarray(features.maxima.data, np.float32)[stored]
    positive = np.repeat(inside_B, lengths)[stored]
    order = np.lexsort((-values, columns))
    columns, values, positive = columns[order], values[order], positive[order]
    found_F = np.zeros(features.num_features)
    if not len(columns):
        return found_F
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    # Of each entry, texts of either class on which its feature is as active or more.
    sums = [np.concatenate([[0], np.cumsum(of_class)]) for of_class in (positive, ~positive)]
    before = np.repeat(starts, np.diff(starts, append=len(columns)))
    hits, alarms = (total[1:] - total[before] for total in sums)
    deltas = _difference(hits, alarms, int(inside_B.sum()), int(outside_B.sum()))
    # A threshold cannot part equal activations.
    parted = np.append((np.diff(columns) != 0) | (np.diff(values) != 0), True)
    found_F[columns[starts]] = np.maximum.reduceat(np.where(parted, deltas, -np.inf), starts)
    return found_F


def rule_differences(
    features: TextFeatures, positive_B: Bool[np.ndarray, " _"], rows: Int[np.ndarray, " _"] | None, thresholds: Thresholds
) -> Float[np.ndarray, " F"]:
    """What a rule with these thresholds ranks features by."""
    return (firing_differences if thresholds == "zero" else threshold_differences)(features, positive_B, rows)


def top_features(differences_F: Float[np.ndarray, " F"], count: int) -> Int[np.ndarray, " _"]:
    """The features of largest difference, best first; ties go to the lower feature, and those that fire no more often on positives are left out."""
    order = np.argsort(-differences_F, kind="stable")[:count]
    return order[differences_F[order] > 0]


def best_layers(scores: Mapping[int, float], count: int) -> list[int]:
    """The layers of largest score, best first; ties go to the lower layer."""
    return sorted(scores, key=lambda layer: (-scores[layer], layer))[:count]


def fit_rule(
    tables: Tables,
    positive_B: Bool[np.ndarray, " B"],
    config: RuleConfig | None = None,
    *,
    rows: Int[np.ndarray, " _"] | None = None,
) -> FeatureRule:
    """Choose layers and features, and tune thresholds if asked to.

    Args:
        tables: The layers to choose from.
        positive_B: The class of each text.
        config: How to choose.
        rows: Texts to fit to; None is all. The others are not looked at.

    Raises:
        InputError: all texts are of one class.
        NoFeatureError: no feature of any layer fires more often on positive texts.
        ShapeError: tables and classes differ in number.
    """
    config = config or RuleConfig()
    rows = np.arange(len(positive_B)) if rows is None else rows
    differences = {layer: rule_differences(table, positive_B, rows, config.thresholds) for layer, table in tables.items()}
    tops = {layer: float(found.max()) for layer, found in differences.items()}
    usable = {layer: top for layer, top in tops.items() if top > 0}
    if not usable:
        texts = f"{int(positive_B[rows].sum())} positive and {int((~positive_B[rows]).sum())} negative texts"
        raise NoFeatureError(
            f"no feature of layers {', '.join(map(str, tables))} fires more often on positive texts ({texts}); give other layers or texts"
        )
    candidates = KS if config.k is None else (config.k,)
    layers = {k: best_layers(usable, config.layers) for k in candidates}
    if config.by == "f1":
        own = {layer: _held_out_f1(tables, [layer], candidates, positive_B, rows, config) for layer in usable}
        layers = {k: best_layers({layer: own[layer][k] for layer in usable}, config.layers) for k in candidates}
    k = candidates[0]
    if len(candidates) > 1:
        quality = {k: _held_out_f1(tables, layers[k], (k,), positive_B, rows, config)[k] for k in candidates}
        # Of equals the fewest features.
        k = max(candidates, key=lambda k: quality[k])
    return _rule(tables, layers[k], k, positive_B, rows, differences, config)


def _held_out_f1(
    tables: Tables, layers: Sequence[int], ks: Sequence[int], positive_B: np.ndarray, rows: np.ndarray, config: RuleConfig
) -> dict[int, float]:
    """F1 of the rules over so many features of these layers, each on thirds of the rows that it was not fitted to; on all where there are too few.

    On the texts themselves more features would always seem better where thresholds are tuned.
    """
    places = np.zeros(len(rows), np.int64)
    for of_class in (True, False):
        own = positive_B[rows] == of_class
        places[own] = np.arange(own.sum()) % _FOLDS
    enough = min(positive_B[rows].sum(), (~positive_B[rows]).sum()) >= _FOLDS
    folds = [(rows[places != fold], rows[places == fold]) for fold in range(_FOLDS)] if enough else [(rows, rows)]
    found = {k: 0.0 for k in ks}
    for fitted, left_out in folds:
        differences = {layer: rule_differences(tables[layer], positive_B, fitted, config.thresholds) for layer in layers}
        for k in ks:
            rule = _rule(tables, layers, k, positive_B, fitted, differences, config)
            if rule.terms:
                found[k] += f1_of(rule.predict(rule.activations(tables)[left_out]), positive_B[left_out]) / len(folds)
    return found


def _rule(
    tables: Tables,
    layers: Sequence[int],
    k: int,
    positive_B: np.ndarray,
    rows: np.ndarray,
    differences: Mapping[int, np.ndarray],
    config: RuleConfig,
) -> FeatureRule:
    """The rule over the k best features of these layers."""
    terms = [Term(layer, int(feature), float(differences[layer][feature])) for layer in layers for feature in top_features(differences[layer], k)]
    rule = FeatureRule(tuple(terms))
    if not terms:
        return rule
    activations_BW = rule.activations(tables)[rows]
    if config.thresholds == "zero":
        return FeatureRule(tuple(map(_rescaled, rule.terms, [0.0] * len(terms), activations_BW.T)))
    return rule.with_thresholds(activations_BW, positive_B[rows], config.thresholds)


def _classes(features: TextFeatures, positive_B: np.ndarray, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Which of the texts looked at are positive, and which negative."""
    if len(positive_B) != len(features):
        raise ShapeError(f"the table of layer {features.layer} has {len(features)} texts, and {len(positive_B)} classes; give a class for each text")
    looked_at_B = np.ones(len(features), bool)
    if rows is not None:
        looked_at_B[:] = False
        looked_at_B[rows] = True
    inside_B, outside_B = positive_B & looked_at_B, ~positive_B & looked_at_B
    if not inside_B.any() or not outside_B.any():
        raise InputError(f"{looked_at_B.sum()} texts are all of one class; firing rates are compared between two")
    return inside_B, outside_B


def _difference(hits: np.ndarray, alarms: np.ndarray, positives: int, negatives: int) -> np.ndarray:
    """Share of positive texts less share of negative ones; one division of whole numbers, so that what is equal ties exactly."""
    return (hits * negatives - alarms * positives) / (positives * negatives)


def _rescaled(term: Term, threshold: float, activation_B: np.ndarray) -> Term:
    firing = activation_B[activation_B > 0]
    return replace(term, threshold=float(threshold), scale=float(firing.mean()) if len(firing) else 1.0)
