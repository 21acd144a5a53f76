import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.generation.generators import Reply
from qscope_jax.features.synthesis.judge import judge_same_meaning, judge_usefulness, read_score, read_yes_no
from qscope_jax.features.synthesis.targets import Target


class Scripted:
    """Answers by a list, and keeps what it was asked."""

    name = "scripted"

    def __init__(self, *answers: str | Reply):
        self.answers = [answer if isinstance(answer, Reply) else Reply(answer) for answer in answers]
        self.asked: list[list] = []

    def __call__(self, conversations, *, max_tokens=256, temperature=0.0, seed=0):
        self.asked += [list(conversation) for conversation in conversations]
        assert temperature == 0
        return self.answers[: len(conversations)]


@pytest.mark.parametrize(
    ("answer", "score"),
    [('{"score": 0.7}', 0.7), ("1", 1.0), (" 0.25\n", 0.25), ('```json\n{"score": 0}\n```', 0.0), ("<think>1 or 0?</think>\n0.5", 0.5)],
)
def test_a_score_is_read(answer, score):
    assert read_score(Reply(answer)) == score


@pytest.mark.parametrize(
    "answer", ["about 0.7", "0.7 or 0.8", "7", "-0.1", "true", "NaN", '{"score": "0.7"}', '{"score": 1, "why": "x"}', "[1]", "<think>1"]
)
def test_anything_else_is_no_score(answer):
    assert isinstance(read_score(Reply(answer)), str)


def test_yes_and_no_are_read_and_nothing_else():
    assert [read_yes_no(Reply(text)) for text in ("Yes.", "no", "<think>yes</think>NO!")] == [True, False, False]
    assert "neither yes nor no" in str(read_yes_no(Reply("yes and no"))) and read_yes_no(Reply("", "HTTP 500")) == "HTTP 500"


def test_usefulness_is_asked_of_each_explanation_and_failures_are_counted():
    judge = Scripted('{"score": 0.75}', "I think it is useful", Reply("", "HTTP 500"), "0.25")
    targets = [Target(0, feature, f"about {feature}", score=1.0) for feature in range(4)]
    found = judge_usefulness(targets, judge, purpose="baking bread")
    assert [target.score for target in found.targets] == [0.75, None, None, 0.25]
    assert [target.feature for target in found.at_least(0.5)] == [0] and set(found.failures) == {"0/1", "0/2"}
    assert all("about" in asked[1]["content"] and "baking bread" in asked[0]["content"] for asked in judge.asked)


def test_pairs_are_compared_one_by_one():
    judge = Scripted("yes", "no", "maybe")
    found = judge_same_meaning([("a", "b"), ("c", "d"), ("e", "f")], judge)
    assert found[:2] == [True, False] and isinstance(found[2], str)
    assert "First request:\nc" in judge.asked[1][1]["content"] and judge_same_meaning([], judge) == []


def test_what_is_not_explained_cannot_be_judged():
    with pytest.raises(InputError, match="target 0/1 has no explanation"):
        judge_usefulness([Target(0, 0, "x"), Target(0, 1)], Scripted())
