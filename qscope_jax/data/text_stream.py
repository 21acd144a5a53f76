"""Documents of a hub dataset or of local files as a stream: never held as a whole, mixed, and resumable exactly.

`datasets` reads the rows. Its own `shuffle` forgets at a resume what its buffer held, so mixing is done here, a block of documents at a time:
where a block begins and which of its documents comes next say everything, and a resumed stream reads that block once more. Places count rows
instead of keeping `datasets`' `state_dict`: skipping rows takes as long as restoring one, and what is saved does not depend on its version.
"""

import functools
import glob
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from qscope_jax.data.batches import StreamedDocuments
from qscope_jax.data.tables import read_text
from qscope_jax.data.texts import check_column, first_line, folder_files, hub_errors, is_hub_name
from qscope_jax.errors import ConfigError, SourceError

_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# So many files for each lane, and lanes read files of their own; with fewer, a short file would come round much more often than the others.
_FILES_OF_A_LANE = 8


class TextStream:
    """Documents of a source in an order of their own in each epoch, read while they are asked for.

    Attributes:
        name: The source.
        held_out: Its first documents, which no lane gives.
        shuffle_buffer: Documents that are mixed at a time, over all lanes.
    """

    def __init__(self, source: str | Path, *, column: str = "text", split: str = "train", shuffle_buffer: int = 10_000, held_out: int = 0):
        """Open the source, and read the documents that are held out.

        Args:
            source: A dataset on the hub (`owner/name`, or `owner/name:configuration`), a `.jsonl`, `.json` or `.parquet` file, or a folder of
                these (all of them, by name, subfolders included).
            column: Column or key that holds the text.
            split: Split of a hub dataset.
            shuffle_buffer: Documents that are held in memory and mixed; 1 keeps the order inside a file. Files change places in each epoch.
            held_out: So many documents at the beginning are kept apart. Rows without text are none.

        Raises:
            SourceError: there is no such source, or it cannot be read.
            InputError: there is no such column, or it does not hold text.
            ConfigError: a number is out of range, or `held_out` leaves nothing.
        """
        if shuffle_buffer < 1 or held_out < 0:
            raise ConfigError(f"shuffle_buffer is {shuffle_buffer} and held_out {held_out}; expected at least 1, and 0 or more")
        self.name, self.shuffle_buffer = str(source), shuffle_buffer
        self._rows = _Rows(self.name, column, _open_files(source, column, split))
        self.held_out = list(itertools.islice(self._rows.hold_out(), held_out))
        if len(self.held_out) < held_out:
            raise ConfigError(f"{source}: has {len(self.held_out)} documents with text, fewer than the {held_out} to hold out; hold out fewer")

    @property
    def blank(self) -> int:
        """Rows without text that this process has skipped so far."""
        return self._rows.blank

    def lane(self, number: int, lanes: int) -> "TextLane":
        """One of several streams that share the documents: files of its own where there are many, else every lanes-th row of each file.

        Raises:
            ConfigError: there is no such lane.
        """
        if not 0 <= number < lanes:
            raise ConfigError(f"lane {number} of {lanes} does not exist; expected 0 to {lanes - 1}")
        identity = {"files": len(self._rows.files), "held_out": len(self.held_out), "shuffle_buffer": self.shuffle_buffer, "lane": number}
        return TextLane(self._rows, number, lanes, max(1, self.shuffle_buffer // lanes), identity)


class _File(NamedTuple):
    """A file's name for messages, and a way to its rows: an `IterableDataset` that nobody else iterates."""

    name: str
    open: Callable[[], Any]


class _Rows:
    """Rows of a source by file and number, those that are held out, and how many had no text."""

    def __init__(self, name: str, column: str, files: list[_File]):
        self.name, self.files, self.blank = name, files, 0
        self.begin = [0] * len(files)  # rows of each file that are held out
        self._column = column

    def values(self, file: int, start: int) -> Iterator[Any]:
        """Values of the column in a file, from row `start`.

        Raises:
            SourceError: the file cannot be read.
            InputError: it has no such column.
        """
        name, row = self.files[file].name, start
        rows: Iterator[Any] | None = None
        while True:
            try:
                rows = rows or iter(self.files[file].open().skip(start))
                values = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the hub, its HTTP library and the file formats all have errors of their own
                reason = f"cannot be read from row {row} on ({type(error).__name__}: {first_line(error)})"
                raise SourceError(f"{name}: {reason}; mend it, or resume when the hub answers") from error
            check_column(name, self._column, list(values))
            yield values[self._column]
            row += 1

    def text(self, value: Any, file: int, row: int) -> str:
        """The document of a row; "", and counted, where there is no text.

        Raises:
            InputError: the row holds something else.
        """
        text = read_text(value, f"{self.files[file].name} row {row}", self._column)
        if text.strip():
            return text
        self.blank += 1
        return ""

    def hold_out(self) -> Iterator[str]:
        """Documents in the order of the source; what has been asked for is held out."""
        for file in range(len(self.files)):
            for row, value in enumerate(self.values(file, 0)):
                self.begin[file] = row + 1
                if text := self.text(value, file, row):
                    yield text


class _Place(NamedTuple):
    """Where a block of documents begins: epoch, place in its order of files, row of that file, and number of the block in the epoch."""

    epoch: int = 0
    file: int = 0
    row: int = 0
    block: int = 0


class TextLane(StreamedDocuments):
    """One lane of a `TextStream`."""

    def __init__(self, rows: _Rows, number: int, lanes: int, block: int, identity: dict[str, Any]):
        """Made by `TextStream.lane`; nothing is read.

        Args:
            rows: Of the source.
            number: Of the lane, from 0.
            lanes: How many there are.
            block: Documents that are mixed at a time.
            identity: See `StreamedDocuments`; without the source's name, so that files may move.
        """
        self.identity = identity
        self._rows, self._number, self._block = rows, number, block
        own = len(rows.files) >= _FILES_OF_A_LANE * lanes
        self._files = list(range(number, len(rows.files), lanes) if own else range(len(rows.files)))
        self._share = (1, 0) if own else (lanes, number)

    def first_pass(self) -> Iterator[str]:
        """Documents of one epoch in the order of the source.

        Raises:
            QscopeError: the source cannot be read, or has no document for this lane.
        """
        reader = _Reader(self._rows, self._files, self._share, _Place())
        for text in reader:
            yield text
            break
        else:
            held = f" beyond the {self.identity['held_out']} held out" if self.identity["held_out"] else ""
            raise SourceError(f"{self._rows.name}: holds no text{held} for lane {self._number}; check source and column, or have fewer lanes")
        yield from reader

    def dataset(self, seed: int, epochs: int | None) -> grain.IterDataset:
        """The lane as the beginning of a pipeline of grain's."""
        return _LaneDataset(self, seed, epochs)

    def reader(self, place: _Place, seed: int) -> "_Reader":
        """Documents of the place's epoch from there on, before they are mixed."""
        order = np.random.default_rng([seed, place.epoch]).permutation(len(self._files))
        return _Reader(self._rows, [self._files[int(index)] for index in order], self._share, place)

    def block(self, reader: "_Reader", place: _Place, seed: int) -> list[str]:
        """The next documents of a reader, mixed: as many as are mixed at a time, or fewer at the end of an epoch."""
        texts = list(itertools.islice(reader, self._block))
        order = np.random.default_rng([seed, self._number, place.epoch, place.block]).permutation(len(texts))
        return [texts[int(index)] for index in order]

    def lost(self, what: str) -> SourceError:
        """The error for a source that now lacks what it had."""
        return SourceError(f"{self._rows.name}: no longer holds {what}; resume with the data of then")


class _Reader(Iterator[str]):
    """Documents of one epoch of a lane, from a place on.

    Of its files a lane has the rows whose number and the file's add up to its own number, modulo the lanes.
    """

    def __init__(self, rows: _Rows, files: list[int], share: tuple[int, int], place: _Place):
        self._rows, self._files, (self._lanes, self._number) = rows, files, share
        self.file, self.row = place.file, place.row
        self._values: Iterator[Any] | None = None

    def __next__(self) -> str:
        while self.file < len(self._files):
            file = self._files[self.file]
            if self._values is None:
                self.row = max(self.row, self._rows.begin[file])
                self._values = self._rows.values(file, self.row)
            for value in self._values:
                row, self.row = self.row, self.row + 1
                if (file + row) % self._lanes == self._number and (text := self._rows.text(value, file, row)):
                    return text
            self.file, self.row, self._values = self.file + 1, 0, None
        raise StopIteration


class _LaneDataset(grain.IterDataset):
    """A lane for grain."""

    def __init__(self, lane: TextLane, seed: int, epochs: int | None):
        super().__init__()
        self._settings = (lane, seed, epochs)

    def __iter__(self) -> "_LaneIterator":
        return _LaneIterator(*self._settings)


class _LaneIterator(grain.DatasetIterator):
    """Documents, block by block; its state is where the block begins and how many of it have been given."""

    def __init__(self, lane: TextLane, seed: int, epochs: int | None):
        super().__init__()
        self._lane, self._seed, self._epochs = lane, seed, epochs
        self._go_to(_Place(), 0)

    def __next__(self) -> str:
        if self._texts is None:
            self._texts = self._next_block()
        if self._given >= len(self._texts):
            raise self._lane.lost(f"document {self._given} of the {self._place.block}th that are mixed")
        text = self._texts[self._given]
        self._given += 1
        if self._given == len(self._texts):
            self._place, self._given, self._texts = self._after, 0, None
        return text

    def get_state(self) -> dict[str, Any]:
        return {**self._place._asdict(), "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._go_to(_Place(**{name: int(state[name]) for name in _Place._fields}), int(state["given"]))

    def close(self) -> None:
        super().close()
        self._reader = self._texts = None

    def _go_to(self, place: _Place, given: int) -> None:
        self._place, self._given, self._after = place, given, place
        self._texts: list[str] | None = None
        self._reader: _Reader | None = None

    def _next_block(self) -> list[str]:
        while self._epochs is None or self._place.epoch < self._epochs:
            if self._reader is None:
                self._reader = self._lane.reader(self._place, self._seed)
            if texts := self._lane.block(self._reader, self._place, self._seed):
                self._after = _Place(self._place.epoch, self._reader.file, self._reader.row, self._place.block + 1)
                return texts
            if not self._place.block:
                raise self._lane.lost("any text")
            self._place, self._reader = _Place(self._place.epoch + 1), None
        raise StopIteration


def _open_files(source: str | Path, column: str, split: str) -> list[_File]:
    path = Path(source).expanduser()
    if path.is_dir():
        return [_local_file(file) for file in folder_files(path, list(_KINDS))]
    if path.exists():
        if path.suffix.lower() not in _KINDS:
            raise SourceError(f"{source}: is neither a folder nor one of {', '.join(_KINDS)}, which can be streamed; convert it to one of these")
        return [_local_file(path)]
    if path.suffix.lower() in _KINDS or not is_hub_name(str(source)):
        raise SourceError(f"{source}: no such file or folder, and not a hub dataset of the form owner/name")
    return _hub_files(str(source), column, split)


def _local_file(path: Path) -> _File:
    def rows() -> Any:
        import datasets

        # One dataset for each file: of several files, all would have to have the same columns.
        return datasets.load_dataset(_KINDS[path.suffix.lower()], data_files=[glob.escape(str(path.absolute()))], split="train", streaming=True)

    return _File(str(path), rows)


def _hub_files(name: str, column: str, split: str) -> list[_File]:
    import datasets
    import datasets.config

    repository, _, configuration = name.partition(":")
    # The cache of an offline machine can be loaded, but not streamed; it is read from the disk all the same.
    streaming = not datasets.config.HF_HUB_OFFLINE
    with hub_errors(name, split):
        loaded: Any = datasets.load_dataset(repository, configuration or None, split=split, streaming=streaming)
        dataset = loaded if streaming else loaded.to_iterable_dataset()
    if dataset.column_names is not None:
        check_column(name, column, dataset.column_names)
        dataset = dataset.select_columns([column])
    count = dataset.num_shards
    return [_File(f"{name} file {index}" if count > 1 else name, functools.partial(dataset.shard, count, index)) for index in range(count)]
