"""Texts side by side in rows, each in one piece."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from qscope_jax.data.batches import TokenBatch
from qscope_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rows of whole texts.

    Attributes:
        batch: Tokens, segments and positions.
        texts_BT: Which text each token is of; -1 at padding.
        places_BT: Where each token lies when texts follow each other in their own order; -1 at padding.
    """

    batch: TokenBatch
    texts_BT: Int32[np.ndarray, "B T"]
    places_BT: Int[np.ndarray, "B T"]


def pack_texts(token_ids: Sequence[Sequence[int]], *, batch_size: int, length: int) -> list[PackedBatch]:
    """Texts in as few rows as a best fit of the longest first finds; the last batch is filled up with empty rows.

    Args:
        token_ids: Tokens of each text, at least one and at most `length`.
        batch_size: Rows of a batch (B).
        length: Tokens of a row (T).

    Raises:
        InputError: a text has no token, or more than a row holds.
    """
    lengths = [len(ids) for ids in token_ids]
    if lengths and not 1 <= min(lengths) <= max(lengths) <= length:
        raise InputError(f"texts have {min(lengths)} to {max(lengths)} tokens, expected 1 to {length}, a row's length")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = _best_fit(lengths, length)
    batches = []
    for first in range(0, len(rows), batch_size):
        tokens, segments, positions, texts = (np.zeros((batch_size, length), np.int32) for _ in range(4))
        texts -= 1
        places = np.full((batch_size, length), -1, np.int64)
        for row, members in enumerate(rows[first : first + batch_size]):
            start = 0
            for segment, text in enumerate(members, 1):
                span = (row, slice(start, start + lengths[text]))
                tokens[span], segments[span], positions[span], texts[span] = token_ids[text], segment, np.arange(lengths[text]), text
                places[span] = np.arange(offsets[text], offsets[text + 1])
                start += lengths[text]
        batches.append(PackedBatch(TokenBatch(tokens, segments, positions), texts, places))
    return batches


def _best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Texts of each row: the longest first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row), ascending
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        place = bisect_left(room, (lengths[text], -1))
        left, row = room.pop(place) if place < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(text)
        if left > lengths[text]:
            insort(room, (left - lengths[text], row))
    return rows
