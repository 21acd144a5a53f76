"""How good the answers to a yes-or-no question are, with bootstrap intervals.

Classes are resampled separately, so that every sample has as many positive texts as the data. Only how often each answer occurs in a class
matters, so a sample is drawn as counts of distinct answers, from the multinomial distribution that resampling texts amounts to.
"""

from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from qscope_jax.errors import InputError

_AT_ONCE = 2**22  # counts held at a time


class Interval(NamedTuple):
    """A value with the bounds of its interval; both are NaN where none was asked for."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.910 (0.874-0.941)`, or the value alone."""
        return f"{self.value:.3f}" if np.isnan(self.low) else f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True)
class BinaryScores:
    """Scores of answers on B texts.

    Attributes:
        texts: B.
        positives: Texts of the class.
        precision: Of those called positive, how many are; 0 where none is called so.
        recall: Of the positive, how many are called so.
        f1: Harmonic mean of precision and recall.
        accuracy: How many are called right.
        auc: Chance that a positive text scores above a negative one, ties counting half.
    """

    texts: int
    positives: int
    precision: Interval
    recall: Interval
    f1: Interval
    accuracy: Interval
    auc: Interval

    def plain(self) -> dict[str, int | dict[str, float]]:
        """For JSON: each score as value, low and high."""
        return {name: value._asdict() if isinstance(value, Interval) else value for name, value in zip(asdict(self), self._values(), strict=True)}

    def _values(self) -> list[int | Interval]:
        return [getattr(self, item.name) for item in fields(self)]


def binary_scores(
    positive_B: Bool[np.ndarray, " B"],
    called_B: Bool[np.ndarray, " _"],
    score_B: Float[np.ndarray, " _"],
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> BinaryScores:
    """Score answers.

    Args:
        positive_B: Which texts are of the class.
        called_B: Which texts are called so.
        score_B: A number for each text, larger where it is called so more readily; only its order matters.
        samples: Bootstrap samples; 0 gives no intervals.
        level: Share of samples inside an interval.
        seed: Of the samples.

    Raises:
        InputError: all texts are of one class, the three differ in length, or the level is not between 0 and 1.
    """
    if not len(positive_B) == len(called_B) == len(score_B):
        raise InputError(f"{len(positive_B)} classes, {len(called_B)} answers and {len(score_B)} scores; give one of each for every text")
    if positive_B.all() or not positive_B.any():
        raise InputError(f"{len(positive_B)} texts are all of one class; scores need texts of both")
    if not 0 < level < 1 or samples < 0:
        raise InputError(f"{samples} samples at level {level}; expected 0 or more, and a level between 0 and 1")
    # Answers in the order of their score; those that agree in score and answer are one.
    _, first, answer_B = np.unique(np.stack([score_B.astype(np.float64), called_B]), axis=1, return_index=True, return_inverse=True)
    called_U, level_U = called_B[first], np.unique(score_B[first], return_inverse=True)[1]
    counts_CU = np.stack([np.bincount(answer_B[positive_B == of_class], minlength=len(first)) for of_class in (True, False)])
    point = _scores(counts_CU[:, None], called_U, level_U)[:, 0]
    drawn = _bootstrap(counts_CU, called_U, level_U, samples, seed)
    tail = 100 * (1 - level) / 2
    bounds = np.percentile(drawn, [tail, 100 - tail], axis=1) if samples else np.full((2, len(point)), np.nan)
    return BinaryScores(len(positive_B), int(positive_B.sum()), *(Interval(*map(float, found)) for found in zip(point, *bounds, strict=True)))


def f1_of(called_B: Bool[np.ndarray, " B"], positive_B: Bool[np.ndarray, " B"]) -> float:
    """F1 of answers; 0 where no text is positive and none is called so."""
    return float(2 * (called_B & positive_B).sum() / max(called_B.sum() + positive_B.sum(), 1))


def _bootstrap(counts_CU: np.ndarray, called_U: np.ndarray, level_U: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """The scores [5, samples] of resampled answers."""
    rng = np.random.default_rng(seed)
    parts = [np.zeros((5, 0))]
    at_once = max(_AT_ONCE // counts_CU.shape[1], 1)
    for start in range(0, samples, at_once):
        size = min(at_once, samples - start)
        drawn = np.stack([rng.multinomial(count_U.sum(), count_U / count_U.sum(), size) for count_U in counts_CU])
        parts.append(_scores(drawn, called_U, level_U))
    return np.concatenate(parts, axis=1)


def _scores(counts_CSU: np.ndarray, called_U: np.ndarray, level_U: np.ndarray) -> np.ndarray:
    """Precision, recall, F1, accuracy and AUC [5, S] of S sets of answers, given how often each occurs among positives and negatives."""
    positives, negatives = counts_CSU.sum(axis=2).astype(float)
    hits, alarms = counts_CSU[:, :, called_U].sum(axis=2).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(hits / (hits + alarms))
    recall = hits / positives
    f1 = 2 * hits / (hits + alarms + positives)
    accuracy = (hits + negatives - alarms) / (positives + negatives)
    # Levels ascend with U, so that sums over each level are sums over stretches.
    starts = np.flatnonzero(np.diff(level_U, prepend=-1))
    at_level = np.add.reduceat(counts_CSU, starts, axis=2).astype(float)
    below = np.cumsum(at_level[1], axis=1) - at_level[1]
    auc = (at_level[0] * (below + at_level[1] / 2)).sum(axis=1) / (positives * negatives)
    return np.stack([precision, recall, f1, accuracy, auc])
