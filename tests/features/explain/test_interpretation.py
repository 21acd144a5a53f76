import re

import numpy as np
import pytest

from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.explain.contexts import Window
from qscope_jax.features.explain.interpretation import InterpretConfig, interpret_features, split_rows
from qscope_jax.features.generation.generators import Reply
from qscope_jax.features.readout import Readout
from tests.features.made_store import make_store

WORDS = ("tea", "sun", "run", "old", "blue", "door")
VOCABULARY = [f" {word}" for word in WORDS]
TEA, OFTEN, NEVER, ONCE = 0, 1, 2, 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Texts of twelve words; TEA fires at that word, OFTEN at all but one of them in every text, NEVER never, ONCE in one text."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 6, 12) for _ in range(80)]
    for text in range(0, 80, 2):
        ids[text][rng.integers(1, 12)] = 0
    values, indices = [], []
    for text, row in enumerate(ids):
        dense = np.zeros((12, 4), np.float32)
        dense[:, TEA] = (row == 0) * (text + 1)
        dense[:, OFTEN] = np.arange(12) != 5
        dense[4, ONCE] = text == 7
        order = np.argsort(-dense, axis=1, kind="stable")
        values.append(np.take_along_axis(dense, order, axis=1))
        indices.append(order)
    texts = tuple("".join(VOCABULARY[i] for i in row) for row in ids)
    counted = np.arange(12) > 0
    readout = Readout(
        3, 4, texts, tuple(tuple(row.tolist()) for row in ids), tuple(values), tuple(indices), (np.ones(12, np.float32),) * 80, (counted,) * 80
    )
    return make_store(tmp_path_factory.mktemp("s") / "store", readout, vocabulary=VOCABULARY, shard_texts=30)


class Reader:
    """Answers by a rule: explains every feature as tea, and says yes to lines that a pattern is found in."""

    name = "reader"

    def __init__(self, detect=" tea", fuzz="⟦ tea⟧", fail=lambda question: ""):
        self.detect, self.fuzz, self.fail, self.asked = detect, fuzz, fail, []

    def __call__(self, conversations, *, max_tokens=256, temperature=0.0, seed=0):
        return [self.answer(*(message["content"] for message in conversation)) for conversation in conversations]

    def answer(self, rule: str, question: str) -> Reply:
        self.asked.append((rule, question))
        if error := self.fail(question):
            return Reply("", error)
        if "Explanation: <the sentence>" in rule:
            return Reply("Explanation: the word tea")
        pattern = self.fuzz if "marked" in rule else self.detect
        lines = re.findall(r"^\d+\. (.*)$", question, re.MULTILINE)
        return Reply(str([int(bool(re.search(pattern, line))) for line in lines]))


SMALL = InterpretConfig(shown=8, scored=12, window=Window(11, 11), at_once=5)


def test_a_judge_that_knows_the_rule_scores_1(store):
    (found,) = interpret_features(store, 3, [TEA], Reader(), config=SMALL)
    assert found.explanation == "the word tea" and found.problem == ""
    assert found.scores == {"detection": 1.0, "fuzzing": 1.0}
    assert (found.detection.true_positives, found.detection.true_negatives) == (12, 12)
    assert found.fuzzing.true_positives == found.fuzzing.true_negatives == 6


@pytest.mark.parametrize("pattern", [".", "never"])
def test_a_judge_that_always_says_the_same_scores_one_half(store, pattern):
    (found,) = interpret_features(store, 3, [TEA], Reader(pattern, pattern), config=SMALL)
    assert found.scores == {"detection": 0.5, "fuzzing": 0.5}


def test_what_a_feature_is_scored_on_was_never_shown(store):
    reader = Reader()
    list(interpret_features(store, 3, [TEA], reader, config=SMALL))
    (shown,) = [question.splitlines() for rule, question in reader.asked if "Explanation: <the" in rule]
    shown = {line.split(" ", 1)[1].replace("⟦", "").replace("⟧", "") for line in shown}
    scored = {line.replace("⟦", "").replace("⟧", "") for _, question in reader.asked[1:] for line in re.findall(r"^\d+\. (.*)$", question, re.M)}
    assert len(shown) == 8 and scored and not shown & scored


def test_shown_contexts_mark_the_firing_tokens_and_say_how_strongly(store):
    reader = Reader()
    list(interpret_features(store, 3, [TEA], reader, config=SMALL))
    lines = reader.asked[0][1].splitlines()
    assert all("⟦ tea⟧" in line and line.count("⟦") == 1 for line in lines)
    strengths = [int(line.split()[0]) for line in lines]
    assert strengths[:4] == [10, 10, 9, 9] and min(strengths) < 7


def test_wrong_marks_are_tokens_at_which_the_feature_is_silent(store):
    """OFTEN fires everywhere but at one token; at the first it does not count, but fires all the same."""
    reader = Reader()
    list(interpret_features(store, 3, [OFTEN], reader, config=SMALL))
    lines = [line for rule, question in reader.asked if "tokens are marked" in rule for line in re.findall(r"^\d+\. (.*)$", question, re.M)]
    wrong = [line for line in lines if len(re.search("⟦(.*?)⟧", line)[1].split()) == 1]
    assert len(lines) == 12 and len(wrong) == 6
    assert all(len(line.split("⟦")[0].split()) == 5 for line in wrong)


def test_detection_shows_no_marks(store):
    reader = Reader()
    list(interpret_features(store, 3, [TEA], reader, config=SMALL))
    detections = [question for rule, question in reader.asked if "decide whether it contains" in rule]
    assert len(detections) == 5 and not any("⟦" in question for question in detections)


def test_explanations_that_are_there_are_scored_only_by_a_judge_of_its_own(store):
    generator, judge = Reader(), Reader()
    (found,) = interpret_features(store, 3, [TEA], generator, judge=judge, explanations={TEA: "a drink"}, config=SMALL)
    assert generator.asked == [] and found.explanation == "a drink" and found.scores["detection"] == 1.0
    assert all(question.startswith("Explanation: a drink\n") for _, question in judge.asked)


def test_features_without_enough_texts_say_so(store):
    never, once = interpret_features(store, 3, [NEVER, ONCE], Reader(), config=SMALL)
    assert (never.explanation, never.scores, never.problem) == ("", {}, "it never fires in the store")
    assert (once.explanation, once.scores) == ("the word tea", {}) and "too few texts" in once.problem


def test_a_feature_that_fires_everywhere_has_no_detection_score(store):
    (found,) = interpret_features(store, 3, [OFTEN], Reader(), config=SMALL)
    assert set(found.scores) == {"fuzzing"} and found.detection.true_negatives + found.detection.false_positives == 0
    assert found.fuzzing.true_positives + found.fuzzing.false_negatives == 6


def test_a_failure_costs_its_own_feature_only(store):
    fail = lambda question: "rate limit" if question.startswith("10 ") and "⟦ tea" not in question.splitlines()[0] else ""  # noqa: E731
    tea, often = interpret_features(store, 3, [TEA, OFTEN], Reader(fail=fail), config=SMALL)
    assert tea.scores["detection"] == 1.0 and tea.problem == ""
    assert (often.explanation, often.detection, often.problem) == ("", None, "no explanation: rate limit")
    (judged,) = interpret_features(store, 3, [TEA], Reader(), judge=Reader(fail=lambda _: "down"), config=SMALL)
    assert judged.explanation == "the word tea" and judged.scores == {} and judged.problem == "down" and judged.detection.failed == 24


def test_what_a_feature_is_asked_does_not_depend_on_the_others(store):
    alone, together = Reader(), Reader()
    (one,) = interpret_features(store, 3, [TEA], alone, config=SMALL)
    many = list(interpret_features(store, 3, [OFTEN, TEA, ONCE], together, config=SMALL))
    assert many[1] == one and set(alone.asked) <= set(together.asked)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
def test_rows_are_split_without_overlap_and_rare_features_keep_half_for_the_score(size):
    shown, scored = split_rows(size, 20, 30, np.random.default_rng(0))
    assert not set(shown) & set(scored) and len({*shown, *scored}) == len(shown) + len(scored)
    assert len(scored) == min(30, size // 2) and len(shown) == min(20, size - len(scored))
    assert shown[: (len(shown) + 1) // 2] == list(range((len(shown) + 1) // 2))


def test_bad_requests_are_refused(store):
    with pytest.raises(InputError, match="feature 4 is out of range"):
        interpret_features(store, 3, [4], Reader())
    with pytest.raises(ConfigError, match="mark_share is 0.0"):
        InterpretConfig(mark_share=0.0)
    with pytest.raises(ConfigError, match="scored is 0"):
        InterpretConfig(scored=0)
