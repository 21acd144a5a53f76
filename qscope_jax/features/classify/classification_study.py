"""Everything that `qscope classify report` says: of each language its rules and baselines, and what languages have in common."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from qscope_jax.features.classify.classification import KS, FeatureRule, NoFeatureError, RuleConfig, Tables, fit_rule
from qscope_jax.features.classify.classification_report import (
    SHARES,
    Efficiency,
    Sweep,
    Transfer,
    check_draws,
    data_efficiency,
    jaccard,
    multi_layer,
    score_rule,
    sweep,
    transfer,
)
from qscope_jax.features.classify.classification_scores import BinaryScores
from qscope_jax.features.classify.labelled_data import LabelledData, LabelledHalves
from qscope_jax.features.classify.text_baselines import Baseline, bag_of_words, mean_difference, stream_regression

_EFFICIENCY_K = 5

Streams = Mapping[int, Float[np.ndarray, "B D"]]


@dataclass(frozen=True)
class StudyConfig:
    """What is looked at."""

    ks: tuple[int, ...] = KS
    """Numbers of features in the sweep over layers."""
    rule: RuleConfig = RuleConfig()
    """The rule that everything else is held against."""
    top: int = 10
    """Features of each language that are compared between languages."""
    shares: tuple[float, ...] = SHARES
    """Shares of the discovery texts that the curve of little data has."""
    seeds: int = 5
    """Draws of each share."""
    baselines: bool = True
    """Also fit baselines."""
    samples: int = 1000
    """Bootstrap samples behind the intervals."""
    seed: int = 0
    """Of samples and folds."""

    def __post_init__(self):
        """Check what would otherwise be found out last."""
        check_draws(self.shares, self.seeds)


@dataclass(frozen=True)
class Method:
    """One way to classify, and how well it did on texts held out.

    Attributes:
        name: What it is.
        layers: Layers it reads.
        features: Features it reads; None for a baseline.
        scores: Scores on the evaluation half.
    """

    name: str
    layers: tuple[int, ...]
    features: int | None
    scores: BinaryScores


@dataclass(frozen=True, eq=False)
class LanguageStudy:
    """One language.

    Attributes:
        sweep: Single-layer rules.
        rule: The rule of the study's config; None where no feature fires more often on the class.
        methods: That rule first, if there is one, then variants of it and baselines.
    """

    sweep: Sweep
    rule: FeatureRule | None
    methods: tuple[Method, ...]


@dataclass(frozen=True, eq=False)
class Study:
    """What was found.

    Attributes:
        data: The texts.
        languages: What is known of each; `all` where languages are not told apart.
        transfer: Rules of one language on the others; None with one language.
        jaccard: For each layer how much the best features of languages overlap; empty with one language.
        efficiency: F1 with fewer texts.
        efficiency_k: Features of the rules in it.
    """

    data: LabelledData
    languages: Mapping[str, LanguageStudy]
    transfer: Transfer | None
    jaccard: Mapping[int, Float[np.ndarray, "L L"]]
    efficiency: Efficiency
    efficiency_k: int

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {
            "positive": self.data.positive,
            "negative": self.data.negative,
            "texts": {"discovery": len(self.data.split.discovery), "evaluation": len(self.data.split.evaluation)},
            "left_out": {name: getattr(self.data.split, name) for name in ("repeated", "contradictory", "crossing", "unused")},
            "languages": {name: _plain_language(study) for name, study in self.languages.items()},
            "efficiency": {
                "k": self.efficiency_k,
                "texts_of_a_class": self.efficiency.budgets,
                "layer_chosen": self.efficiency.chosen,
                "hindsight": self.efficiency.hindsight,
            },
        }
        if self.transfer is not None:
            found["transfer"] = {"languages": self.transfer.languages, "layers": self.transfer.layers, "f1": self.transfer.f1}
            found["jaccard"] = self.jaccard
        return found


def study(tables: Tables, data: LabelledData, streams: Streams | None = None, config: StudyConfig | None = None) -> Study:
    """Study how features classify.

    Args:
        tables: Of each layer, the table of the texts of `data`.
        data: Labelled texts.
        streams: Of each layer, each text's mean residual stream, for baselines that read it.
        config: What to look at.

    Raises:
        InputError: all texts of a half of a language are of one class.
    """
    config = config or StudyConfig()
    by_language = data.by_language
    several = len(by_language) > 1
    rule = config.rule if config.rule.k else replace(config.rule, k=_EFFICIENCY_K)
    return Study(
        data,
        {name: _language(tables, data, halves, streams or {}, config) for name, halves in by_language.items()},
        transfer(tables, by_language, config.rule) if several else None,
        jaccard(tables, by_language, config.top) if several else {},
        data_efficiency(tables, by_language, rule, shares=config.shares, seeds=config.seeds),
        rule.k or _EFFICIENCY_K,
    )


def example_texts(rule: FeatureRule, tables: Tables, halves: LabelledHalves, count: int = 3) -> dict[str, list[int]]:
    """Evaluation texts to look at: those found and those called positive wrongly with the highest scores, and those missed."""
    activations_BW = rule.activations(tables)[halves.evaluation]
    called, score, truth = rule.predict(activations_BW), rule.score(activations_BW), halves.positive_B[halves.evaluation]
    order = np.argsort(-score, kind="stable")
    kinds = {"found": called & truth, "false alarm": called & ~truth, "missed": ~called & truth}
    return {name: halves.evaluation[order[chosen[order]][:count]].tolist() for name, chosen in kinds.items()}


def _language(tables: Tables, data: LabelledData, halves: LabelledHalves, streams: Streams, config: StudyConfig) -> LanguageStudy:
    swept = sweep(tables, halves, config.ks, config.rule.thresholds)
    methods: list[Method] = []
    rule: FeatureRule | None = None
    variants = {
        "OR rule": config.rule,
        "OR rule, layer by F1": replace(config.rule, by="f1"),
        "OR rule, thresholds for F1": replace(config.rule, thresholds="f1"),
        "OR rule, thresholds for balanced accuracy": replace(config.rule, thresholds="balanced"),
    }
    settings = {"samples": config.samples, "seed": config.seed}
    # A threshold can find a feature where firing alone does not, so each of them is tried.
    for name, variant in variants.items():
        if name == "OR rule" or variant != config.rule:
            with contextlib.suppress(NoFeatureError):
                found = fit_rule(tables, halves.positive_B, variant, rows=halves.discovery)
                rule = found if name == "OR rule" else rule
                methods.append(Method(name, found.layers, len(found.terms), score_rule(found, tables, halves, **settings)))
    with contextlib.suppress(NoFeatureError):
        for count, scores in multi_layer(tables, halves, **settings).items():
            methods.append(Method(f"best feature of {count} layer{'s' if count > 1 else ''}", (), count, scores))
    if config.baselines:
        truth = halves.positive_B[halves.evaluation]
        layer = swept.by_difference
        for baseline in _baselines(data, halves, streams, layer, config.seed):
            layers = () if baseline.layer is None else (baseline.layer,)
            methods.append(Method(baseline.name, layers, None, baseline.scores(truth, **settings)))
    return LanguageStudy(swept, rule, tuple(methods))


def _baselines(data: LabelledData, halves: LabelledHalves, streams: Streams, layer: int, seed: int) -> list[Baseline]:
    """The best of each kind by its F1 on discovery texts left out of its fit; the regression tries the rule's layer and the direction's."""
    truth, split = data.positive_B, (halves.discovery, halves.evaluation)
    found = []
    if streams:
        directions = [mean_difference(x, truth, *split, layer=own, seed=seed) for own, x in sorted(streams.items())]
        found.append(max(directions, key=lambda one: one.discovery_f1))
        tried = dict.fromkeys((layer, found[0].layer))
        regressions = [stream_regression(streams[own], truth, *split, layer=own, seed=seed) for own in tried if own in streams]
        found.append(max(regressions, key=lambda one: one.discovery_f1))
    return [*found, bag_of_words(data.texts, truth, *split, seed=seed)]


def _plain_language(found: LanguageStudy) -> dict[str, Any]:
    swept = found.sweep
    return {
        "layers": swept.layers,
        "ks": swept.ks,
        "top_difference": swept.differences,
        "features": swept.features,
        "discovery_f1": swept.discovery_f1,
        "evaluation_f1": swept.evaluation_f1,
        "layer_by_difference": swept.by_difference,
        "chosen_on_discovery": dict(zip(("layer", "k"), swept.chosen("discovery"), strict=True)),
        "best_in_hindsight": dict(zip(("layer", "k"), swept.chosen("hindsight"), strict=True)) | {"f1": float(swept.evaluation_f1.max())},
        "rule": None if found.rule is None else [vars(term) for term in found.rule.terms],
        "methods": [{"name": one.name, "layers": one.layers, "features": one.features, **one.scores.plain()} for one in found.methods],
    }
