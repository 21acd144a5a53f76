"""Documents to fixed-size token batches: shuffled, packed, and resumable exactly.

The pipeline is grain's: a shuffled and repeated source (or a stream that does both itself), documents cut to pieces of at most one row, best-fit
packing, batches, and optionally a prefetch thread. Packing keeps a document that fits a row in one piece; what it costs is a few per cent of padding.
"""

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import grain
import numpy as np
from grain import experimental
from jaxtyping import Int32

from qscope_jax.errors import ConfigError, InputError

# Rows that are filled side by side. More rows pad less (document lengths uniform up to a row: 8 % with 64 rows, 5 % with 256), but the first
# batch waits for all of them and a restored iterator fills them again.
_OPEN_ROWS = 128
_MAX_SEED = 2**32 - 1
_LOOKED_AT = 1000  # documents of a stream that are searched for tokens before it begins

Batch = TypeVar("Batch")
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Rows of tokens from one or more documents each.

    Attributes:
        tokens_BT: Token ids; 0 at padding.
        segment_ids_BT: 1, 2, ... numbers the documents of a row; 0 is padding.
        positions_BT: Position inside the segment, from 0; 0 at padding.
    """

    tokens_BT: Int32[np.ndarray, "B T"]
    segment_ids_BT: Int32[np.ndarray, "B T"]
    positions_BT: Int32[np.ndarray, "B T"]


@dataclass(frozen=True)
class BatchConfig:
    """What the batches look like and in which order they come.

    Attributes:
        batch_size: Rows in a batch.
        length: Tokens in a row.
        seed: Of the document order; every epoch is shuffled anew from it.
        pack: Put several documents in a row, and cut longer ones into rows. If not, a row is one document, cut off at `length`.
        epochs: Passes over the documents; None never ends.
        prefetch: Batches that a background thread prepares ahead; 0 is no thread. Changes neither batches nor states.

    Raises:
        ConfigError: a value is out of range.
    """

    batch_size: int
    length: int
    seed: int = 0
    pack: bool = True
    epochs: int | None = None
    prefetch: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, least in (("batch_size", self.batch_size, 1), ("length", self.length, 1), ("prefetch", self.prefetch, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected {least} or more")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}; expected 1 or more, or none for endless batches")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ConfigError(f"seed is {self.seed}; expected 0 to {_MAX_SEED}")


class StreamedDocuments(ABC):
    """Documents that are read in an order of their own, not by index, such as a lane of a `TextStream`.

    Attributes:
        identity: What tells these documents and their order from others, for states.
    """

    identity: Mapping[str, Any]

    @abstractmethod
    def first_pass(self) -> Iterator[str]:
        """Documents of one epoch, for a look at them.

        Raises:
            QscopeError: there are none, or they cannot be read.
        """

    @abstractmethod
    def dataset(self, seed: int, epochs: int | None) -> grain.IterDataset:
        """Documents of so many epochs, shuffled, with a small state that JSON can hold; None never ends."""


def token_batches(texts: Sequence[str] | StreamedDocuments, tokenize: Callable[[str], Sequence[int]], config: BatchConfig) -> "TokenBatchIterator":
    """Shuffle, tokenize, pack and batch documents.

    Every token of every document appears exactly once an epoch when packing. Positions restart with each piece of a document that is longer
    than a row, because the model sees nothing before it. Documents without tokens are skipped. Where one epoch ends and the next begins, their
    rows may mix. The last batch of a finite run is filled up with padding rows.

    Args:
        texts: Documents, read by index or as a stream.
        tokenize: Token ids of a document. Called from the prefetch thread if there is one.
        config: Sizes and order.

    Raises:
        InputError: there are no documents, none of them has tokens, or `tokenize` returns something else than token ids.
    """
    if isinstance(texts, StreamedDocuments):
        looked_at: Iterable[str] = itertools.islice(texts.first_pass(), _LOOKED_AT)
        number, documents, identity = f"first {_LOOKED_AT:,}", texts.dataset(config.seed, config.epochs), dict(texts.identity)
    elif not len(texts):
        raise InputError("there are no documents to make batches of; give at least one")
    else:
        looked_at, number, documents, identity = texts, str(len(texts)), texts, {"documents": len(texts)}
    if not any(_token_ids(tokenize, text).size for text in looked_at):
        raise InputError(f"none of the {number} documents has any tokens; give texts that are not blank")
    rows = packed_rows(documents, lambda text: {"tokens": _token_ids(tokenize, text)}, ("tokens",), config)
    return BatchIterator(rows, _token_batch, identity, config)


class BatchIterator(Iterator[Batch], Generic[Batch]):
    """Batches in order, with a place that can be saved and returned to."""

    def __init__(
        self, dataset: grain.IterDataset, make: Callable[[Mapping[str, np.ndarray]], Batch], data: Mapping[str, Any], config: BatchConfig
    ) -> None:
        """Stand before the first batch.

        Args:
            dataset: What `packed_rows` gives.
            make: A batch of its arrays.
            data: What tells these documents from others, for states.
            config: Sizes and order.
        """
        self._dataset, self._make = dataset, make
        self._iterator = iter(dataset)
        # What must agree for a saved place to mean the same batch. A longer run and another prefetch depth may continue a shorter one.
        identity = asdict(config)
        del identity["epochs"], identity["prefetch"]
        self._identity: dict[str, Any] = {**data, **identity}

    def __next__(self) -> Batch:
        """Next batch, of shape [batch_size, length].

        Raises:
            StopIteration: a finite run is over.
        """
        return self._make(next(self._iterator))

    def get_state(self) -> dict[str, Any]:
        """Place after the last batch that was handed out: a small dictionary that JSON can hold."""
        return {"stream": dict(self._identity), "place": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place that `get_state` gave, here or in another process; the next batch is the one that followed it there.

        Raises:
            InputError: `state` was saved for other documents or another configuration, or is not such a state.
        """
        if not isinstance(state, dict) or not isinstance(state.get("stream"), dict) or "place" not in state:
            raise InputError("the data state is not one that a token batch iterator saved; restore from another checkpoint")
        saved = state["stream"]
        differing = [f"{key} was {saved.get(key)}, is {value}" for key, value in self._identity.items() if saved.get(key) != value]
        if differing:
            raise InputError(f"the data state belongs to other batches ({'; '.join(differing)}); resume with the data and configuration of then")
        # A fresh iterator: what grain's flat map and prefetch hold from before must not leak into the restored place.
        iterator = iter(self._dataset)
        try:
            iterator.set_state(state["place"])
        except (IndexError, KeyError, TypeError) as error:
            raise InputError(f"the data state does not fit these batches ({error}); do not resume with fewer epochs than then") from error
        self.close()
        self._iterator = iterator

    def close(self) -> None:
        """Stop the prefetch thread, if there is one. No batches can be asked for afterwards, except after `set_state`."""
        self._iterator.close()


TokenBatchIterator: TypeAlias = BatchIterator[TokenBatch]


def pad_batch(token_lists: Sequence[Sequence[int]], *, length: int, side: Literal["left", "right"] = "right") -> TokenBatch:
    """One row for each list of tokens, padded to `length` on the given side.

    Args:
        token_lists: B lists of at most `length` token ids; an empty list becomes a row of padding.
        length: Tokens in a row (T).
        side: Where the padding goes.

    Raises:
        InputError: there are no lists, one is longer than `length`, `length` is below 1 or `side` is neither left nor right.
    """
    if not len(token_lists):
        raise InputError("there are no token lists to pad; give at least one")
    if length < 1:
        raise InputError(f"rows of {length} tokens cannot hold anything; give a length of 1 or more")
    if side not in ("left", "right"):
        raise InputError(f"padding side {side!r}; expected left or right")
    tokens_BT, segment_ids_BT, positions_BT = (np.zeros((len(token_lists), length), np.int32) for _ in range(3))
    for row, tokens in enumerate(token_lists):
        if len(tokens) > length:
            raise InputError(f"token list {row} has {len(tokens)} tokens, more than the row length {length}; cut it or give longer rows")
        start = length - len(tokens) if side == "left" else 0
        filled = slice(start, start + len(tokens))
        tokens_BT[row, filled] = tokens
        segment_ids_BT[row, filled] = 1
        positions_BT[row, filled] = np.arange(len(tokens))
    return TokenBatch(tokens_BT, segment_ids_BT, positions_BT)


def packed_rows(
    items: Sequence[Item] | grain.IterDataset, arrays: Callable[[Item], Mapping[str, np.ndarray]], names: Sequence[str], config: BatchConfig
) -> grain.IterDataset:
    """Items in packed rows, in batches: what every kind of batch is made of.

    Args:
        items: Read by index, in an order of their own in each epoch; or in the order wanted, for as many epochs as wanted.
        arrays: An item's arrays by name, all of one length.
        names: Their names. Segments and positions come as `<first name>_segment_ids` and `<first name>_positions`; padding is 0.
        config: Sizes and order.
    """
    shuffled = items if isinstance(items, grain.IterDataset) else _shuffled_items(items, config)
    rows = experimental.FlatMapIterDataset(shuffled, _Pieces(arrays, config.length, every=config.pack))
    rows = experimental.BestFitPackIterDataset(
        rows,
        length_struct={name: config.length for name in names},
        num_packing_bins=_OPEN_ROWS,
        seed=config.seed,
        # Early rows are fuller than late ones, so without this the last batches would be the padded ones.
        shuffle_bins=config.pack,
        meta_features=names[1:],
        max_sequences_per_bin=None if config.pack else 1,
    )
    fill_up = functools.partial(experimental.batch_and_pad, batch_size=config.batch_size)
    batches = rows.batch(config.batch_size, drop_remainder=False, batch_fn=fill_up)
    if config.prefetch:
        batches = experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch)
    return batches


def _shuffled_items(items: Sequence[Any], config: BatchConfig) -> grain.IterDataset:
    """Items of a sequence, in an order of their own in each epoch."""
    shuffled = grain.MapDataset.range(len(items)).repeat(config.epochs).map_with_index(_Shuffled(items, config.seed).item)
    # No reader threads: tokenizers are not always safe to share, and one thread keeps up (see `prefetch`).
    return shuffled.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


class _Shuffled(Generic[Item]):
    """Items in an order of their own for each epoch.

    Instead of grain's `shuffle`, which takes milliseconds an item where there are fewer than a hundred of them.
    """

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        self._items = items
        self._seed = seed
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    def item(self, index: int, _: int) -> Item:
        epoch, place = divmod(index, len(self._items))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._items))
        return self._items[int(self._order[place])]


class _Pieces(experimental.FlatMapTransform):
    """An item as consecutive pieces of at most `length` tokens: all of them, or the first alone."""

    def __init__(self, arrays: Callable[[Any], Mapping[str, np.ndarray]], length: int, *, every: bool) -> None:
        self._arrays = arrays
        self._length = length
        self._every = every

    def flat_map(self, element: Any) -> list[dict[str, np.ndarray]]:
        arrays = self._arrays(element)
        whole = len(next(iter(arrays.values())))
        end = whole if self._every else min(whole, self._length)
        pieces = (slice(start, start + self._length) for start in range(0, end, self._length))
        return [{name: values[piece] for name, values in arrays.items()} for piece in pieces]


def _token_batch(rows: Mapping[str, np.ndarray]) -> TokenBatch:
    return TokenBatch(rows["tokens"], rows["tokens_segment_ids"], rows["tokens_positions"])


def _token_ids(tokenize: Callable[[str], Sequence[int]], text: str) -> np.ndarray:
    tokens = tokenize(text)
    if isinstance(tokens, Sequence | np.ndarray) and not len(tokens):
        return np.zeros(0, np.int32)
    try:
        ids = np.asarray(tokens)
    except ValueError:  # lists of unequal length
        ids = np.zeros(())
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"tokenize returned {type(tokens).__name__} for a text; expected a flat list of token ids, as tokenizer.encode gives")
    return ids.astype(np.int32)
