import json

import pyarrow
import pyarrow.parquet
import pytest

from qscope_jax.data.choices import ChoiceQuestion, load_choices
from qscope_jax.errors import InputError, SourceError

ROW = {"question": "What is it?", "choices": ["red", "blue", "green"], "answer": 1}


@pytest.fixture
def written(tmp_path):
    def write(*rows: dict) -> str:
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("answer", [1, "1", "B", "b", "blue", " blue "])
def test_an_answer_is_a_number_a_letter_or_a_text(written, answer):
    assert load_choices(written({**ROW, "answer": answer})) == [ChoiceQuestion("What is it?", ("red", "blue", "green"), 1)]


def test_a_text_that_is_a_choice_is_no_number_or_letter(written):
    assert load_choices(written({**ROW, "choices": [3, 2, 1], "answer": "2"}))[0].answer == 1
    assert load_choices(written({**ROW, "choices": [3, 2, 1], "answer": 2}))[0].answer == 2
    assert load_choices(written({**ROW, "choices": ["B", "A"], "answer": "A"}))[0].answer == 1


def test_questions_and_choices_may_fill_several_columns(written):
    row = {"passage": "It rained.", "q": "Was it wet?", "A": "yes", "B": "no", "label": "A", "language": "en"}
    found = load_choices(written(row), question=["passage", "q"], choices=["A", "B"], answer="label", group="language")
    assert found == [ChoiceQuestion("It rained.\nWas it wet?", ("yes", "no"), 0, "en")]


def test_parquet_and_csv_say_the_same_as_lines(tmp_path, written):
    expected = load_choices(written(ROW, {**ROW, "answer": 0}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, {**ROW, "answer": 0}]), tmp_path / "q.parquet")
    assert load_choices(str(tmp_path / "q.parquet")) == expected
    (tmp_path / "q.csv").write_text("question,a,b,c,answer\nWhat is it?,red,blue,green,1\nWhat is it?,red,blue,green,A\n")
    assert load_choices(str(tmp_path / "q.csv"), choices=["a", "b", "c"]) == expected


def test_some_are_drawn(written):
    source = written(*({**ROW, "question": str(i)} for i in range(50)))
    found = [one.question for one in load_choices(source, limit=10, seed=1)]
    assert len(found) == 10 and found == sorted(found, key=int) and int(found[-1]) > 10
    assert found == [one.question for one in load_choices(source, limit=10, seed=1)] != [one.question for one in load_choices(source, limit=10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "line 1: column answer holds '3', expected one of its choices, a letter from A to C, or 0 to 2"),
        ({"answer": "D"}, "holds 'D'"),
        ({"answer": True}, "holds 'True'"),
        ({"answer": None}, "holds 'None'"),
        ({"choices": ["red", "red", "blue"], "answer": "red"}, "which 2 choices say"),
        ({"choices": ["red"]}, "has 1 choices for a question"),
        ({"choices": ["red", " "]}, "choice 1 is blank"),
        ({"choices": [{"text": "red"}, "blue"]}, "column choices holds dict"),
        ({"question": None}, "a question of 0 letters"),
    ],
)
def test_a_row_that_is_no_question_is_refused_with_its_place(written, change, message):
    with pytest.raises(InputError, match=message):
        load_choices(written({**ROW, **change}))


def test_missing_columns_and_files_are_named(written, tmp_path):
    with pytest.raises(InputError, match="no column 'ending'; the columns there are 'question', 'choices', 'answer'"):
        load_choices(written(ROW), choices=["ending"])
    with pytest.raises(SourceError, match="no such file"):
        load_choices(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="limit is 0"):
        load_choices(written(ROW), limit=0)
