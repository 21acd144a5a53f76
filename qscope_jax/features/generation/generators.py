"""Whoever answers a conversation: the local model, steered or not, or an endpoint on the network; what asks does not care which."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, runtime_checkable

# Some templates open the thoughts in the prompt, so that an answer only ends them; thoughts cut short are followed by nothing.
_THOUGHTS = re.compile(r"^.*?</think>|^\s*<think>.*", re.DOTALL)


class Message(TypedDict):
    """One turn of a conversation, in the terms of the chat protocol."""

    role: str
    content: str


@dataclass(frozen=True)
class Reply:
    """An answer, or why there is none.

    Attributes:
        text: The answer; empty where there is none, or where nothing was said.
        error: Why there is none, in one line; empty where there is one.
    """

    text: str
    error: str = ""

    @property
    def spoken(self) -> str:
        """The answer without what a model that thinks aloud thought before it; empty where it was cut while it thought."""
        return _THOUGHTS.sub("", self.text).strip()


@runtime_checkable
class Generator(Protocol):
    """Answers conversations. One that fails gets a `Reply` with its error; the others are answered all the same."""

    @property
    def name(self) -> str:
        """What answers, for records."""
        ...

    def __call__(self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> list[Reply]:
        """A reply to each conversation, in order."""
        ...
