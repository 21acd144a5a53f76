import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from qscope_jax.features.classify.thresholds import best_threshold, tune_thresholds
from tests.features.classify.test_classification import ACTIVATIONS, classes, f1


@given(ACTIVATIONS, st.sampled_from(["f1", "balanced"]), st.sampled_from([None, 0.0]))
@settings(max_examples=80, deadline=None)
def test_the_best_threshold_is_the_best_of_all(activations, criterion, floor):
    scores, positive = activations[:, 0], classes(len(activations))

    def quality(called):
        if criterion == "f1":
            return f1(called, positive)
        return (called[positive].mean() + (~called[~positive]).mean()) / 2

    tried = [t for t in (-1, 0, 0.5, 1, 1.5, 2, 2.5, 3) if floor is None or t >= floor]
    found = best_threshold(scores, positive, criterion, floor=floor)
    assert quality(scores > np.float32(found)) == pytest.approx(max(quality(scores > t) for t in tried))
    assert floor is None or found >= floor


@given(ACTIVATIONS, st.sampled_from(["f1", "balanced"]))
@settings(max_examples=40, deadline=None)
def test_with_tuned_thresholds_more_features_never_hurt_where_they_were_tuned(activations, criterion):
    positive = classes(len(activations))
    thresholds = tune_thresholds(activations, positive, criterion)
    calls = [(activations[:, :k] > thresholds[:k]).any(axis=1) for k in range(1, len(thresholds) + 1)]
    qualities = [f1(c, positive) if criterion == "f1" else (c[positive].mean() + (~c[~positive]).mean()) / 2 for c in calls]
    assert all(later >= earlier - 1e-9 for earlier, later in zip(qualities, qualities[1:], strict=False))
    assert (thresholds >= 0).all()


def test_a_threshold_lies_midway_between_the_activations_that_it_parts():
    assert best_threshold(np.array([1.0, 2, 4, 5]), np.array([False, False, True, True]), "f1", floor=0.0) == 3
    # Adjacent floats have nothing between them: the lower is the threshold, which the upper exceeds.
    low = np.float32(1)
    high = np.nextafter(low, np.float32(2))
    assert best_threshold(np.array([low, high]), np.array([False, True]), "f1", floor=0.0) == low
