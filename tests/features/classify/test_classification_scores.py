import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from qscope_jax.errors import InputError
from qscope_jax.features.classify.classification_scores import binary_scores


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 7.0])), min_size=2, max_size=30))
@settings(max_examples=80, deadline=None)
def test_scores_equal_those_of_scikit_learn(rows):
    positive, called, score = (np.array(column) for column in zip(*rows, strict=True))
    if positive.all() or not positive.any():
        return
    found = binary_scores(positive, called, score, samples=0)
    assert (found.texts, found.positives) == (len(rows), positive.sum())
    assert found.precision.value == pytest.approx(precision_score(positive, called, zero_division=0))
    assert found.recall.value == pytest.approx(recall_score(positive, called))
    assert found.f1.value == pytest.approx(f1_score(positive, called, zero_division=0))
    assert found.accuracy.value == pytest.approx(accuracy_score(positive, called))
    assert found.auc.value == pytest.approx(roc_auc_score(positive, score))
    assert np.isnan(found.f1.low)


def drawn(rng, texts=200):
    """Answers of a known quality: 70 % recall, 90 % specificity, and unit-normal scores a unit apart."""
    positive = np.arange(texts) < texts // 2
    return positive, rng.random(texts) < np.where(positive, 0.7, 0.1), rng.standard_normal(texts) + positive


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    truth = {"recall": 0.7, "accuracy": 0.8, "precision": 0.875, "f1": 0.7 / 0.9, "auc": 0.76025}
    hits = dict.fromkeys(truth, 0)
    for trial in range(100):
        found = binary_scores(*drawn(np.random.default_rng(trial)), samples=300, level=0.9, seed=trial)
        for name, value in truth.items():
            hits[name] += getattr(found, name).low <= value <= getattr(found, name).high
    # Of 100 trials 90 are expected, give or take 3.
    assert all(82 <= count <= 97 for count in hits.values()), hits


def test_classes_are_resampled_separately_as_whole_texts_would_be():
    positive, called, score = drawn(np.random.default_rng(0), 60)
    found = binary_scores(positive, called, score, samples=4000)
    rng, samples = np.random.default_rng(1), []
    for _ in range(2000):
        pos, neg = (rng.choice(np.flatnonzero(positive == of_class), 30) for of_class in (True, False))
        hits, alarms = called[pos].sum(), called[neg].sum()
        samples.append((2 * hits / (hits + alarms + 30), (score[pos][:, None] > score[neg]).mean()))
    for interval, values in zip((found.f1, found.auc), np.transpose(samples), strict=True):
        np.testing.assert_allclose((interval.low, interval.high), np.percentile(values, [2.5, 97.5]), atol=0.015)


def test_the_same_seed_gives_the_same_intervals():
    answers = drawn(np.random.default_rng(0))
    first, again, other = (binary_scores(*answers, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first.f1.value == other.f1.value
    assert str(first.f1).count(".") == 3 and first.plain()["f1"]["low"] == first.f1.low


def test_answers_that_cannot_be_scored_are_refused():
    yes = np.ones(3, bool)
    with pytest.raises(InputError, match="3 texts are all of one class"):
        binary_scores(yes, yes, np.ones(3))
    with pytest.raises(InputError, match="3 classes, 3 answers and 2 scores"):
        binary_scores(yes, yes, np.ones(2))
    with pytest.raises(InputError, match="level between 0 and 1"):
        binary_scores(np.array([True, False, True]), yes, np.ones(3), level=1.0)
