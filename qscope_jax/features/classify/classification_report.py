"""What is worth knowing of classifying by features: how it varies with layer and number of features, with the language, and with little data.

Every choice is made on discovery texts; what is best on the evaluation texts themselves is called `hindsight`, as the paper reports it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float

from qscope_jax.errors import InputError
from qscope_jax.features.classify.classification import (
    KS,
    FeatureRule,
    NoFeatureError,
    RuleConfig,
    Tables,
    Thresholds,
    best_layers,
    firing_differences,
    fit_rule,
    top_features,
)
from qscope_jax.features.classify.classification_scores import BinaryScores, binary_scores, f1_of
from qscope_jax.features.classify.labelled_data import LabelledHalves

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the discovery texts that `data_efficiency` tries."""
MOST_LAYERS = 5
"""Numbers of layers, from 1, that `multi_layer` tries."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """Single-layer rules for M layers and several numbers of features.

    Attributes:
        layers: The layers, ascending.
        ks: The numbers of features.
        differences: d(l), the largest difference of each layer on discovery texts.
        features: For each layer its features, best first, as many as the largest number.
        discovery_f1: F1 on discovery texts.
        evaluation_f1: F1 on evaluation texts.
    """

    layers: tuple[int, ...]
    ks: tuple[int, ...]
    differences: tuple[float, ...]
    features: tuple[tuple[int, ...], ...]
    discovery_f1: Float[np.ndarray, "M K"]
    evaluation_f1: Float[np.ndarray, "M K"]

    @property
    def by_difference(self) -> int:
        """The layer of largest d(l)."""
        return best_layers(dict(zip(self.layers, self.differences, strict=True)), 1)[0]

    def chosen(self, how: str) -> tuple[int, int]:
        """Layer and number of features of highest F1 on `discovery` texts, or on evaluation texts in `hindsight`; of equals the lowest."""
        scores = self.discovery_f1 if how == "discovery" else self.evaluation_f1
        layer, k = np.unravel_index(int(np.argmax(scores)), scores.shape)
        return self.layers[layer], self.ks[k]


def sweep(tables: Tables, halves: LabelledHalves, ks: Sequence[int] = KS, thresholds: Thresholds = "zero") -> Sweep:
    """Rules for every layer and number of features. A layer without a feature for the class calls nothing positive.

    Raises:
        InputError: all texts of a half are of one class.
    """
    layers = tuple(sorted(tables))
    tops, features = [], []
    scores = np.zeros((2, len(layers), len(ks)))
    for m, layer in enumerate(layers):
        try:
            rule = fit_rule({layer: tables[layer]}, halves.positive_B, RuleConfig(max(ks), thresholds=thresholds), rows=halves.discovery)
        except NoFeatureError:
            tops.append(0.0)
            features.append(())
            continue
        tops.append(rule.terms[0].difference)
        features.append(tuple(term.feature for term in rule.terms))
        activations_BW = rule.activations(tables)
        for (h, half), (j, k) in product(enumerate((halves.discovery, halves.evaluation)), enumerate(ks)):
            # Thresholds are tuned one after the other, so that the rule over fewer features is the beginning of this one.
            called_B = FeatureRule(rule.terms[:k]).predict(activations_BW[half, :k])
            scores[h, m, j] = f1_of(called_B, halves.positive_B[half])
    return Sweep(layers, tuple(ks), tuple(tops), tuple(features), scores[0], scores[1])


def score_rule(rule: FeatureRule, tables: Tables, halves: LabelledHalves, *, samples: int = 1000, seed: int = 0) -> BinaryScores:
    """Scores of a rule on the evaluation half; see `binary_scores`."""
    activations_BW = rule.activations(tables)[halves.evaluation]
    truth_B = halves.positive_B[halves.evaluation]
    return binary_scores(truth_B, rule.predict(activations_BW), rule.score(activations_BW), samples=samples, seed=seed)


def multi_layer(tables: Tables, halves: LabelledHalves, *, samples: int = 1000, seed: int = 0) -> dict[int, BinaryScores]:
    """For m = 1, 2, ... the rule over the best feature of each of the m layers of largest d(l) (Eq. 17).

    Raises:
        InputError: no feature of any layer fires more often on positive texts.
    """
    found = {}
    for count in range(1, min(MOST_LAYERS, len(tables)) + 1):
        rule = fit_rule(tables, halves.positive_B, RuleConfig(k=1, layers=count), rows=halves.discovery)
        if len(rule.layers) == count:
            found[count] = score_rule(rule, tables, halves, samples=samples, seed=seed)
    return found


@dataclass(frozen=True, eq=False)
class Transfer:
    """Rules found on one language and applied to others.

    Attributes:
        languages: L names.
        layers: The layer that each language's rule reads.
        f1: Rows are the language a rule was found on, columns the one it is scored on.
    """

    languages: tuple[str, ...]
    layers: tuple[int, ...]
    f1: Float[np.ndarray, "L L"]


def transfer(tables: Tables, halves: Mapping[str, LabelledHalves], config: RuleConfig | None = None) -> Transfer:
    """Fit a rule, its layer included, on each language's discovery texts, and score it on the evaluation texts of all; NaN where none is found."""
    languages = tuple(halves)
    f1, layers = np.full((len(languages), len(languages)), np.nan), []
    for row, source in enumerate(languages):
        try:
            rule = fit_rule(tables, halves[source].positive_B, config, rows=halves[source].discovery)
        except NoFeatureError:
            layers.append(-1)
            continue
        called_B = rule.predict(rule.activations(tables))
        layers.append(rule.layers[0])
        f1[row] = [f1_of(called_B[target.evaluation], target.positive_B[target.evaluation]) for target in halves.values()]
    return Transfer(languages, tuple(layers), f1)


def jaccard(tables: Tables, halves: Mapping[str, LabelledHalves], count: int = 10) -> dict[int, Float[np.ndarray, "L L"]]:
    """For each layer how much the `count` best features of languages overlap: intersection / union of the two sets, 0 where both are empty."""
    found = {}
    for layer in sorted(tables):
        sets = [set(top_features(firing_differences(tables[layer], half.positive_B, half.discovery), count).tolist()) for half in halves.values()]
        found[layer] = np.array([[len(a & b) / max(len(a | b), 1) for b in sets] for a in sets])
    return found


@dataclass(frozen=True, eq=False)
class Efficiency:
    """F1 with fewer discovery texts: mean over languages, by draw.

    Attributes:
        budgets: Discovery texts of each class and language at P shares, as a mean over languages.
        chosen: With the layer chosen on the texts drawn.
        hindsight: With the layer that is best on the evaluation texts, as the paper does.
    """

    budgets: tuple[float, ...]
    chosen: Float[np.ndarray, "P S"]
    hindsight: Float[np.ndarray, "P S"]

    def kept(self, place: int, how: str = "chosen") -> float:
        """The mean F1 at a share as a share of that with all texts, which come last."""
        means = getattr(self, how).mean(axis=1)
        return float(means[place] / means[-1]) if means[-1] else float("nan")


def data_efficiency(
    tables: Tables,
    halves: Mapping[str, LabelledHalves],
    config: RuleConfig | None = None,
    *,
    shares: Sequence[float] = SHARES,
    seeds: int = 5,
) -> Efficiency:
    """Choose features on few texts of each class, drawn several times, and score them on the same evaluation texts.

    Args:
        tables: The layers to choose from.
        halves: The halves of each language; with one language give one.
        config: How the rule is chosen. For the best layer in hindsight each layer has a rule of its own.
        shares: Shares of each class's discovery texts, ascending to 1. At least one text of each class is drawn.
        seeds: Draws of each share; smaller ones are part of larger ones.

    Raises:
        InputError: shares do not ascend to 1, or all texts of a half are of one class.
    """
    check_draws(shares, seeds)
    chosen, best = (np.zeros((len(shares), seeds, len(halves))) for _ in range(2))
    budgets = np.zeros((len(shares), len(halves)))
    for j, half in enumerate(halves.values()):
        discovery, evaluation = ({layer: table.select(rows) for layer, table in tables.items()} for rows in (half.discovery, half.evaluation))
        positive_B, truth_B = half.positive_B[half.discovery], half.positive_B[half.evaluation]
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            orders = [rng.permutation(np.flatnonzero(positive_B == of_class)) for of_class in (True, False)]
            for p, share in enumerate(shares):
                rows = np.concatenate([order[: max(round(share * len(order)), 1)] for order in orders])
                budgets[p, j] = len(rows) / 2
                # Tables of the texts drawn alone, so that a fit costs no more than they do.
                drawn = {layer: table.select(rows) for layer, table in discovery.items()}
                by_layer = [_f1({layer: drawn[layer]}, positive_B[rows], evaluation, truth_B, config) for layer in drawn]
                chosen[p, seed, j] = _f1(drawn, positive_B[rows], evaluation, truth_B, config)
                best[p, seed, j] = max(by_layer)
    return Efficiency(tuple(budgets.mean(axis=1).tolist()), chosen.mean(axis=2), best.mean(axis=2))


def check_draws(shares: Sequence[float], seeds: int) -> None:
    """Check what `data_efficiency` draws.

    Raises:
        InputError: shares do not ascend to 1, or there are no seeds.
    """
    if list(shares) != sorted(shares) or not shares or shares[-1] != 1 or shares[0] <= 0 or seeds < 1:
        raise InputError(f"shares {list(shares)} and {seeds} seeds; expected shares that ascend from above 0 to 1, and 1 seed or more")


def _f1(discovery: Tables, positive_B: np.ndarray, evaluation: Tables, truth_B: np.ndarray, config: RuleConfig | None) -> float:
    """F1 on evaluation texts of a rule fitted to all those of the discovery tables; 0 where there is none."""
    try:
        rule = fit_rule(discovery, positive_B, config)
    except NoFeatureError:
        return 0.0
    return f1_of(rule.predict(rule.activations(evaluation)), truth_B)
