"""Prompts whose answers should stay in their own language: read from a table, checked against the language that nobody asked for, rendered."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qscope_jax.data.chat_data import Message as Turn
from qscope_jax.data.chat_templates import ChatFormat, ChatTemplate, RefusedError
from qscope_jax.data.tables import load_table
from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.generation.generators import Message
from qscope_jax.features.generation.local_generator import DIALOGUE
from qscope_jax.features.scripts import find_script, language_scripts, script_share

_MOSTLY = 0.1


@dataclass(frozen=True)
class SwitchPrompt:
    """A prompt.

    Attributes:
        messages: Its turns as (role, content); the last is the one to answer.
        language: The language that it asks in, and that its answer should be in.
        task: What it is of, such as a benchmark; may be empty.
    """

    messages: tuple[tuple[str, str], ...]
    language: str
    task: str = ""


Renderer = Callable[[SwitchPrompt], str]
"""Makes of a prompt the text that a model continues."""


def load_prompts(
    source: str,
    *,
    column: str = "prompt",
    language_column: str = "language",
    task_column: str = "task",
    languages: Sequence[str] | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
) -> list[SwitchPrompt]:
    """Read prompts.

    A row has a text in `column`, or turns in a column `messages`, `[{"role": ..., "content": ...}, ...]`, of which those after the last one
    that is not an assistant's are left out.

    Args:
        source: What `load_table` reads.
        column: Column of the prompt where there are no `messages`.
        language_column: Column of its language.
        task_column: Column of its task; where there is none, tasks are empty.
        languages: Keep prompts of these languages only.
        split: Split of a hub dataset.
        limit: At most so many prompts of each language, drawn at random.
        seed: Of the draw.

    Raises:
        SourceError: there is no such source, or it is damaged or empty.
        InputError: a column is missing or holds something else, a prompt is blank or has no language, or none is left.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected 1 prompt of a language or more")
    table = load_table(source, split=split)
    tongues = table.classes(language_column)
    tasks = table.texts(task_column) if all(task_column in row for row in table.rows) else [""] * len(table)
    found = []
    for row, place, language, task in zip(table.rows, table.places, tongues, tasks, strict=True):
        if languages is None or language in languages:
            found.append(SwitchPrompt(_turns(row, column, f"{table.name} {place}"), language, task))
    if not found:
        raise InputError(f"{source}: has no prompts in {', '.join(languages or ())}; it has {', '.join(sorted(set(tongues)))}")
    return found if limit is None else _drawn(found, limit, seed)


def check_prompts(prompts: Sequence[SwitchPrompt], script: str) -> int:
    """Check that characters of a script can be told from what the prompts ask for.

    Returns:
        How many prompts contain some of them all the same, in a quotation for instance; their answers may quote them too.

    Raises:
        InputError: there are no prompts, one has no language, or a language uses the script itself: by its code, or where that is not known by
            what its prompts are written in.
    """
    if not prompts:
        raise InputError("no prompts to sample answers of; give at least one")
    by_language: dict[str, list[str]] = {}
    for index, prompt in enumerate(prompts):
        if not prompt.language.strip():
            raise InputError(f"prompt {index} has no language; label every prompt, since an answer in its own language is no switch")
        by_language.setdefault(prompt.language, []).append("\n".join(content for _, content in prompt.messages))
    for language, texts in by_language.items():
        own = language_scripts(language)
        shared = set(own) & set(script.split("+")) if own else script_share(texts, script) > _MOSTLY
        if shared:
            found = f"prompts in {language!r} ({len(texts)} of {len(prompts)}) are written in {script} themselves"
            raise InputError(f"{found}; leave them out, a switch in their answers cannot be seen")
    return sum(find_script(text, script) >= 0 for texts in by_language.values() for text in texts)


def prompt_renderer(tokenizer: Any, *, chat: bool | None = None, format: ChatFormat | None = None) -> Renderer:
    """How prompts become texts to continue.

    Args:
        tokenizer: A Hugging Face tokenizer.
        chat: Write prompts by a chat template; by default where there is one. Without, a single turn is continued as it stands, and several are
            written below each other with their roles.
        format: How conversations are written, as in training; by default the tokenizer's own template.

    Raises:
        InputError: a chat template is asked for and there is none.
        ConfigError: the template is unusable.
    """
    format = format or ChatFormat()
    if not (uses_chat(tokenizer, format) if chat is None else chat):
        return lambda prompt: prompt.messages[0][1] if len(prompt.messages) == 1 else DIALOGUE.render(_conversation(prompt))
    if not uses_chat(tokenizer, format):
        raise InputError("the tokenizer has no chat template; name one, or continue the prompts as they stand")
    template = ChatTemplate(tokenizer, format)
    # A tokenizer that begins every text with a token of its own would write what the template has written already.
    begin = getattr(tokenizer, "bos_token", None) or ""
    twice = bool(begin) and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == tokenizer(begin, add_special_tokens=False)["input_ids"]

    def render(prompt: SwitchPrompt) -> str:
        try:
            text = template.prompt([Turn(*message) for message in prompt.messages])
        except RefusedError as refusal:
            raise InputError(f"{template.name} gives no prompt for {prompt.messages[-1][1][:40]!r}: {refusal}; choose another template") from refusal
        return text.removeprefix(begin) if twice else text

    return render


def uses_chat(tokenizer: Any, format: ChatFormat) -> bool:
    """Whether there is a chat template, named or the tokenizer's own."""
    return bool(format.template or getattr(tokenizer, "chat_template", None))


def _conversation(prompt: SwitchPrompt) -> list[Message]:
    return [{"role": role, "content": content} for role, content in prompt.messages]


def _turns(row: Any, column: str, where: str) -> tuple[tuple[str, str], ...]:
    """The turns of a row up to the one to answer."""
    if row.get("messages") is None:
        if not isinstance(row.get(column), str):
            raise InputError(f"{where}: has neither messages nor a text in column {column!r}; the columns there are {', '.join(map(repr, row))}")
        turns = [("user", row[column])]
    else:
        turns = [_turn(message, where) for message in row["messages"]]
        asked = [place for place, (role, _) in enumerate(turns) if role != "assistant"]
        turns = turns[: asked[-1] + 1] if asked else []
    if not turns or not turns[-1][1].strip():
        raise InputError(f"{where}: its prompt is blank; mend or remove the row")
    return tuple(turns)


def _turn(message: Any, where: str) -> tuple[str, str]:
    if isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str):
        return message["role"], message["content"]
    raise SourceError(f"{where}: a message is {str(message)[:60]!r}, expected role and content, both text")


def _drawn(prompts: list[SwitchPrompt], limit: int, seed: int) -> list[SwitchPrompt]:
    """At most `limit` of each language, in their order."""
    kept: list[int] = []
    for language in Counter(prompt.language for prompt in prompts):
        own = [index for index, prompt in enumerate(prompts) if prompt.language == language]
        kept += own if len(own) <= limit else np.random.default_rng(seed).choice(own, limit, replace=False).tolist()
    return [prompts[index] for index in sorted(kept)]
