"""The threshold that tells two classes apart best, for one score, and for features any of which may exceed its own."""

from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

Criterion: TypeAlias = Literal["f1", "balanced"]


def tune_thresholds(activations_BW: Float[np.ndarray, "B W"], positive_B: Bool[np.ndarray, " B"], criterion: Criterion) -> Float[np.ndarray, " W"]:
    """Thresholds in the order of the columns: each gives the best score that is possible with those before it, so that more features never hurt.

    A feature that only adds errors gets its largest activation, and so never fires on these texts.
    """
    caught_B = np.zeros(len(positive_B), bool)
    thresholds = []
    for column in activations_BW.T:
        thresholds.append(best_threshold(column, positive_B, criterion, caught_B=caught_B, floor=0.0))
        caught_B = caught_B | (column > np.float32(thresholds[-1]))
    return np.array(thresholds, np.float32)


def best_threshold(
    score_B: Float[np.ndarray, " B"],
    positive_B: Bool[np.ndarray, " B"],
    criterion: Criterion,
    *,
    caught_B: Bool[np.ndarray, " B"] | None = None,
    floor: float | None = None,
) -> float:
    """The threshold that gives the best F1 or balanced accuracy when all texts that exceed it are called positive.

    It lies midway between two scores. Of thresholds that are equally good the lowest is taken.

    Args:
        score_B: A number for each text.
        positive_B: The class of each.
        criterion: `f1` or `balanced`.
        caught_B: Texts that are called positive whatever their score.
        floor: The least threshold.
    """
    caught_B = np.zeros(len(positive_B), bool) if caught_B is None else caught_B
    scores = np.asarray(score_B, np.float32)
    levels = np.unique(scores if floor is None else scores[scores > floor])[::-1]
    if not len(levels):
        return float(floor or 0.0)
    # Of each cut, from "none" to "all levels": texts called positive, by class. A cut after j levels calls those of the first j.
    places = np.searchsorted(-levels, -scores)
    classes = (positive_B, ~positive_B)
    counts = [np.bincount(places[of_class & ~caught_B], minlength=len(levels) + 1)[: len(levels)] for of_class in classes]
    always = [(caught_B & of_class).sum() for of_class in classes]
    hits, alarms = (np.concatenate([[0], np.cumsum(count)]) + caught for count, caught in zip(counts, always, strict=True))
    positives, negatives = max(positive_B.sum(), 1), max((~positive_B).sum(), 1)
    quality = 2 * hits / (hits + alarms + positives) if criterion == "f1" else (hits / positives + 1 - alarms / negatives) / 2
    cut = len(quality) - 1 - int(np.argmax(quality[::-1]))
    if cut == 0:
        return float(levels[0])
    if cut == len(levels):
        return floor if floor is not None else float(np.nextafter(levels[-1], np.float32(-np.inf)))
    above, below = levels[cut - 1], levels[cut]
    middle = np.float32((float(above) + float(below)) / 2)
    return float(middle if middle < above else below)
