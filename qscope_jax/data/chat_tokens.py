"""Conversations as tokens, with those that are trained: the answers and what ends them."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qscope_jax.data.chat_data import Conversation, Message
from qscope_jax.data.chat_templates import ChatFormat, ChatTemplate, RefusedError, spanning_tokens
from qscope_jax.data.texts import Slice
from qscope_jax.errors import InputError

_BATCH = 256  # conversations tokenised together


@dataclass(frozen=True, eq=False)
class ChatRow:
    """A conversation in tokens.

    Attributes:
        tokens: Token ids.
        trained: Whether the token is an answer's or what ends one. Never the first, which nothing predicts.
        language: The conversation's label.
    """

    tokens: Int32[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]
    language: str


class ChatRows(Sequence[ChatRow]):
    """Conversations in tokens, read by index; all of them lie in two arrays. Made by `chat_rows`.

    Attributes:
        refused: Reason -> conversations that were left out for it.
        truncated: Conversations cut on the right.
    """

    def __init__(
        self,
        tokens: Int32[np.ndarray, " N"],
        trained: Bool[np.ndarray, " N"],
        offsets: Int64[np.ndarray, " _"],
        languages: Sequence[str],
        refused: Mapping[str, int],
        truncated: int,
    ):
        """Hold rows that follow each other; row i lies from `offsets[i]` to `offsets[i + 1]`."""
        self._tokens, self._trained, self._offsets, self._languages = tokens, trained, offsets, languages
        self.refused, self.truncated = refused, truncated

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._languages)

    @overload
    def __getitem__(self, index: int) -> ChatRow: ...
    @overload
    def __getitem__(self, index: slice) -> Slice[ChatRow]: ...
    def __getitem__(self, index: int | slice) -> "ChatRow | Slice[ChatRow]":
        """A row, or some of them."""
        if isinstance(index, slice):
            return Slice(self, range(len(self))[index])
        place = range(len(self))[index]
        span = slice(self._offsets[place], self._offsets[place + 1])
        return ChatRow(self._tokens[span], self._trained[span], self._languages[place])


def chat_rows(conversations: Sequence[Conversation], tokenizer: Any, format: ChatFormat, *, length: int) -> ChatRows:
    """Render and tokenise conversations, and mark the tokens that are trained.

    Trained are the tokens that lie wholly in an answer or in what ends it. Where an answer begins, the text is what `prompt_text` gives for
    the turns before; what the template itself puts between there and the content, such as an empty thought, is trained as well. In earlier
    turns of a template whose generation prompt opens a thought but which drops thoughts later, the answer begins with its content.
    Templates write the tokens that begin a text themselves, so none are added.

    Args:
        conversations: What `load_conversations` gives.
        tokenizer: A fast Hugging Face tokenizer.
        format: How conversations are written.
        length: Most tokens of a row; longer ones are cut on the right.

    Returns:
        The rows in order, without the conversations that are left out: an answer is empty or its place does not show, or it is cut off.

    Raises:
        InputError: there are no conversations, `length` is below 2, or more are left out than the format allows.
        ConfigError: the template is unusable, or the tokenizer does not say which characters its tokens are.
        SourceError: the template's file cannot be read.
    """
    if not len(conversations) or length < 2:
        raise InputError(f"{len(conversations)} conversations in rows of {length} tokens; expected at least 1 and rows of 2 or more")
    template = ChatTemplate(tokenizer, format)
    rows: list[ChatRow] = []
    refused: Counter[str] = Counter()
    first: dict[str, str] = {}
    truncated = 0

    def refuse(reason: str, conversation: Conversation) -> None:
        refused[reason] += 1
        first.setdefault(reason, conversation.where)

    for start in range(0, len(conversations), _BATCH):
        rendered: list[tuple[Conversation, str, list[tuple[int, int]]]] = []
        for conversation in conversations[start : start + _BATCH]:
            try:
                rendered.append((conversation, *template.answers(conversation.messages)))
            except RefusedError as refusal:
                refuse(str(refusal), conversation)
        for (conversation, _, spans), (tokens, offsets) in zip(rendered, spanning_tokens(tokenizer, [text for _, text, _ in rendered]), strict=True):
            trained = _inside(offsets, spans)[:length]
            if not trained.any():
                refuse(f"no answer within {length} tokens", conversation)
                continue
            truncated += len(tokens) > length
            rows.append(ChatRow(tokens[:length], trained, conversation.language))
    _check_share(refused, first, len(conversations), format)
    offsets = np.fromiter(itertools.accumulate((len(row.tokens) for row in rows), initial=0), np.int64, len(rows) + 1)
    tokens, trained = np.concatenate([row.tokens for row in rows]), np.concatenate([row.trained for row in rows])
    return ChatRows(tokens, trained, offsets, [row.language for row in rows], dict(refused), truncated)


def prompt_text(messages: Sequence[Message], tokenizer: Any, format: ChatFormat) -> str:
    """The text after which the assistant answers, as in training; to be tokenised without adding special tokens.

    Raises:
        InputError: the template does not render these turns.
        ConfigError: the template is unusable.
        SourceError: its file cannot be read.
    """
    template = ChatTemplate(tokenizer, format)
    try:
        return template.prompt(messages)
    except RefusedError as refusal:
        raise InputError(f"{template.name} gives no prompt for these {len(messages)} turns: {refusal}") from refusal


def turn_end_ids(tokenizer: Any, format: ChatFormat) -> list[int]:
    """Tokens that end an answer, as trained; where it is one, generation stops at it.

    Raises:
        ConfigError: the template is unusable, or writes nothing after an answer.
        SourceError: its file cannot be read.
    """
    return list(tokenizer(ChatTemplate(tokenizer, format).end, add_special_tokens=False)["input_ids"])


def _inside(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Whether each token, but the first, lies wholly inside one of the spans. A character over several tokens counts for each of them."""
    inside = np.zeros(len(offsets), bool)
    for begin, end in spans:
        inside |= (offsets[:, 0] >= begin) & (offsets[:, 1] <= end) & (offsets[:, 1] > begin)
    inside[:1] = False
    return inside


def _check_share(refused: Counter[str], first: Mapping[str, str], total: int, format: ChatFormat) -> None:
    count = refused.total()
    if count == total or count > format.max_refused_share * total:
        reasons = "; ".join(f"{number} x {reason} (first: {first[reason] or 'not named'})" for reason, number in refused.most_common(5))
        allowed = f"{format.max_refused_share:.1%} may be left out (max_refused_share)" if count < total else "none is left"
        raise InputError(f"{count} of {total} conversations cannot be trained on, {allowed}: {reasons}; mend them or choose another chat template")
