"""Token batches as the training loop wants them: endless, resumable, and in lanes that several processes can share."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
from jax.sharding import Mesh

from qscope_jax.data.batches import BatchConfig, BatchIterator, TokenBatch, pad_batch, token_batches
from qscope_jax.data.chat_batches import ChatBatch, chat_batches, padding_rows
from qscope_jax.data.chat_tokens import ChatRow
from qscope_jax.data.text_stream import TextLane, TextStream
from qscope_jax.data.texts import Slice
from qscope_jax.errors import ConfigError
from qscope_jax.parallel.processes import from_all
from qscope_jax.parallel.rules import batch_sharding
from qscope_jax.training.checkpoint import StreamState

Batch = TypeVar("Batch", bound=Any)
Item = TypeVar("Item")


class LaneStream(Generic[Batch]):
    """Batches as the loop wants them: endless, with their place in the data.

    A stream has lanes: lane v reads documents v, v + lanes, ... (of a `TextStream`: see `TextStream.lane`) and makes rows of its own, which lie
    behind each other in a batch. A process reads the lanes alone whose rows are on its devices, so the batches do not depend on how many
    processes there are.
    """

    def __init__(
        self,
        documents: Sequence[Item] | TextStream,
        batches: Callable[[Any, BatchConfig], BatchIterator[Batch]],
        padding: Callable[[int], Batch],
        config: BatchConfig,
        lanes: int,
        mesh: Mesh | None,
    ):
        """Stand before the first batch of `documents`.

        Args:
            documents: All documents; those of other processes' lanes are not read.
            batches: Makes the batches of a lane from its documents: some of the sequence, or a `TextLane`.
            padding: A batch of so many rows of padding.
            config: Rows and their length, of the whole batch.
            lanes: Independent streams of documents; must divide the rows.
            mesh: Where batches are used, if that spans processes.

        Raises:
            ConfigError: lanes do not divide the rows, or are more than the documents.
        """
        if lanes < 1 or config.batch_size % lanes:
            raise ConfigError(f"a batch of {config.batch_size} rows cannot be split into {lanes} lanes; expected a multiple of them")
        if not isinstance(documents, TextStream) and len(documents) < lanes:
            raise ConfigError(f"there are {len(documents)} documents for {lanes} lanes; give each at least one, or fewer lanes")
        self.lanes, self.shape = lanes, (config.batch_size, config.length)
        rows = replace(config, batch_size=config.batch_size // lanes)
        own = range(lanes) if mesh is None else _own_lanes(mesh, self.shape, lanes)
        self._padding = padding(rows.batch_size)
        self._iterators = {lane: batches(_lane(documents, lane, lanes), rows) for lane in own}

    def __next__(self) -> Batch:
        """The next batch; rows of other processes' lanes are padding here."""
        found = {lane: next(iterator) for lane, iterator in self._iterators.items()}
        if self.lanes == 1:
            return found[0]
        parts = [found.get(lane, self._padding) for lane in range(self.lanes)]
        names = [field.name for field in fields(self._padding)]
        return type(self._padding)(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def get_state(self) -> StreamState:
        """Place in the data, of all lanes; in a run of several processes each must ask."""
        states = {str(lane): iterator.get_state() for lane, iterator in self._iterators.items()}
        places = {lane: place for found in from_all(states) for lane, place in found.items()}
        return StreamState({}, {"lanes": self.lanes, "places": places})

    def set_state(self, state: StreamState) -> None:
        """Go to a place in the data.

        Raises:
            InputError: it is of other documents or settings.
            ConfigError: it is of another number of lanes.
        """
        found = state.cursor.get("lanes", self.lanes)
        if found != self.lanes:
            raise ConfigError(f"the data state has {found} lanes, this run {self.lanes}; resume with the lanes of then")
        for lane, iterator in self._iterators.items():
            iterator.set_state(state.cursor.get("places", {}).get(str(lane), {}))


class TokenStream(LaneStream[TokenBatch]):
    """Batches of documents."""

    def __init__(
        self,
        documents: Sequence[str] | TextStream,
        tokenize: Callable[[str], Sequence[int]],
        config: BatchConfig,
        *,
        lanes: int = 1,
        mesh: Mesh | None = None,
    ):
        """Stand before the first batch of `documents`.

        Args:
            documents: All documents; those of other processes' lanes are not read.
            tokenize: Token ids of a document.
            config: Rows and their length, of the whole batch.
            lanes: Independent streams of documents; must divide the rows.
            mesh: Where batches are used, if that spans processes.

        Raises:
            ConfigError: lanes do not divide the rows, or are more than the documents.
            InputError: a lane's documents have no tokens.
            SourceError: a lane of a `TextStream` has no documents, or they cannot be read.
        """

        def batches(texts: Sequence[str] | TextLane, rows: BatchConfig) -> BatchIterator[TokenBatch]:
            return token_batches(texts, tokenize, rows)

        super().__init__(documents, batches, lambda rows: pad_batch([[]] * rows, length=config.length), config, lanes, mesh)


class ChatStream(LaneStream[ChatBatch]):
    """Batches of chats."""

    def __init__(self, rows: Sequence[ChatRow], languages: Sequence[str], config: BatchConfig, *, lanes: int = 1, mesh: Mesh | None = None):
        """Stand before the first batch of `rows`.

        Args:
            rows: All chats, none longer than a row of the batch.
            languages: Labels that `languages_BT` counts.
            config: Rows and their length, of the whole batch.
            lanes: Independent streams of chats; must divide the rows of a batch.
            mesh: Where batches are used, if that spans processes.

        Raises:
            ConfigError: lanes do not divide the rows, or are more than the chats.
            InputError: a chat is longer than a row, or a language is named twice.
        """

        def batches(chats: Sequence[ChatRow], size: BatchConfig) -> BatchIterator[ChatBatch]:
            return chat_batches(chats, languages, size)

        super().__init__(rows, batches, lambda count: padding_rows(count, config.length), config, lanes, mesh)


def _lane(documents: Sequence[Item] | TextStream, lane: int, lanes: int) -> Sequence[Item] | TextLane:
    """The documents of a lane."""
    if isinstance(documents, TextStream):
        return documents.lane(lane, lanes)
    return documents if lanes == 1 else Slice(documents, range(lane, len(documents), lanes))


def _own_lanes(mesh: Mesh, shape: tuple[int, int], lanes: int) -> list[int]:
    """Lanes that hold a row of this process's devices."""
    rows, size = np.arange(shape[0]), shape[0] // lanes
    places = batch_sharding(mesh, 2).addressable_devices_indices_map(shape)
    return sorted({int(row) // size for index in places.values() if index for row in rows[index[0]]})
