import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from qscope_jax.features.explain.context_questions import (
    Example,
    detection_question,
    explanation_question,
    fuzzing_question,
    judge_score,
    read_answers,
    read_explanation,
)
from qscope_jax.features.generation.generators import Reply


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("They name drinks.\nExplanation: names of hot drinks", "names of hot drinks"),
        ("<think>Explanation: no</think>\n**Explanation:** tea and coffee", "tea and coffee"),
        ("Explanation: first\nExplanation: 茶", "茶"),
        ("names of hot drinks\n", "names of hot drinks"),
        ("I am not sure.\nIt may be drinks.", ""),
        ("", ""),
        ("Explanation:", ""),
    ],
)
def test_an_explanation_is_what_stands_behind_the_word(text, explanation):
    found, problem = read_explanation(Reply(text))
    assert found == explanation and bool(problem) == (not explanation)


def test_an_answer_that_never_came_says_why():
    assert read_explanation(Reply("", "no route to host")) == ("", "no explanation: no route to host")


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("[1, 0,1]", [True, False, True]),
        ("```json\n[0, 0, 0]\n```", [False] * 3),
        ("<think>[1, 1, 1]?</think> [1,0,0]", [True, False, False]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[1, 0, 1] or [0, 0, 0]", None),
        ("yes, no, yes", None),
        ("", None),
    ],
)
def test_answers_are_one_list_of_the_right_length(text, answers):
    assert read_answers(Reply(text), 3) == answers


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_balanced_accuracy_is_that_of_scikit_learn(pairs):
    right, said = zip(*pairs, strict=True)
    score = judge_score([[Example("", one)] for one in right], [Reply(f"[{int(one)}]") for one in said])
    if len(set(right)) == 2:
        assert score.balanced_accuracy == pytest.approx(balanced_accuracy_score(right, said))
    else:
        assert math.isnan(score.balanced_accuracy) and not score.measured
    assert score.true_positives + score.false_negatives == sum(right)


def test_what_cannot_be_read_and_what_failed_are_counted_apart():
    group = [Example("a", True), Example("b", False)]
    score = judge_score([group] * 4, [Reply("[1, 0]"), Reply("hm"), Reply("", "timed out"), Reply("[1]")])
    assert (score.unparsable, score.failed) == (4, 2) and "'hm' is no list of 2 numbers" in score.failure
    assert score.balanced_accuracy == 1.0


def test_questions_show_lines_as_they_stand_and_number_what_is_judged():
    assert explanation_question(["7 a ⟦b⟧", "1 c"])[1]["content"] == "7 a ⟦b⟧\n1 c"
    for question in (detection_question, fuzzing_question):
        rule, asked = question("drinks", ["a", "b"])
        assert rule["role"] == "system" and asked["content"] == "Explanation: drinks\n\n1. a\n2. b"
    assert "⟦" in fuzzing_question("", [])[0]["content"] and "⟦" not in detection_question("", [])[0]["content"]
