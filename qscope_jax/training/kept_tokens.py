"""The tokens that count, as a model computes their residual streams: on the host, in order, cut where shards of a cache end."""

import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qscope_jax.data.batches import TokenBatch
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.training.activations import EMPTY_BATCHES, ActivationConfig, TappedStreams, no_token_counts, tap
from qscope_jax.training.tokens import TokenStream

T = TypeVar("T")

TOKEN_COLUMNS = {"token_ids": np.dtype(np.int32), "pieces": np.dtype(np.int64), "positions": np.dtype(np.int32)}
"""What is known of a kept token besides its streams: its id, the piece of a document it lies in (numbered through), and its place there."""


@dataclass(frozen=True)
class Place:
    """A place in the sequence of kept tokens.

    Attributes:
        cursor: Of the token stream, before the model batch that holds the next kept token.
        used: Kept tokens of that batch that come before the place.
        pieces: Pieces of documents before that batch.
        seen: Tokens before that batch, padding aside.
        dropped: Those among them that were left out.
        damaged: Those among them whose stream was not finite.
    """

    cursor: Mapping[str, Any]
    used: int = 0
    pieces: int = 0
    seen: int = 0
    dropped: int = 0
    damaged: int = 0


@dataclass(frozen=True)
class KeptTokens:
    """Consecutive kept tokens of one model batch.

    Attributes:
        rows_MND: Their streams, in the type asked for.
        norms_MN: The norms of these rows, in float32.
        columns: Name in `TOKEN_COLUMNS` -> [N].
        before: The place before the batch.
        place: The place after these tokens, which begins at the same batch.
        after: The place after the batch, without a cursor.
    """

    rows_MND: np.ndarray
    norms_MN: np.ndarray
    columns: Mapping[str, np.ndarray]
    before: Place
    place: Place
    after: Place

    def __len__(self) -> int:
        """Number of tokens."""
        return self.rows_MND.shape[1]

    def part(self, start: int, stop: int) -> "KeptTokens":
        """Some of them."""
        columns = {name: column[start:stop] for name, column in self.columns.items()}
        place = replace(self.before, used=self.before.used + stop)
        return replace(self, rows_MND=self.rows_MND[:, start:stop], norms_MN=self.norms_MN[:, start:stop], columns=columns, place=place)


class ShardedTokens:
    """Kept tokens from a place on, cut where shards end, up to a number of them."""

    def __init__(self, batches: Iterator[KeptTokens], shard_tokens: int, *, max_tokens: int | None = None, written: int = 0, place: Place):
        """Describe the cuts.

        Args:
            batches: Model batches, from the one at which `place` lies.
            shard_tokens: Tokens of a shard.
            max_tokens: Stop after so many, `written` included.
            written: Tokens before `place`.
            place: Where to begin.
        """
        self._batches, self._shard_tokens, self._max_tokens = batches, shard_tokens, max_tokens
        self._written, self._used = written, place.used
        self.after = place
        """The place after the last batch that was taken, for its counts."""

    def __iter__(self) -> Iterator[tuple[int, KeptTokens]]:
        """Pairs of a shard's index and tokens of it.

        Raises:
            QscopeError: many batches in a row, or all, hold no token that counts.
        """
        limit = math.inf if self._max_tokens is None else self._max_tokens
        empty, damaged = 0, 0
        for batch in self._batches:
            self.after = batch.after
            empty, damaged = (0, 0) if len(batch) else (empty + 1, damaged + batch.after.damaged - batch.before.damaged)
            if empty > EMPTY_BATCHES:
                raise no_token_counts(empty, damaged)
            start, self._used = self._used, 0
            while start < len(batch) and self._written < limit:
                shard, row = divmod(self._written, self._shard_tokens)
                stop = int(min(len(batch), start + self._shard_tokens - row, start + limit - self._written))
                self._written += stop - start
                yield shard, batch.part(start, stop)
                start = stop
            if self._written >= limit:
                return
        if not self._written:
            raise no_token_counts(empty, damaged)


def kept_tokens(model: LanguageModel, tokens: TokenStream, config: ActivationConfig, dtype: str, place: Place) -> Iterator[KeptTokens]:
    """Run the model over the batches of a token stream that stands at the cursor of `place`.

    The device is given the next batch before the host waits for the last one.
    """
    place = replace(place, used=0)
    computing: tuple[Mapping[str, Any], TokenBatch, TappedStreams, tuple[Array, Array]] | None = None
    while True:
        cursor = tokens.get_state().cursor
        batch = next(tokens, None)
        following = None
        if batch is not None:
            tapped = tap(model.decoder, batch, config, model.mesh)
            following = (cursor, batch, tapped, _keep(tapped.x_MBTD, tapped.mask_BT, dtype))
        if computing is not None:
            done = _on_host(*computing, before=place)
            yield done
            place = done.after
        if following is None:
            return
        computing = following


def ahead(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, made by a thread that works `depth` ahead; close the iterator to end the thread early."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        waiting = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


@partial(jax.jit, static_argnames="dtype")
def _keep(x_MBTD: Float[Array, "M B T D"], mask_BT: Bool[Array, "B T"], dtype: str) -> tuple[Float[Array, "M N D"], Float[Array, "M N"]]:
    """All rows in the disk's type, those that count first, and their norms."""
    order = jnp.argsort(~mask_BT.reshape(-1), stable=True)
    rows_MND = x_MBTD.reshape(x_MBTD.shape[0], -1, x_MBTD.shape[-1])[:, order].astype(dtype)
    return rows_MND, jnp.linalg.norm(rows_MND.astype(jnp.float32), axis=-1)


def _on_host(cursor: Mapping[str, Any], batch: TokenBatch, tapped: TappedStreams, kept: tuple[Array, Array], *, before: Place) -> KeptTokens:
    (rows_MND, norms_MN), mask_BT, seen, damaged = jax.device_get((kept, tapped.mask_BT, tapped.seen, tapped.damaged))
    chosen = np.flatnonzero(mask_BT)
    # Pieces of the rows above come first.
    above_B = np.cumsum([0, *batch.segment_ids_BT.max(axis=1)])
    pieces_BT = before.pieces + above_B[:-1, None] + batch.segment_ids_BT - 1
    columns = {"token_ids": batch.tokens_BT, "pieces": pieces_BT, "positions": batch.positions_BT}
    columns = {name: column.reshape(-1)[chosen].astype(TOKEN_COLUMNS[name]) for name, column in columns.items()}
    before, count = replace(before, cursor=cursor), len(chosen)
    after = Place(
        {},
        pieces=before.pieces + int(above_B[-1]),
        seen=before.seen + int(seen),
        dropped=before.dropped + int(seen) - count,
        damaged=before.damaged + int(damaged),
    )
    return KeptTokens(rows_MND[:, :count], norms_MN[:, :count], columns, before, replace(before, used=count), after)
