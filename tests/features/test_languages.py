import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope_jax.errors import InputError, ShapeError
from qscope_jax.features.languages import (
    Detector,
    balanced_accuracy,
    best_threshold,
    detector_accuracy,
    fit_detector,
    monolinguality,
    rank_features,
)

START = [0.0, 0.0]


@pytest.fixture
def three(readout_of):
    """Three languages of unequal length: means of the first feature 6, 3 and 0."""
    return {
        "en": readout_of([START, [6, 0]]),
        "zh": readout_of([START, [9, 1]], [START, [0, 1], [0, 1]]),
        "ru": readout_of([START, [0, 2], [0, 2], [0, 2], [0, 2]]),
    }


def test_monolinguality_is_the_mean_less_the_mean_of_the_other_languages_means(three):
    nu = monolinguality(three)
    # Pooling the tokens of the others would give 6 - 9/7 for English.
    np.testing.assert_allclose([nu[code][0] for code in three], [6 - 1.5, 3 - 3, 0 - 4.5])
    np.testing.assert_allclose([nu[code][1] for code in three], [0 - 1.5, 1 - 1, 2 - 0.5])


def test_a_languages_mean_is_over_its_tokens_not_over_its_texts(three):
    # Chinese: (9 + 0 + 0) / 3 tokens; a mean of the texts' means would be 4.5.
    assert monolinguality(three)["zh"][0] == 0


def test_monolinguality_sums_to_zero_over_languages(readout_of):
    rng = np.random.default_rng(0)
    readouts = {code: readout_of(*(rng.uniform(0, 3, (rng.integers(2, 6), 5)) for _ in range(4))) for code in ("a", "b", "c", "d")}
    np.testing.assert_allclose(np.sum(list(monolinguality(readouts).values()), axis=0), 0, atol=1e-12)


def test_features_are_ranked_highest_first_and_ties_go_to_the_lower_index():
    assert rank_features(np.array([1.0, 3.0, 3.0, -1.0]), 3).tolist() == [1, 2, 0]


def scored_texts():
    scores = st.one_of(st.integers(0, 4).map(float), st.floats(-1e6, 1e6))
    return st.lists(st.tuples(scores, st.booleans()), min_size=2, max_size=12).filter(lambda rows: len({kind for _, kind in rows}) == 2)


@given(scored_texts())
def test_the_best_threshold_is_as_good_as_any(rows):
    scores, truth = np.array([score for score, _ in rows]), np.array([kind for _, kind in rows])
    threshold, accuracy = best_threshold(scores, truth)
    every = [balanced_accuracy(scores > t, truth) for t in (*scores, -np.inf)]
    assert accuracy == pytest.approx(max(every))
    assert balanced_accuracy(scores > threshold, truth) == pytest.approx(accuracy)


def test_the_threshold_lies_midway_between_two_scores():
    assert best_threshold(np.array([0.0, 4.0, 1.0, 6.0]), np.array([False, True, False, True])) == (2.5, 1.0)


def test_scores_that_are_neighbouring_numbers_are_parted():
    lower = np.nextafter(1.0, 2.0)
    higher = np.nextafter(lower, 2.0)
    assert (lower + higher) / 2 == higher
    assert best_threshold(np.array([lower, higher]), np.array([False, True])) == (lower, 1.0)


def test_scores_of_the_wrong_sign_are_no_better_than_chance():
    assert best_threshold(np.array([0.0, 1.0]), np.array([True, False])) == (1.0, 0.5)
    assert best_threshold(np.array([2.0, 2.0]), np.array([True, False])) == (2.0, 0.5)


def test_balanced_accuracy_weighs_both_kinds_equally():
    truth = np.array([True, False, False, False, False])
    assert balanced_accuracy(np.array([False] * 5), truth) == 0.5
    assert balanced_accuracy(np.array([True, True, False, False, False]), truth) == 0.875


@pytest.fixture
def planted(readout_of):
    """Texts of three languages in which feature 5 is on in Chinese, weakly, and feature 2 strongly, in half of the Chinese texts."""

    def make(seed: int):
        rng = np.random.default_rng(seed)

        def text(code: str, i: int) -> np.ndarray:
            dense = rng.uniform(0, 0.2, (int(rng.integers(3, 7)), 8))
            dense[:, 5] = rng.uniform(0.5, 1, len(dense)) if code == "zh" else rng.uniform(0, 0.1, len(dense))
            dense[:, 2] += 9 * (code == "zh" and i % 2)
            return dense

        return {code: readout_of(*(text(code, i) for i in range(12)), layer=3) for code in ("en", "zh", "ru")}

    return make


def test_the_detector_takes_the_planted_feature_and_tells_held_out_texts(planted):
    detector = fit_detector("zh", planted(0))
    assert (detector.language, detector.layer, detector.feature, detector.train_accuracy) == ("zh", 3, 5, 1.0)
    assert 0.1 < detector.threshold < 0.5
    assert detector_accuracy(detector, planted(1)) == 1.0
    assert detector.predict(planted(1)["zh"]).all() and not detector.predict(planted(1)["ru"]).any()


def test_only_the_most_monolingual_features_are_tried(planted):
    assert np.argmax(monolinguality(planted(0))["zh"]) == 2
    detector = fit_detector("zh", planted(0), candidates=1)
    assert detector.feature == 2 and detector.train_accuracy == pytest.approx(0.75)


def test_a_detector_reads_counted_tokens_only(readout_of):
    detector = Detector("zh", 0, 0, 0.5, 1.0)
    loud_first, loud_later, nothing = [[9.0], [0.0]], [[0.0], [9.0]], [[9.0]]
    assert detector.predict(readout_of(loud_first, loud_later, nothing)).tolist() == [False, True, False]


def test_what_makes_no_sense_is_refused(three, readout_of):
    text = [START, [1, 1]]
    cases = [
        (InputError, "at least two languages, got 1", lambda: monolinguality({"en": three["en"]})),
        (ShapeError, r"layer 0 .* and layer 1 \(2", lambda: monolinguality({"en": three["en"], "zh": readout_of(text, layer=1)})),
        (ShapeError, r"\(1 features\) and .*\(2 features\)", lambda: monolinguality({"en": three["en"], "zh": readout_of([[1], [2]])})),
        (InputError, "no token of language zh counts", lambda: monolinguality({"en": three["en"], "zh": readout_of([START])})),
        (InputError, "no readout of language 'fr'; there are en, zh, ru", lambda: fit_detector("fr", three)),
        (InputError, "0 candidates", lambda: fit_detector("en", three, candidates=0)),
        (ShapeError, "reads layer 4, the readout is of layer 0", lambda: Detector("en", 4, 0, 0.5, 1.0).predict(three["en"])),
        (InputError, "both kinds", lambda: best_threshold(np.ones(2), np.ones(2, bool))),
        (InputError, "both kinds", lambda: balanced_accuracy(np.ones(2, bool), np.zeros(2, bool))),
        (InputError, "both kinds", lambda: detector_accuracy(Detector("fr", 0, 0, 0.5, 1.0), three)),
    ]
    for kind, line, call in cases:
        with pytest.raises(kind, match=line):
            call()
