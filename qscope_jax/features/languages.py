"""Which features belong to a language, and how well one of them tells it from the others."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.readout import Readout


def monolinguality(readouts: Mapping[str, Readout]) -> dict[str, Float[np.ndarray, " F"]]:
    """Monolinguality of every feature for every language (SASFT, arXiv 2507.14894; features of arXiv 2505.05111).

        mu[s, L]    = mean activation of feature s over all counted tokens of language L
        gamma[s, L] = mean over the other languages of mu[s, .]        languages weigh equally
        nu[s, L]    = mu[s, L] - gamma[s, L]

    Over all languages the nu of a feature sum to 0.

    Raises:
        InputError: fewer than two languages, or one of them has no token that counts.
        ShapeError: readouts of different layers or dictionaries.
    """
    if len(readouts) < 2:
        raise InputError(f"monolinguality needs at least two languages, got {len(readouts)}")
    if len(kinds := {(readout.layer, readout.num_features) for readout in readouts.values()}) > 1:
        found = " and ".join(f"layer {layer} ({features} features)" for layer, features in sorted(kinds))
        raise ShapeError(f"readouts are of {found}; give those of one SAE")
    if silent := [language for language, readout in readouts.items() if not readout.counted_tokens]:
        raise InputError(f"no token of language {silent[0]} counts: the first token of a text is left out; give longer texts")
    means_KF = np.stack([readout.means()[0] for readout in readouts.values()])
    return dict(zip(readouts, monolinguality_of_means(means_KF), strict=True))


def monolinguality_of_means(means_KF: Float[np.ndarray, "K F"]) -> Float[np.ndarray, "K F"]:
    """Monolinguality (nu) from the mean activations (mu) on two or more languages: each mean less the mean of the others."""
    return means_KF - (means_KF.sum(axis=0) - means_KF) / (len(means_KF) - 1)


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
        """Whether each text is of the language.

        Raises:
            ShapeError: the readout is of another layer.
        """
        if readout.layer != self.layer:
            raise ShapeError(f"the detector of {self.language} reads layer {self.layer}, the readout is of layer {readout.layer}")
        return _text_means(readout, self.feature) > self.threshold


def fit_detector(language: str, readouts: Mapping[str, Readout], *, candidates: int = 20) -> Detector:
    """Choose the feature of highest balanced accuracy among those of highest monolinguality, with the threshold that reaches it.

    Args:
        language: The language to tell from all others.
        readouts: Training texts of every language at one layer.
        candidates: Features tried, in order of monolinguality.

    Raises:
        InputError: there are no readouts of the language, or of it alone, or no candidate.
        ShapeError: readouts of different layers or dictionaries.
    """
    if language not in readouts:
        raise InputError(f"no readout of language {language!r}; there are {', '.join(readouts)}")
    if candidates < 1:
        raise InputError(f"{candidates} candidates to choose a feature from; give at least 1")
    nu = monolinguality(readouts)[language]
    truth = np.concatenate([np.full(len(readout), name == language) for name, readout in readouts.items()])
    layer = readouts[language].layer
    best = Detector(language, layer, int(np.argmax(nu)), 0.0, 0.0)
    for feature in np.argsort(-nu, kind="stable")[:candidates]:
        threshold, accuracy = best_threshold(np.concatenate([_text_means(readout, int(feature)) for readout in readouts.values()]), truth)
        if accuracy > best.train_accuracy:
            best = Detector(language, layer, int(feature), threshold, accuracy)
    return best


def best_threshold(scores: Float[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]) -> tuple[float, float]:
    """Threshold of highest balanced accuracy for `score > threshold`, midway between two scores, and that accuracy.

    Where no cut between scores does better than chance, it is the highest score, which calls every text negative.

    Raises:
        InputError: the texts are not of both kinds.
    """
    _check_both(truth)
    order = np.argsort(scores, kind="stable")
    sorted_scores, sorted_truth = scores[order], truth[order]
    # Cut after item i: everything up to i is called negative. Equal scores cannot be parted.
    hits = 1 - np.cumsum(sorted_truth) / truth.sum()
    rejections = np.cumsum(~sorted_truth) / (~truth).sum()
    accuracy = (hits + rejections) / 2
    possible = np.append(sorted_scores[1:] > sorted_scores[:-1], True)
    cut = int(np.argmax(np.where(possible, accuracy, -1.0)))
    below, above = sorted_scores[cut], sorted_scores[min(cut + 1, len(scores) - 1)]
    middle = (below + above) / 2
    # Between neighbouring floating-point numbers there is nothing: the mean may round up to the higher.
    return float(middle if middle < above else below), float(accuracy[cut])


def balanced_accuracy(predicted: Bool[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]) -> float:
    """Mean of the shares of positives and of negatives that are called right.

    Raises:
        InputError: the texts are not of both kinds.
    """
    _check_both(truth)
    return float((predicted[truth].mean() + (~predicted[~truth]).mean()) / 2)


def detector_accuracy(detector: Detector, held_out: Mapping[str, Readout]) -> float:
    """Balanced accuracy of a detector on held-out texts of every language."""
    predicted = np.concatenate([detector.predict(readout) for readout in held_out.values()])
    truth = np.concatenate([np.full(len(readout), name == detector.language) for name, readout in held_out.items()])
    return balanced_accuracy(predicted, truth)


def rank_features(nu: Float[np.ndarray, " F"], count: int) -> Int[np.ndarray, " W"]:
    """The features of highest monolinguality, highest first."""
    return np.argsort(-nu, kind="stable")[:count]


def _text_means(readout: Readout, feature: int) -> Float[np.ndarray, " B"]:
    """Mean activation of one feature over each text's counted tokens; 0 for a text without any."""
    sums = [readout.activation(text, feature)[counted].sum(dtype=np.float64) for text, counted in enumerate(readout.counted)]
    return np.array(sums, np.float64) / np.maximum([counted.sum() for counted in readout.counted], 1)


def _check_both(truth: Bool[np.ndarray, " B"]) -> None:
    if truth.all() or not truth.any():
        raise InputError("balanced accuracy needs texts of both kinds: of the language and of others")
