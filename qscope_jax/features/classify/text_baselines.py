"""What a classifier made of features is measured against: a direction and a regression on the same residual streams, and a bag of words.

All see the texts of the discovery half only; the strength of regularisation is chosen by cross-validation inside it, and thresholds are tuned
on it.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from qscope_jax.errors import InputError
from qscope_jax.features.classify.classification_scores import BinaryScores, binary_scores, f1_of
from qscope_jax.features.classify.thresholds import Criterion, best_threshold

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of regularisation that the regression on standardised streams may choose from."""
WORD_STRENGTHS = (1.0, 10.0, 100.0)
"""The same for the bag of words, whose columns are small numbers."""
MOST_FOLDS = 3


@dataclass(frozen=True)
class Baseline:
    """Answers of a baseline on the evaluation half.

    Attributes:
        name: What it is.
        layer: Layer whose streams it reads; None for one that reads words.
        discovery_f1: F1 that the choice of a layer goes by: on discovery texts that a fit has not seen.
        called_B: Which evaluation texts it calls positive.
        score_B: Its score of each.
        settings: What was chosen on the discovery half.
    """

    name: str
    layer: int | None
    discovery_f1: float
    called_B: Bool[np.ndarray, " B"]
    score_B: Float[np.ndarray, " B"]
    settings: Mapping[str, float]

    def scores(self, positive_B: Bool[np.ndarray, " B"], *, samples: int = 1000, seed: int = 0) -> BinaryScores:
        """Scores on the evaluation half; see `binary_scores`."""
        return binary_scores(positive_B, self.called_B, self.score_B, samples=samples, seed=seed)


def mean_difference(
    streams_BD: Float[np.ndarray, "B D"],
    positive_B: Bool[np.ndarray, " B"],
    discovery: Int[np.ndarray, " _"],
    evaluation: Int[np.ndarray, " _"],
    *,
    layer: int,
    criterion: Criterion = "f1",
    seed: int = 0,
) -> Baseline:
    """Difference of means: a text's score is its mean stream along the direction from the mean negative to the mean positive text.

    Raises:
        InputError: all discovery texts are of one class.
    """
    x, truth = np.asarray(streams_BD[discovery], np.float64), positive_B[discovery]

    def fit(rows: np.ndarray) -> tuple[np.ndarray, float]:
        direction = x[rows[truth[rows]]].mean(axis=0) - x[rows[~truth[rows]]].mean(axis=0)
        return direction, best_threshold(x[rows] @ direction, truth[rows], criterion)

    held_out = [f1_of((x[test] @ direction).astype(np.float32) > threshold, truth[test])
                for train, test in _folds(truth, seed) for direction, threshold in [fit(train)]]  # fmt: skip
    direction, threshold = fit(np.arange(len(x)))
    score = (np.asarray(streams_BD[evaluation], np.float64) @ direction).astype(np.float32)
    return Baseline("difference of means", layer, float(np.mean(held_out or [0.0])), score > np.float32(threshold), score, {"threshold": threshold})


def stream_regression(
    streams_BD: Float[np.ndarray, "B D"],
    positive_B: Bool[np.ndarray, " B"],
    discovery: Int[np.ndarray, " _"],
    evaluation: Int[np.ndarray, " _"],
    *,
    layer: int,
    seed: int = 0,
) -> Baseline:
    """Logistic regression on standardised mean streams.

    Raises:
        InputError: all discovery texts are of one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    learnt, scored = (np.asarray(streams_BD[half], np.float64) for half in (discovery, evaluation))
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return _searched("logistic regression", layer, pipeline, STRENGTHS, learnt, scored, positive_B[discovery], seed)


def bag_of_words(
    texts: Sequence[str],
    positive_B: Bool[np.ndarray, " B"],
    discovery: Int[np.ndarray, " _"],
    evaluation: Int[np.ndarray, " _"],
    *,
    seed: int = 0,
) -> Baseline:
    """Logistic regression on words and signs, and on runs of one to four characters, which stand for words where no blanks part them.

    Raises:
        InputError: all discovery texts are of one class.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    # Signs count as words, so that texts without a letter have some too.
    words = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True, max_features=200_000)
    pipeline = make_pipeline(make_union(words, characters), LogisticRegression(max_iter=1000))
    learnt, scored = ([texts[i] for i in half] for half in (discovery.tolist(), evaluation.tolist()))
    return _searched("bag of words", None, pipeline, WORD_STRENGTHS, learnt, scored, positive_B[discovery], seed)


def _searched(
    name: str, layer: int | None, pipeline: Any, strengths: Sequence[float], discovery: Any, evaluation: Any, positive_B: np.ndarray, seed: int
) -> Baseline:
    """A regression whose strength of regularisation gives the best F1 on folds of the discovery half that were left out."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV

    folds = _folds(positive_B, seed)
    grid = {"logisticregression__C": strengths if folds else (1.0,)}
    with warnings.catch_warnings():
        # One that has not quite converged after 1,000 steps is scored as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if folds:
            search = GridSearchCV(pipeline, grid, scoring="f1", cv=folds).fit(discovery, positive_B)
            fitted, strength, quality = search.best_estimator_, search.best_params_["logisticregression__C"], float(search.best_score_)
        else:
            fitted, strength, quality = pipeline.fit(discovery, positive_B), 1.0, 0.0
    score = np.asarray(fitted.decision_function(evaluation), np.float64)
    return Baseline(name, layer, quality, score > 0, score, {"C": float(strength)})


def _folds(positive_B: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds with both classes in proportion; none where a class has a single text."""
    from sklearn.model_selection import StratifiedKFold

    fewest = int(min(positive_B.sum(), (~positive_B).sum()))
    if not fewest:
        raise InputError(f"{len(positive_B)} discovery texts are all of one class; a baseline needs both")
    if fewest < 2:
        return []
    splitter = StratifiedKFold(min(MOST_FOLDS, fewest), shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(positive_B)), positive_B))
