"""Conversations for fine-tuning, from JSON, Parquet or CSV files, folders of them, or the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qscope_jax.data.tables import read_text, stream_rows
from qscope_jax.errors import InputError, SourceError


class Message(NamedTuple):
    """A turn: `system`, `user` or `assistant`, and what it says."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order, at least one of them the assistant's; a system turn, if any, comes first.

    Attributes:
        messages: The turns.
        language: Label of the language it is in; "" where the data has none.
        where: Where it stands, such as `train.jsonl line 3`.
    """

    messages: tuple[Message, ...]
    language: str = ""
    where: str = ""


def load_conversations(
    source: str | Path, *, split: str = "train", limit: int | None = None, language_column: str = "language"
) -> list[Conversation]:
    """Read conversations, one a row, in whichever of these layouts a row has.

    A column `messages` or `conversations` with a list of {role, content}, or of {from, value} with the roles human, gpt and system (ShareGPT);
    or columns `prompt` and `response` (or `completion`); or `instruction`, `output` and optionally `input`, which goes below the instruction.

    Args:
        source: What `qscope_jax.load_table` reads.
        split: Split of a hub dataset.
        limit: At most this many rows.
        language_column: Column of language labels. Rows without it, or with nothing in it, have the label "".

    Raises:
        SourceError: there is no such source, or it is empty, damaged, or of another kind.
        InputError: a row is of none of these layouts, has another role or no answer, or holds what is no text; file and row are named.
    """
    rows = stream_rows(source, split=split, limit=limit)
    found = [
        Conversation(_messages(row, where), read_text(row.get(language_column), where, language_column).strip(), where)
        for where, row in ((f"{source} {place}", row) for place, row in rows)
    ]
    if not found:
        raise SourceError(f"{source}: holds no rows; check the source")
    return found


_LISTS = ("messages", "conversations")
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def _messages(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """A row's turns, by the first layout that it has the columns of."""
    for column in _LISTS:
        if column in row:
            return _turns(row[column], where, column)
    for question, answer in _PAIRS:
        if question in row and answer in row:
            asked, answered = (read_text(row[column], where, column) for column in (question, answer))
            more = read_text(row.get("input"), where, "input") if question == "instruction" else ""
            return Message("user", f"{asked}\n\n{more}" if more.strip() else asked), Message("assistant", answered)
    expected = " or ".join([*_LISTS, *map(" and ".join, _PAIRS)])
    raise InputError(f"{where}: has the columns {', '.join(map(repr, row)) or 'none'}; expected {expected}")


def _turns(value: Any, where: str, column: str) -> tuple[Message, ...]:
    messages = read_turns(value, where, column)
    if not any(message.role == "assistant" for message in messages):
        raise InputError(f"{where}: has no assistant turn among {len(messages)}; expected at least one answer, remove the row")
    return messages


def read_turns(value: Any, where: str, column: str) -> tuple[Message, ...]:
    """Turns from a list of {role, content} or {from, value}.

    Raises:
        InputError: it is something else; `where` it stands and its `column` are said.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InputError(f"{where}: column {column} holds {type(value).__name__}, expected a list of turns with role and content")
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        place = f"{where}: turn {number} of {column}"
        keys = next((keys for keys in _KEYS if isinstance(turn, Mapping) and turn.get(keys[0]) is not None), None)
        if keys is None or keys[1] not in turn:
            there = ", ".join(map(repr, turn)) if isinstance(turn, Mapping) else type(turn).__name__
            raise InputError(f"{place} has {there or 'nothing'}; expected role and content, or from and value")
        content = turn[keys[1]]
        role = next((known for name, known in _ROLES.items() if name == turn[keys[0]]), None)
        if role is None:
            raise InputError(f"{place} has the role {turn[keys[0]]!r}; expected system, user or assistant (or human, gpt)")
        if role == "system" and messages:
            raise InputError(f"{place} is a system text; expected one at the beginning alone")
        if not isinstance(content, str):
            raise InputError(f"{place} holds {type(content).__name__} as its {keys[1]}, expected text")
        messages.append(Message(role, read_text(content, f"{where} turn {number}", column)))
    return tuple(messages)
