"""From labelled texts to a fitted classifier with its scores on texts held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qscope_jax.errors import InputError
from qscope_jax.features.classify.classification import RuleConfig, Tables, fit_rule
from qscope_jax.features.classify.classification_scores import BinaryScores, binary_scores
from qscope_jax.features.classify.feature_classifier import FeatureClassifier, Reading
from qscope_jax.features.classify.labelled_data import LabelledData, label_data
from qscope_jax.features.classify.text_reading import ReadingConfig, read_texts
from qscope_jax.features.classify.thresholds import Criterion
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.layer_sae import LayerSAE


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is fitted."""

    rule: RuleConfig = RuleConfig()
    """How layers, features and thresholds are chosen."""
    reading: Reading = "top_k"
    """How features are read when it is used; see `feature_classifier`."""
    criterion: Criterion = "f1"
    """What thresholds of a `pre_activation` classifier are tuned for."""
    samples: int = 1000
    """Bootstrap samples behind the intervals of its scores; 0 gives none."""
    seed: int = 0
    """Of the samples."""


def fit_classifier(
    model: LanguageModel,
    saes: Sequence[LayerSAE],
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    config: ClassifierConfig | None = None,
    reading: ReadingConfig | None = None,
    **settings: Any,
) -> FeatureClassifier:
    """Fit a classifier to labelled texts, and score it on a part of them that the fit does not see.

        classifier = fit_classifier(model, saes, texts, labels, positive="toxic")
        classifier.save("toxic")
        for answer in classifier.predict(model, more_texts, saes):
            print(answer.label, answer.text)

    Args:
        model: The model.
        saes: SAEs of the layers to choose from.
        texts: Texts.
        labels: The class of each.
        config: How to fit.
        reading: Which tokens count, and how many texts are read at a time.
        **settings: Of `label_data`: `positive`, `languages`, `halves`, `share`, `seed`.

    Raises:
        InputError: one class only, too few texts, or no feature that fires more often on the class.
        ShapeError: an SAE does not fit the model.
    """
    reading = reading or ReadingConfig()
    data = label_data(texts, labels, **settings)
    tables = {layer: found.features for layer, found in read_texts(model, saes, data.texts, reading).items()}
    by_layer = {sae.layer: sae for sae in saes}
    return classifier_from_tables(tables, data, by_layer.__getitem__, config=config, reading=reading, model=model, model_name=model.name)


def classifier_from_tables(
    tables: Tables,
    data: LabelledData,
    sae_of: Callable[[int], LayerSAE],
    *,
    config: ClassifierConfig | None = None,
    reading: ReadingConfig | None = None,
    model: LanguageModel | None = None,
    model_name: str = "in memory",
    sae_name: str = "in memory",
) -> FeatureClassifier:
    """Fit a classifier where it is known what the texts did, as a feature store knows.

    Args:
        tables: Of each layer, the table of the texts of `data`.
        data: Labelled texts.
        sae_of: Gives the SAE of a layer; called for those that are chosen.
        config: How to fit.
        reading: How the tables were read.
        model: The model, which only a `pre_activation` classifier needs.
        model_name: What the tables were read with.
        sae_name: Where its SAEs are from.

    Raises:
        InputError: no feature fires more often on the class, or a `pre_activation` classifier got no model.
        ShapeError: tables and texts differ in number.
    """
    config, halves = config or ClassifierConfig(), data.halves
    rule = fit_rule(tables, data.positive_B, config.rule, rows=halves.discovery)
    classifier = FeatureClassifier.of_rule(
        rule, [sae_of(layer) for layer in rule.layers], positive=data.positive, negative=data.negative, model=model_name, sae=sae_name, texts=reading
    )
    activations_BW = rule.activations(tables)
    if config.reading == "pre_activation":
        if model is None:
            raise InputError("thresholds of a pre_activation classifier are tuned with the model; give it, or read features by top_k")
        classifier = classifier.by_pre_activation(
            model, [data.texts[i] for i in halves.discovery], data.positive_B[halves.discovery], config.criterion
        )
        activations_BW = np.concatenate([found for found, _ in classifier.activations(model, data.texts)])
    facts = {
        "discovery_texts": len(halves.discovery),
        "evaluation_texts": len(halves.evaluation),
        "left_out": data.split.removed(),
        "discovery": _scores(classifier, activations_BW, data, halves.discovery, config).plain(),
        "evaluation": _scores(classifier, activations_BW, data, halves.evaluation, config).plain(),
    }
    return replace(classifier, facts=facts)


def _scores(
    classifier: FeatureClassifier, activations_BW: np.ndarray, data: LabelledData, rows: np.ndarray, config: ClassifierConfig
) -> BinaryScores:
    called_B, score_B = classifier.rule.predict(activations_BW[rows]), classifier.rule.score(activations_BW[rows])
    return binary_scores(data.positive_B[rows], called_B, score_B, samples=config.samples, seed=config.seed)
