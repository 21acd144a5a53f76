"""Chats to fixed-size batches, shuffled, packed and resumable exactly, each token with whether it is trained and its language."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Int32

from qscope_jax.data.batches import BatchConfig, BatchIterator, packed_rows, pad_batch
from qscope_jax.data.chat_tokens import ChatRow
from qscope_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class ChatBatch:
    """Rows of tokens from one or more chats each.

    Attributes:
        tokens_BT: Token ids; 0 at padding.
        segment_ids_BT: 1, 2, ... numbers the chats of a row; 0 is padding.
        positions_BT: Position inside the chat, from 0; 0 at padding.
        trained_BT: Whether the token is one that the model learns to say: an answer's or what ends it. Never a chat's first.
        languages_BT: Index of the chat's language; -1 at padding and where it is not among the languages.
    """

    tokens_BT: Int32[np.ndarray, "B T"]
    segment_ids_BT: Int32[np.ndarray, "B T"]
    positions_BT: Int32[np.ndarray, "B T"]
    trained_BT: Bool[np.ndarray, "B T"]
    languages_BT: Int32[np.ndarray, "B T"]


ChatBatchIterator: TypeAlias = BatchIterator[ChatBatch]


def chat_batches(rows: Sequence[ChatRow], languages: Sequence[str], config: BatchConfig) -> ChatBatchIterator:
    """Shuffle, pack and batch chats.

    Every chat appears whole and exactly once an epoch. Where one epoch ends and the next begins, their rows may mix. The last batch of a
    finite run is filled up with padding rows.

    Args:
        rows: Chats, read by index.
        languages: Labels that `languages_BT` counts.
        config: Sizes and order.

    Raises:
        InputError: there are no chats, or one is longer than a row.
    """
    if not len(rows):
        raise InputError("there are no chats to make batches of; give at least one")
    lengths = [len(row.tokens) for row in rows]
    if max(lengths) > config.length:
        raise InputError(f"chat {np.argmax(lengths)} has {max(lengths)} tokens, more than the row length {config.length}; cut chats to that length")
    index = _language_index(languages)

    def arrays(row: ChatRow) -> dict[str, np.ndarray]:
        # Counted from 1 inside the pipeline, whose padding is 0.
        language = np.full(len(row.tokens), 1 + index.get(row.language, -1), np.int32)
        return {"tokens": row.tokens, "trained": row.trained, "languages": language}

    packed = packed_rows(rows, arrays, ("tokens", "trained", "languages"), config)
    return BatchIterator(packed, _chat_batch, {"documents": len(rows), "tokens": sum(lengths)}, config)


def pad_chat(rows: Sequence[ChatRow], languages: Sequence[str], *, length: int) -> ChatBatch:
    """A row for each chat, padded on the right.

    Args:
        rows: Chats of at most `length` tokens.
        languages: Labels that `languages_BT` counts.
        length: Tokens in a row (T).

    Raises:
        InputError: there are no chats, or one is longer than `length`.
    """
    index = _language_index(languages)
    tokens, blank = pad_batch([row.tokens.tolist() for row in rows], length=length), padding_rows(len(rows), length)
    for place, row in enumerate(rows):
        blank.trained_BT[place, : len(row.tokens)] = row.trained
        blank.languages_BT[place, : len(row.tokens)] = index.get(row.language, -1)
    return ChatBatch(tokens.tokens_BT, tokens.segment_ids_BT, tokens.positions_BT, blank.trained_BT, blank.languages_BT)


def padding_rows(count: int, length: int) -> ChatBatch:
    """So many rows of padding."""
    tokens_BT, segment_ids_BT, positions_BT, languages_BT = (np.full((count, length), value, np.int32) for value in (0, 0, 0, -1))
    return ChatBatch(tokens_BT, segment_ids_BT, positions_BT, np.zeros((count, length), bool), languages_BT)


def _chat_batch(rows: Mapping[str, np.ndarray]) -> ChatBatch:
    return ChatBatch(rows["tokens"], rows["tokens_segment_ids"], rows["tokens_positions"], rows["trained"], rows["languages"] - 1)


def _language_index(languages: Sequence[str]) -> dict[str, int]:
    if repeated := sorted({label for label in languages if list(languages).count(label) > 1}):
        raise InputError(f"language {repeated[0]!r} is named twice; expected each once")
    return {label: index for index, label in enumerate(languages)}
