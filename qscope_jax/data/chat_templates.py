"""How a conversation is written out: chat templates, and the characters of a rendered conversation that are answers."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.data.chat_data import Message
from qscope_jax.errors import ConfigError, SourceError

# No line breaks inside: the environment that renders templates drops those behind a block.
BUILT_IN = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Gemma knows no system turn: its text goes above the first question.
    "gemma": (
        "{{ bos_token }}{% set first = namespace(text='') %}{% for message in messages %}"
        "{% if message.role == 'system' %}{% set first.text = message.content | trim + '\n\n' %}{% else %}"
        "{% if message.role == 'assistant' and first.text %}{{ raise_exception('a system text with no question after it') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}"
        "{{ first.text + message.content | trim + '<end_of_turn>\n' }}{% set first.text = '' %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # For models that know no turns: question, blank line, answer, end of text.
    "plain": (
        "{{ bos_token }}{% for message in messages %}{{ message.content | trim }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{{ '' if loop.last else '\n\n' }}{% else %}{{ '\n\n' }}{% endif %}{% endfor %}"
    ),
}
"""Templates by name, in Jinja."""

# Put in the place of an answer, and of other turns, to see what the template writes around it. Characters that belong to no text.
_STAND_IN, _BLANK = "\ue000answer\ue001", "\ue000other\ue001"
_PROBE = (Message("user", "?"), Message("assistant", _STAND_IN), Message("user", "?"))


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become tokens.

    Attributes:
        template: "" for the tokenizer's own chat template; the name of a built-in one (`chatml`, `gemma`, `llama3`, `plain`); or the path of
            a Jinja file.
        response_marker: The text after which an answer begins, such as `<|im_start|>assistant` and a line break. By default an answer begins
            where the template's generation prompt ends.
        turn_end: The text that ends an answer, trained with it. By default what the template writes after one, up to the line break.
        max_refused_share: Share of conversations that may be left out.

    Raises:
        ConfigError: the share is out of range.
    """

    template: str = ""
    response_marker: str = ""
    turn_end: str = ""
    max_refused_share: float = 0.05

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.max_refused_share <= 1:
            raise ConfigError(f"max_refused_share is {self.max_refused_share}; expected 0 to 1")


class RefusedError(Exception):
    """A conversation that cannot be trained on, or prompted with, in this format; the message is the reason."""


class ChatTemplate:
    """A tokenizer's way to write conversations."""

    def __init__(self, tokenizer: Any, format: ChatFormat):
        """Read the template and try it.

        Raises:
            ConfigError: there is no such template, it cannot be read, or it does not render a question and its answer.
            SourceError: its file cannot be read.
        """
        self._tokenizer, self._format = tokenizer, format
        self._template = BUILT_IN.get(format.template) or (read_template(format.template) if format.template else None)
        self.name = f"chat template {format.template!r}" if format.template else "the tokenizer's chat template"
        if self._template is None and not tokenizer.chat_template:
            raise ConfigError(f"the tokenizer has no chat template; set template to one of {', '.join(BUILT_IN)} or to a Jinja file")
        try:
            self._render(_PROBE[:2])
        except RefusedError as refusal:
            raise ConfigError(f"{self.name} cannot render a question and its answer: {refusal}; mend it or choose another") from refusal

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation so far, up to where the assistant's answer begins.

        Raises:
            RefusedError: it cannot be rendered, or shows no such place.
        """
        if not messages:
            raise RefusedError("no turn before the answer")
        if self._prompts:
            return self._render(messages, prompt=True)
        messages = [*messages, _PROBE[1]]
        before, _ = self._around(messages, len(messages) - 1)
        return before[: len(before) - self._opening(messages, len(messages) - 1)]

    def answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and for each of its answers the first character and the end, with what ends the turn.

        Raises:
            RefusedError: it cannot be rendered, an answer is empty, or an answer's place does not show.
        """
        turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if any(not messages[turn].content.strip() for turn in turns):
            raise RefusedError("an empty answer")
        if turns and turns[0] == 0:
            raise RefusedError("no turn before the answer")
        text = self._render(messages)
        return text, [self._span(text, messages, turn) for turn in turns]

    @cached_property
    def end(self) -> str:
        """What ends an answer that other turns may follow.

        Raises:
            ConfigError: the template writes nothing there.
        """
        if self._format.turn_end:
            return self._format.turn_end
        _, last = self._around(_PROBE[:2], 1)
        try:
            _, inner = self._around(_PROBE, 1)
        except RefusedError:  # a template for one question and answer
            inner = last
        # What both share, but no token cut in two: `<|im_end|>` and `<|im_start|>` begin alike.
        shared = len(os.path.commonprefix([last, inner]))
        ((_, offsets),) = spanning_tokens(self._tokenizer, [last])
        whole = last[: max((end for _, end in offsets.tolist() if end <= shared), default=0)]
        end = whole.rstrip() or whole or last.rstrip() or last
        if not end:
            raise ConfigError(f"{self.name} writes nothing after an answer, so no model would learn to stop; let it write the tokenizer's eos_token")
        return end

    @cached_property
    def _prompts(self) -> bool:
        """Whether an answer begins where the generation prompt ends: there is one, or none is needed since answers follow questions at once."""
        if self._format.response_marker:
            return False
        prompt = self._render(_PROBE[:1], prompt=True)
        before, _ = self._around(_PROBE[:2], 1)
        return prompt != self._render(_PROBE[:1]) or (before.startswith(prompt) and not before[len(prompt) :].strip())

    def _span(self, text: str, messages: Sequence[Message], turn: int) -> tuple[int, int]:
        before, after = self._around(messages, turn)
        # A generation prompt may open a thought, which templates leave out of earlier turns: there the answer begins with its content.
        places = [self._render(messages[:turn], prompt=True), before] if self._prompts else [before[: len(before) - self._opening(messages, turn)]]
        begin = next((place for place in places if text.startswith(place)), None)
        if begin is None or not text.endswith(after):
            raise RefusedError("the template writes other turns differently for this answer")
        return len(begin), len(text) - len(after) + self._closing(messages, turn, after)

    def _opening(self, messages: Sequence[Message], turn: int) -> int:
        """Characters between where the answer begins and its content, found by the response marker."""
        marker = self._format.response_marker
        if not marker:
            raise RefusedError("the template marks no place where an answer begins; set response_marker")
        header = self._around(_blanked(messages), turn)[0].rpartition(_BLANK)[2]
        if marker not in header:
            raise RefusedError(f"no response marker {marker!r} before an answer")
        return len(header.rpartition(marker)[2])

    def _closing(self, messages: Sequence[Message], turn: int, after: str) -> int:
        """Characters behind the content, up to and with what ends the turn."""
        end = self.end
        footer = self._around(_blanked(messages), turn)[1].partition(_BLANK)[0] if self._format.turn_end else end
        if end not in footer or not after.startswith(footer):
            raise RefusedError(f"no {end!r} after an answer")
        return footer.index(end) + len(end)

    def _around(self, messages: Sequence[Message], turn: int) -> tuple[str, str]:
        """What the template writes before and after the content of a turn."""
        marked = [*messages[:turn], messages[turn]._replace(content=_STAND_IN), *messages[turn + 1 :]]
        before, found, after = self._render(marked).partition(_STAND_IN)
        if not found:
            raise RefusedError("the template leaves an answer out")
        return before, after

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        import jinja2

        turns = [message._asdict() for message in messages]
        try:
            return self._tokenizer.apply_chat_template(turns, chat_template=self._template, tokenize=False, add_generation_prompt=prompt)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{self.name} is no Jinja template (line {error.lineno}: {error.message}); mend it") from error
        except Exception as error:  # a template is a program, and fails as any
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RefusedError(f"the template refuses it ({reason})") from error


def spanning_tokens(tokenizer: Any, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each text its token ids [T], without any that the tokenizer would add, and the characters [T, 2] from and to which each reaches.

    Raises:
        ConfigError: the tokenizer does not know.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer does not say which characters its tokens are; give a fast one, with a tokenizer.json")
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return [
        # Faster than an array of a list of pairs, which takes as long as tokenising.
        (np.asarray(ids, np.int32), np.fromiter(itertools.chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2))
        for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def _blanked(messages: Sequence[Message]) -> list[Message]:
    """The same turns without their texts, so that a marker inside a text does not count."""
    return [message._replace(content=_BLANK) for message in messages]


def read_template(template: str) -> str:
    """The Jinja text of a file.

    Raises:
        ConfigError: there is no such file, or it is empty.
        SourceError: it cannot be read.
    """
    path = Path(template).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat template {template!r}: is neither built in ({', '.join(BUILT_IN)}) nor a file; give one of these or a Jinja file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{template}: cannot be read as a chat template ({error}); expected a Jinja file in UTF-8") from error
    if not text.strip():
        raise ConfigError(f"chat template {template!r}: is empty; expected a Jinja template")
    return text
