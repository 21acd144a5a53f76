import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.classify import text_baselines
from qscope_jax.features.classify.text_baselines import bag_of_words, mean_difference, stream_regression

POSITIVE = np.arange(80) % 2 == 0
DISCOVERY, EVALUATION = np.arange(60), np.arange(60, 80)


@pytest.fixture
def streams():
    rng = np.random.default_rng(0)
    return rng.standard_normal((80, 6)) + np.where(POSITIVE, 2.0, -2.0)[:, None] * np.eye(6)[2]


def test_a_direction_goes_from_the_mean_negative_to_the_mean_positive_text(streams):
    found = mean_difference(streams, POSITIVE, DISCOVERY, EVALUATION, layer=4)
    direction = streams[:60][POSITIVE[:60]].mean(axis=0) - streams[:60][~POSITIVE[:60]].mean(axis=0)
    np.testing.assert_allclose(found.score_B, streams[60:] @ direction, rtol=1e-5)
    assert found.layer == 4 and found.scores(POSITIVE[60:], samples=0).f1.value > 0.9 < found.discovery_f1
    assert (found.called_B == (found.score_B > found.settings["threshold"])).all()


def test_a_regression_on_streams_learns_what_parts_the_classes(streams):
    found = stream_regression(streams * 1000, POSITIVE, DISCOVERY, EVALUATION, layer=4)
    assert found.scores(POSITIVE[60:], samples=0).f1.value > 0.9 and found.settings["C"] in text_baselines.STRENGTHS


def test_words_part_classes_also_where_no_blank_parts_words():
    texts = [f"你{'真笨蛋' if positive else '真友好'}{chr(0x4E00 + i)}" for i, positive in enumerate(POSITIVE)]
    found = bag_of_words(texts, POSITIVE, DISCOVERY, EVALUATION)
    assert found.layer is None and (found.called_B == POSITIVE[60:]).all()


def test_texts_without_a_letter_have_words_too():
    texts = [("🙁" if positive else "🙂") + "!" * (i % 3) for i, positive in enumerate(POSITIVE)]
    assert (bag_of_words(texts, POSITIVE, DISCOVERY, EVALUATION).called_B == POSITIVE[60:]).all()


def test_baselines_never_see_evaluation_labels(streams):
    texts = [f"w{i % 7} {'ab'[i % 3 > 0]}" for i in range(80)]
    shuffled = np.concatenate([POSITIVE[:60], ~POSITIVE[60:]])
    for fit in (
        lambda truth: mean_difference(streams, truth, DISCOVERY, EVALUATION, layer=0),
        lambda truth: stream_regression(streams, truth, DISCOVERY, EVALUATION, layer=0),
        lambda truth: bag_of_words(texts, truth, DISCOVERY, EVALUATION),
    ):
        one, other = fit(POSITIVE), fit(shuffled)
        assert (one.score_B == other.score_B).all() and (one.called_B == other.called_B).all() and one.settings == other.settings


def test_few_texts_are_fitted_without_a_search_and_one_class_is_refused(streams):
    found = stream_regression(streams, POSITIVE, np.array([0, 1]), EVALUATION, layer=0)
    assert found.settings == {"C": 1.0} and found.discovery_f1 == 0
    with pytest.raises(InputError, match="5 discovery texts are all of one class"):
        stream_regression(streams, POSITIVE, np.arange(0, 10, 2), EVALUATION, layer=0)
