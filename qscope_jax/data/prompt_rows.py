"""Prompts for reinforcement learning: what is asked, and columns, such as the answer, that rewards look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qscope_jax.data.chat_data import Message, read_turns
from qscope_jax.data.tables import load_table, read_text
from qscope_jax.errors import InputError


@dataclass(frozen=True)
class PromptRow:
    """A prompt.

    Attributes:
        messages: Its turns; the last is the one to answer.
        columns: All other columns of its row.
        where: Where it stands, such as `train.jsonl line 3`.
    """

    messages: tuple[Message, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


def load_prompt_rows(source: str | Path, *, column: str = "prompt", split: str = "train", limit: int | None = None) -> list[PromptRow]:
    """Read prompts: a text in `column`, or turns in `messages`, of which an assistant's at the end are left out.

    Rows that lack a column which others have get None there, so that every row has the same.

    Args:
        source: What `qscope_jax.load_table` reads.
        column: Column of the prompt where a row has no `messages`; its value may also be a list of turns.
        split: Split of a hub dataset.
        limit: At most this many rows.

    Raises:
        SourceError: there is no such source, or it is empty, damaged, or of another kind.
        InputError: a row has no prompt, a blank one, or turns that cannot be read; file and row are named.
    """
    table = load_table(source, split=split, limit=limit)
    names = list(dict.fromkeys(name for row in table.rows for name in row if name not in (column, "messages")))
    found = []
    for row, place in zip(table.rows, table.places, strict=True):
        where = f"{table.name} {place}"
        own = "messages" if "messages" in row else column
        if own not in row:
            raise InputError(f"{where}: has the columns {', '.join(map(repr, row)) or 'none'}; expected {column} or messages")
        messages = _prompt(row[own], where, own)
        found.append(PromptRow(messages, {name: row.get(name) for name in names}, where))
    return found


def _prompt(value: Any, where: str, column: str) -> tuple[Message, ...]:
    turns = read_turns(value, where, column) if isinstance(value, list) else (Message("user", read_text(value, where, column)),)
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns or not turns[-1].content.strip():
        raise InputError(f"{where}: column {column} asks nothing; mend or remove the row")
    return turns
