"""Which features belong to a language, and how well one of them tells it from the others."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from qscope_jax.errors import InputError
from qscope_jax.features.readout import Readout


def monolinguality(readouts: Mapping[str, Readout]) -> dict[str, Float[np.ndarray, " F"]]:
    """Monolinguality of every feature for every language (SASFT, arXiv 2507.14894; features of arXiv 2505.05111).

        mu[s, L]    = mean activation of feature s over all counted tokens of language L
        gamma[s, L] = mean over the other languages of mu[s, .]        languages weigh equally
        nu[s, L]    = mu[s, L] - gamma[s, L]

    Over all languages the nu of a feature sum to 0.

    Raises:
        InputError: fewer than two languages.
    """
    if len(readouts) < 2:
        raise InputError(f"monolinguality needs at least two languages, got {len(readouts)}")
    means = {language: readout.means()[0] for language, readout in readouts.items()}
    total = np.sum(list(means.values()), axis=0)
    return {language: mean - (total - mean) / (len(means) - 1) for language, mean in means.items()}


@dataclass(frozen=True)
class Detector:
    """One feature and a threshold: a text is of the language when the feature's mean activation exceeds it."""

    language: str
    layer: int
    feature: int
    threshold: float
    train_accuracy: float
    """Balanced accuracy on the texts that chose feature and threshold."""

    def predict(self, readout: Readout) -> Bool[np.ndarray, " B"]:
        """Whether each text is of the language."""
        scores = np.array([readout.activation(row, self.feature)[readout.counted[row]].sum() for row in range(len(readout))])
        return scores / np.maximum([c.sum() for c in readout.counted], 1) > self.threshold


def fit_detector(language: str, readouts: Mapping[str, Readout], *, candidates: int = 20) -> Detector:
    """Choose the feature of highest balanced accuracy among those of highest monolinguality, with the threshold that reaches it.

    Args:
        language: The language to tell from all others.
        readouts: Training texts of every language at one layer.
        candidates: Features tried, in order of monolinguality.
    """
    nu = monolinguality(readouts)[language]
    truth = np.concatenate([np.full(len(readout), name == language) for name, readout in readouts.items()])
    scores_BF = np.concatenate([readout.text_means() for readout in readouts.values()])
    layer = readouts[language].layer
    best = Detector(language, layer, int(np.argmax(nu)), 0.0, 0.0)
    for feature in np.argsort(-nu, kind="stable")[:candidates]:
        threshold, accuracy = best_threshold(scores_BF[:, feature], truth)
        if accuracy > best.train_accuracy:
            best = Detector(language, layer, int(feature), threshold, accuracy)
    return best


def best_threshold(scores: Float[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]) -> tuple[float, float]:
    """Threshold (between two scores) of highest balanced accuracy for `score > threshold`, and that accuracy."""
    order = np.argsort(scores, kind="stable")
    sorted_scores, sorted_truth = scores[order], truth[order]
    positives, negatives = max(int(truth.sum()), 1), max(int((~truth).sum()), 1)
    # Cut after item i: everything up to i is called negative.
    hits = 1 - np.cumsum(sorted_truth) / positives
    rejections = np.cumsum(~sorted_truth) / negatives
    accuracy = (hits + rejections) / 2
    possible = np.append(sorted_scores[1:] > sorted_scores[:-1], False)
    if not possible.any():
        return float(sorted_scores[-1]), 0.5
    cut = int(np.argmax(np.where(possible, accuracy, -1.0)))
    return float((sorted_scores[cut] + sorted_scores[cut + 1]) / 2), float(accuracy[cut])


def balanced_accuracy(predicted: Bool[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]) -> float:
    """Mean of the shares of positives and of negatives that are called right."""
    if truth.all() or not truth.any():
        raise InputError("balanced accuracy needs texts of both kinds")
    return float((predicted[truth].mean() + (~predicted[~truth]).mean()) / 2)


def detector_accuracy(detector: Detector, held_out: Mapping[str, Readout]) -> float:
    """Balanced accuracy of a detector on held-out texts of every language."""
    predicted = np.concatenate([detector.predict(readout) for readout in held_out.values()])
    truth = np.concatenate([np.full(len(readout), name == detector.language) for name, readout in held_out.items()])
    return balanced_accuracy(predicted, truth)


def rank_features(nu: Float[np.ndarray, " F"], count: int) -> Int[np.ndarray, " W"]:
    """The features of highest monolinguality, highest first."""
    return np.argsort(-nu, kind="stable")[:count]


