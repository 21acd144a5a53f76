"""Multiple-choice questions from local files or the hub, with the right answer however it is written down."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qscope_jax.data.tables import load_table
from qscope_jax.data.texts import check_column
from qscope_jax.errors import InputError


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question.

    Attributes:
        question: What is asked, passages to read included.
        choices: Possible answers, two or more.
        answer: Which of them is right, from 0.
        group: Its language, subject or whatever it is counted under; may be empty.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    group: str = ""


def load_choices(
    source: str,
    *,
    question: Sequence[str] = ("question",),
    choices: Sequence[str] = ("choices",),
    answer: str = "answer",
    group: str = "",
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
) -> list[ChoiceQuestion]:
    """Read questions.

    Args:
        source: What `load_table` reads: JSON lines, Parquet, CSV, or a dataset on the hub.
        question: Column of the question, or several that are put below each other.
        choices: One column that holds a list, or a column for each choice.
        answer: Column of the right one: the text of a choice, its letter, or its number from 0. What is text is looked for among the choices
            first.
        group: Column to count by; empty for none.
        split: Split of a hub dataset.
        limit: Read at most so many questions, drawn at random.
        seed: Of the draw.

    Raises:
        SourceError: there is no such source, or it is damaged or empty.
        InputError: a column is missing or holds something else, a question has fewer than two choices, or its answer is none of them.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected 1 question or more")
    table = load_table(source, split=split)
    if limit is not None and limit < len(table):
        table = table.select(sorted(np.random.default_rng(seed).choice(len(table), limit, replace=False).tolist()))
    groups = table.classes(group) if group else [""] * len(table)
    return [
        _question(row, f"{table.name} {place}", question, choices, answer, name)
        for row, place, name in zip(table.rows, table.places, groups, strict=True)
    ]


def _question(row: Mapping[str, Any], where: str, question: Sequence[str], choices: Sequence[str], answer: str, group: str) -> ChoiceQuestion:
    for column in (*question, *choices, answer):
        check_column(where, column, list(row))
    asked = "\n".join(text for column in question for text in _texts(row[column], where, column) if text)
    options = tuple(text for column in choices for text in _texts(row[column], where, column))
    if not asked.strip() or len(options) < 2:
        raise InputError(f"{where}: has {len(options)} choices for a question of {len(asked)} letters; expected a question and two choices or more")
    if blank := [number for number, option in enumerate(options) if not option.strip()]:
        raise InputError(f"{where}: choice {blank[0]} is blank; mend or remove the row")
    return ChoiceQuestion(asked, options, _place(row[answer], options, f"{where}: column {answer}"), group)


def _texts(value: Any, where: str, column: str) -> list[str]:
    """The texts of a cell; choices may be numbers, and a cell without any is empty."""
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if wrong := [item for item in items if isinstance(item, bool) or not isinstance(item, str | int | float)]:
        raise InputError(f"{where}: column {column} holds {type(wrong[0]).__name__}, expected text or a list of texts; choose another column")
    return [str(item) for item in items]


def _place(value: Any, options: Sequence[str], where: str) -> int:
    """Which of the options an answer means."""
    if isinstance(value, str):
        text = value.strip()
        found = [place for place, option in enumerate(options) if option.strip() == text]
        if len(found) > 1:
            raise InputError(f"{where} holds {value[:60]!r}, which {len(found)} choices say; give the letter or number of the right one")
        if not found and len(text) == 1 and text.upper() in string.ascii_uppercase:
            found = [string.ascii_uppercase.index(text.upper())]
        if not found and text.isascii() and text.isdigit():
            found = [int(text)]
    else:
        found = [value] if isinstance(value, int) and not isinstance(value, bool) else []
    if not found or not 0 <= found[0] < len(options):
        last = string.ascii_uppercase[min(len(options), 26) - 1]
        raise InputError(f"{where} holds {str(value)[:60]!r}, expected one of its choices, a letter from A to {last}, or 0 to {len(options) - 1}")
    return found[0]
