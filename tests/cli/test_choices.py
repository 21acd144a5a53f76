import json

import pytest

from qscope_jax.cli.choices import Config
from qscope_jax.features.choices import ChoiceFormat


@pytest.fixture
def questions(tmp_path):
    words = ("tea", "the garden", "grandmother")
    rows = [{"question": f"what is {word}?", "choices": words, "answer": word, "language": "en" if word == "tea" else "fr"} for word in words]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_are_scored_by_group_and_two_models_compared(qscope, model, questions, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(model)
    files = ("--out", tmp_path / "o.json", "--page", tmp_path / "p.html")
    answer = qscope("code-switch", "choices", questions, "--models", model, other, "--group", "language", *files)
    assert answer.status == 0 and not answer.err and "log-likelihood of choices" in answer.out
    saved = json.loads((tmp_path / "o.json").read_text())
    rows = saved["models"][model]
    assert saved["verb"] == "code-switch choices" and [(row["group"], row["questions"]) for row in rows] == [("", 3), ("en", 1), ("fr", 2)]
    assert all(row["raw"]["low"] <= row["raw"]["value"] <= row["raw"]["high"] and row["chance"] == pytest.approx(1 / 3) for row in rows)
    assert rows == saved["models"][str(other)] and saved["changes"][str(other)]["raw"]["value"] == 0
    assert "Multiple-choice accuracy" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_letters_and_other_frames_are_read(qscope, model, questions, tmp_path):
    for options in (["--letters"], ["--frame", "{question} =", "--separator", ""]):
        assert qscope("code-switch", "choices", questions, "--model", model, *options).status == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--answer", "label"], "line 1: has no column 'label'"),
        (["--frame", "x"], "has no place for the question"),
        (["--batch-size", 0], "batch_size is 0"),
        (["--models", "a", "a"], "name each of them once"),
    ],
)
def test_what_cannot_be_scored_is_refused(refused, questions, arguments, said):
    assert said in refused("code-switch", "choices", questions, *arguments)


def test_a_file_is_needed(refused, tmp_path):
    assert "no such file" in refused("code-switch", "choices", tmp_path / "none.jsonl")
    assert "QUESTIONS is missing" in refused("code-switch", "choices")


def test_defaults_are_the_library_s():
    assert ChoiceFormat(Config.frame, Config.separator, Config.letters) == ChoiceFormat()
