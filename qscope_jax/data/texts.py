"""Documents from local files or from the Hugging Face hub, read by index.

Local files are indexed once, by the byte offsets of their documents, and read when a document is asked for; Parquet files and hub datasets are
memory-mapped by `datasets`.
"""

import contextlib
import functools
import itertools
import json
import re
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

from qscope_jax.errors import InputError, SourceError

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")

Item = TypeVar("Item")


def load_texts(source: str | Path, *, column: str = "text", split: str = "train", limit: int | None = None) -> Sequence[str]:
    """Open a collection of documents for reading by index.

    Args:
        source: One of
            a `.txt` file (UTF-8; blank lines separate documents),
            a `.jsonl` or `.json` file (one JSON object a line),
            a `.parquet` file,
            a folder of these (all of them, by name, subfolders included),
            a dataset on the hub: `owner/name`, or `owner/name:configuration`.
        column: Key or column that holds the text; not used for `.txt`.
        split: Split of a hub dataset.
        limit: Stop after this many documents. A hub dataset is then streamed instead of downloaded, unless the hub is offline.

    Returns:
        The documents in order. Blank or null ones are kept as they are or as "", so that index i is row i of the source.

    Raises:
        SourceError: there is no such source, or it is empty, damaged, not UTF-8, or without any text.
        InputError: there is no such column, it does not hold text, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected 1 document or more")
    path = Path(source).expanduser()
    if not str(source).strip():
        raise InputError("the text source is empty; give a file, a folder or a hub dataset")
    if path.is_dir():
        texts = _folder_texts(path, column, limit)
    elif path.exists():
        texts = _file_texts(path, column, limit)
    elif path.suffix.lower() in _READERS or not is_hub_name(str(source)):
        raise SourceError(f"{source}: no such file or folder, and not a hub dataset of the form owner/name")
    else:
        texts = _hub_texts(str(source), column, split, limit)
    if not any(text.strip() for text in texts):
        raise SourceError(f"{source}: holds no text ({len(texts)} documents, all blank); check the source and the column")
    return texts


class Slice(Sequence[Item]):
    """Some documents of a collection, read when they are asked for."""

    def __init__(self, items: Sequence[Item], indices: range):
        """Show the documents at `indices`."""
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Slice[Item]": ...
    def __getitem__(self, index: int | slice) -> "Item | Slice[Item]":
        """A document, or some of them, still unread."""
        return Slice(self._items, self._indices[index]) if isinstance(index, slice) else self._items[self._indices[index]]


# Documents of type str, unread: a checker of types that samples elements would read, and fail on, a damaged row before its time.
_Documents: TypeAlias = Sequence[Any]


class _Texts(Sequence[str]):
    """Sequence of documents; a subclass says how one is read."""

    @abstractmethod
    def _read(self, index: int) -> str:
        """Document at `index`, which is in range."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        return self._read(range(len(self))[index])


class _SpanTexts(_Texts):
    """Documents of one file between pairs of byte offsets."""

    def __init__(self, path: Path, offsets: "array[int]", decode: Callable[[bytes], str]) -> None:
        self._path = path
        self._offsets = offsets
        self._decode = decode

    def __len__(self) -> int:
        return len(self._offsets) // 2

    def _read(self, index: int) -> str:
        start, end = self._offsets[2 * index : 2 * index + 2]
        try:
            with open(self._path, "rb") as file:
                file.seek(start)
                return self._decode(file.read(end - start))
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{self._path}: changed or vanished while in use (document {index} is unreadable); start again") from error


class _ColumnTexts(_Texts):
    """One column of a `datasets.Dataset`."""

    def __init__(self, name: str, dataset: Any, column: str) -> None:
        self._name = name
        self._column = dataset.select_columns([column])[column]

    def __len__(self) -> int:
        return len(self._column)

    def _read(self, index: int) -> str:
        try:
            return self._column[index] or ""
        except UnicodeDecodeError as error:
            raise SourceError(f"{self._name}: row {index} is not UTF-8 ({error.reason}); mend or remove it") from error


class _JoinedTexts(_Texts):
    """Several sequences of documents, one after the other."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _read(self, index: int) -> str:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - self._ends[part]]


def _folder_texts(folder: Path, column: str, limit: int | None) -> _Documents:
    parts: list[Sequence[str]] = []
    for file in folder_files(folder, list(_READERS)):
        parts.append(_file_texts(file, column, limit))
        if limit is not None:
            limit -= len(parts[-1])
            if limit <= 0:
                break
    return _JoinedTexts(parts)


def folder_files(folder: Path, endings: Sequence[str]) -> list[Path]:
    """Files of these kinds in a folder and its subfolders, by name, hidden ones left out.

    Raises:
        SourceError: there is none.
    """
    visible = [file for file in sorted(folder.rglob("*")) if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = [file for file in visible if file.suffix.lower() in endings and file.is_file()]
    if not files:
        raise SourceError(f"{folder}: has no {', '.join(endings)} files; give a folder that has")
    return files


def _file_texts(path: Path, column: str, limit: int | None) -> _Documents:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SourceError(f"{path}: is neither a folder nor one of {', '.join(_READERS)}; convert it to one of these")
    try:
        if not path.stat().st_size:
            raise SourceError(f"{path}: is an empty file; give one with documents in it")
        texts = reader(path, column, limit)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or type(error).__name__}); check the file") from error
    if not len(texts):
        raise SourceError(f"{path}: holds no documents; give a file with text in it")
    return texts


class Line(NamedTuple):
    """A line of a file: its number, from 1, the bytes it spans, and its text."""

    number: int
    start: int
    end: int
    text: str


def text_lines(path: Path) -> Iterator[Line]:
    """Lines of a UTF-8 file with their byte offsets, line ends included; a byte order mark is left out."""
    end = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            start, end = end, end + len(raw)
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                start, raw = 3, raw[3:]
            try:
                yield Line(number, start, end, raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise SourceError(f"{path} line {number}: is not UTF-8 (byte 0x{raw[error.start]:02x}); convert the file to UTF-8") from error


def _plain_texts(path: Path, column: str, limit: int | None) -> _Documents:
    del column  # a text file has none
    offsets = array("q")
    inside = False
    for line in text_lines(path):
        if line.text.strip():
            if inside:
                offsets[-1] = line.end
            elif len(offsets) // 2 == limit:
                break
            else:
                offsets.extend((line.start, line.end))
            inside = True
        else:
            inside = False
    return _SpanTexts(path, offsets, _joined_lines)


def _joined_lines(raw: bytes) -> str:
    return raw.decode("utf-8").replace("\r\n", "\n").rstrip("\n")


def _json_texts(path: Path, column: str, limit: int | None) -> _Documents:
    offsets = array("q")
    for line in text_lines(path):
        if not line.text.strip():
            continue
        # Every line is parsed now, so that a damaged one is met here and not hours into a run.
        _json_text(line.text, column, f"{path} line {line.number}")
        offsets.extend((line.start, line.end))
        if len(offsets) // 2 == limit:
            break
    return _SpanTexts(path, offsets, functools.partial(_json_text, column=column, where=str(path)))


def _json_text(line: str | bytes, column: str, where: str) -> str:
    row = json_row(line, where)
    check_column(where, column, list(row))
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where}: column {column} holds {type(text).__name__}, expected text; choose another column")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as an escape; tokenizers fail on it
        raise SourceError(f"{where}: column {column} holds {text[error.start]!a}, which is not a character; mend or remove the line") from error
    return text


def json_row(line: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        SourceError: the line is not JSON, or holds something else; `where` it stands is named.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise SourceError(f"{where}: is not JSON ({reason}); expected one JSON object a line") from error
    if not isinstance(row, dict):
        raise SourceError(f"{where}: holds a JSON {type(row).__name__}; expected one JSON object a line")
    return row


def _parquet_texts(path: Path, column: str, limit: int | None) -> _Documents:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    try:
        footer = pyarrow.parquet.read_metadata(path)
        check_column(str(path), column, footer.schema.to_arrow_schema().names)
        if not footer.num_rows:
            return []
        dataset = Dataset.from_parquet(str(path), columns=[column])
    except (pyarrow.ArrowException, DatasetsError) as error:
        raise SourceError(f"{path}: is not a complete Parquet file ({first_line(error)}); get it again") from error
    return _dataset_texts(str(path), dataset, column, limit)


_READERS: dict[str, Callable[[Path, str, int | None], _Documents]] = {
    ".txt": _plain_texts,
    ".jsonl": _json_texts,
    ".json": _json_texts,
    ".parquet": _parquet_texts,
}


def _hub_texts(name: str, column: str, split: str, limit: int | None) -> _Documents:
    import datasets
    import datasets.config

    repository, _, configuration = name.partition(":")
    # The cache of an offline machine can be loaded, but not streamed.
    streaming = limit is not None and not datasets.config.HF_HUB_OFFLINE
    with hub_errors(name, split):
        dataset = datasets.load_dataset(repository, configuration or None, split=split, streaming=streaming)
    if not streaming:
        return _dataset_texts(name, dataset, column, limit)
    if dataset.column_names is not None:
        check_column(name, column, dataset.column_names)
        dataset = dataset.select_columns([column])
    with hub_errors(name, split):
        rows = list(itertools.islice(dataset, limit))
    if not rows:
        raise SourceError(f"{name}: split {split} has no rows; choose another split")
    check_column(name, column, list(rows[0]))
    texts = ["" if row[column] is None else row[column] for row in rows]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"{name}: column {column} holds {type(wrong).__name__}, expected text; choose another column")
    return texts


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a hub dataset: `owner/name`, `name`, or either with `:configuration` behind it."""
    return _HUB_NAME.fullmatch(text) is not None


@contextlib.contextmanager
def hub_errors(name: str, split: str) -> Iterator[None]:
    """Whatever goes wrong while a hub dataset is loaded, as a `SourceError`."""
    try:
        yield
    except Exception as error:  # the hub, its HTTP library and the file formats all have errors of their own
        reason = first_line(error)
        raise SourceError(f"{name}: no such file or folder, and split {split} cannot be loaded from the hub ({reason}); check the name") from error


def _dataset_texts(name: str, dataset: Any, column: str, limit: int | None) -> _Documents:
    check_column(name, column, dataset.column_names)
    kind = getattr(dataset.features[column], "dtype", "nested value")
    if kind not in ("string", "large_string"):
        raise InputError(f"{name}: column {column} holds {kind}, expected text; choose another column")
    if limit is not None and limit < len(dataset):
        dataset = dataset.select(range(limit))
    return _ColumnTexts(name, dataset, column)


def check_column(where: str, column: str, there: Sequence[str]) -> None:
    """Check that a column is there.

    Raises:
        InputError: it is not; those that are there are named.
    """
    if column not in there:
        raise InputError(f"{where}: has no column {column!r}; the columns there are {', '.join(map(repr, there)) or 'none'}")


def first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
