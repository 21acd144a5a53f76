import jax
import numpy as np
import pytest

from qscope_jax.data.choices import ChoiceQuestion
from qscope_jax.errors import InputError
from qscope_jax.features.choices import ChoiceFormat, ChoiceScores, accuracy_change, choice_accuracy, score_choices
from qscope_jax.features.proportions import wilson
from qscope_jax.models.language_model import LanguageModel

QUESTIONS = (
    ChoiceQuestion("what is red?", ("a rose", "the sea, in the evening and at night", "x"), 0, "colours"),
    ChoiceQuestion("2 + 2", ("4", "22"), 0, "sums"),
    ChoiceQuestion(
        "a {brace} and a much longer question than the others, which makes a batch of its own", ("yes", "no", "maybe", "never"), 3, "sums"
    ),
)


def directly(model: LanguageModel, context: str, choice: str) -> float:
    """Log-likelihood of a choice's characters, one by one."""
    values, _ = model.logits([context + choice])
    ids = model.tokenize([context + choice])[0]
    scores = np.asarray(jax.nn.log_softmax(values[0], axis=-1))
    return float(sum(scores[place - 1, ids[place]] for place in range(len(context), len(ids))))


@pytest.fixture(scope="module")
def found(character_model):
    return score_choices(character_model, QUESTIONS, batch_size=4)


def test_a_choice_scores_as_its_tokens_do_one_by_one(character_model, found):
    for question, raw, normalised in zip(QUESTIONS, found.raw, found.normalised, strict=True):
        context = f"Question: {question.question}\nAnswer:"
        expected = [directly(character_model, context, " " + choice) for choice in question.choices]
        np.testing.assert_allclose(raw, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(normalised, np.array(expected) / [len(choice) for choice in question.choices], rtol=1e-4, atol=1e-4)


def test_neither_batches_nor_what_is_asked_beside_change_a_score(character_model, found):
    for size in (1, 32):
        again = score_choices(character_model, QUESTIONS[1:], batch_size=size)
        for ours, theirs in zip(again.raw, found.raw[1:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_letters_are_scored_below_the_choices(character_model):
    format = ChoiceFormat(frame="{question} =", separator="", letters=True)
    assert format.texts(QUESTIONS[1]) == ("2 + 2\nA. 4\nB. 22 =", ["A", "B"])
    found = score_choices(character_model, QUESTIONS[1:2], format)
    expected = [directly(character_model, "2 + 2\nA. 4\nB. 22 =", letter) for letter in "AB"]
    np.testing.assert_allclose(found.raw[0], expected, rtol=1e-4)
    np.testing.assert_array_equal(found.raw[0], found.normalised[0])


class Joining:
    """Characters are tokens, except that `b` and what follows it are one."""

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[ord(c) - 30 for c in text.replace("bc", "B").replace("bd", "D")] for text in texts]}


def test_a_token_that_a_choice_shares_with_the_question_is_scored_with_it(character_model):
    model = LanguageModel(character_model.decoder, tokenizer=Joining())
    found = score_choices(model, [ChoiceQuestion("ab", ("c", "d"), 0)], ChoiceFormat("{question}", ""))
    expected = [directly(character_model, "a", token) for token in "BD"]
    np.testing.assert_allclose(found.raw[0], expected, rtol=1e-4)


def test_a_long_choice_may_win_by_the_character_alone():
    question = ChoiceQuestion("what is blue?", ("x", "the sea, in the evening"), 1)
    raw = np.array([-4.0, -9.0])
    scores = ChoiceScores((question,), (raw,), (raw / [1, 23],))
    assert not scores.right("raw")[0] and scores.right("normalised")[0]


def made(*right: bool) -> ChoiceScores:
    """Scores of as many questions of two choices, in two groups."""
    questions = tuple(ChoiceQuestion(str(i), ("a", "b"), 0, "ab"[i % 2]) for i in range(len(right)))
    rows = tuple(np.array([0.0, -1.0 if one else 1.0]) for one in right)
    return ChoiceScores(questions, rows, tuple(-row for row in rows))


def test_accuracy_is_of_all_and_of_each_group():
    rows = choice_accuracy(made(True, True, False, True, True, False))
    assert [(row.group, row.questions, row.chance) for row in rows] == [("", 6, 0.5), ("a", 3, 0.5), ("b", 3, 0.5)]
    assert rows[0].raw == wilson(4, 6) and rows[0].normalised == wilson(2, 6) and rows[1].raw == wilson(2, 3) == rows[2].raw
    assert len(choice_accuracy(made(True))) == 1


def test_a_change_is_of_the_same_questions():
    before, after = made(*[True] * 30, *[False] * 30), made(*[True] * 45, *[False] * 15)
    found = accuracy_change(before, after)
    assert found.value == 0.25 and 0.1 < found.low < 0.25 < found.high < 0.4
    assert accuracy_change(before, before) == (0, 0, 0)
    with pytest.raises(InputError, match="different questions"):
        accuracy_change(before, made(True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: score_choices(model, []), "0 questions in batches of 32"),
        (lambda model: score_choices(model, QUESTIONS, batch_size=0), "3 questions in batches of 0"),
        (lambda model: score_choices(model, QUESTIONS, ChoiceFormat("x")), "'x' has no place for the question"),
        (lambda model: score_choices(model, [ChoiceQuestion("a" * 1200, ("b", "c"), 0)]), "question 0 has 1220 tokens.*1024 positions"),
        (lambda model: score_choices(model, [ChoiceQuestion("a", ("b",) * 27, 0)], ChoiceFormat(letters=True)), "27 choices"),
    ],
)
def test_what_cannot_be_scored_is_refused(character_model, call, message):
    with pytest.raises(InputError, match=message):
        call(character_model)
