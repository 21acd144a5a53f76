"""Rows with named columns, from JSON lines, Parquet, CSV or the hub: texts with what is known of each."""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_jax.data.texts import check_column, first_line, folder_files, hub_errors, json_row, text_lines
from qscope_jax.errors import InputError, SourceError


@dataclass(frozen=True)
class Table:
    """Rows in memory.

    Attributes:
        name: Where they are from, for messages.
        rows: Column name -> value, row by row; a row may lack columns that others have.
        places: Where each row stands, such as `line 3`.
    """

    name: str
    rows: tuple[Mapping[str, Any], ...]
    places: tuple[str, ...]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> "Table":
        """Some rows, in the order given."""
        return Table(self.name, tuple(self.rows[i] for i in indices), tuple(self.places[i] for i in indices))

    def column(self, name: str) -> list[Any]:
        """The values of a column, row by row.

        Raises:
            InputError: a row has no such column; those that it has are named.
        """
        for row, place in zip(self.rows, self.places, strict=True):
            check_column(f"{self.name} {place}", name, list(row))
        return [row[name] for row in self.rows]

    def texts(self, name: str) -> list[str]:
        """A column of texts; nothing reads as the empty text.

        Raises:
            InputError: there is no such column, or it holds something else.
        """
        return [read_text(value, f"{self.name} {place}", name) for value, place in zip(self.column(name), self.places, strict=True)]

    def classes(self, name: str) -> list[str]:
        """A column of classes, which are names: whole numbers and booleans are written out.

        Raises:
            InputError: there is no such column, it holds something else, or a row has no class.
        """
        return [_class(value, f"{self.name} {place}", name) for value, place in zip(self.column(name), self.places, strict=True)]


def read_index(value: Any, where: str, name: str) -> int:
    """A whole number from 0, such as a layer or a feature; in CSV it is text.

    Raises:
        InputError: it is something else; `where` it stands and its `name` are said.
    """
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.isascii() and text.isdigit():
        return int(text)
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    raise InputError(f"{where}: {name} holds {value!r}, expected a whole number from 0")


def read_text(value: Any, where: str, name: str) -> str:
    """A column's text; nothing reads as the empty text.

    Raises:
        InputError: it is something else; `where` it stands and the column's `name` are said.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: column {name} holds {type(value).__name__}, expected text; choose another column")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as an escape; tokenizers fail on it
        raise InputError(f"{where}: column {name} holds {value[error.start]!a}, which is not a character; mend or remove the row") from error
    return value


def load_table(source: str | Path, *, split: str = "train", limit: int | None = None) -> Table:
    """Read rows into memory; see `stream_rows`.

    Raises:
        SourceError: there is no such source, or it is empty, damaged, or of another kind.
        InputError: `limit` is below 1.
    """
    found = list(stream_rows(source, split=split, limit=limit))
    if not found:
        raise SourceError(f"{source}: holds no rows; check the source")
    return Table(str(source), tuple(row for _, row in found), tuple(place for place, _ in found))


def stream_rows(source: str | Path, *, split: str = "train", limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows in order, each with the place where it stands (`line 3`, `row 3`), read as they are asked for.

    Args:
        source: A `.jsonl` file (one JSON object a line), a `.json` file (the same, or one list of objects), a `.parquet` or `.csv` file, a folder
            of these (all of them, by name, subfolders included; a place then names the file), or a dataset on the hub: `owner/name`, or
            `owner/name:configuration`.
        split: Split of a hub dataset.
        limit: At most this many rows. A hub dataset is then streamed instead of downloaded, unless the hub is offline.

    Raises:
        SourceError: there is no such source, or it is damaged or of another kind.
        InputError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected 1 row or more")
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    if path.is_dir():
        return itertools.islice(_folder_rows(path), limit)
    if kind == ".txt" or (path.exists() and kind not in _READERS):
        raise SourceError(f"{source}: is no table; give a file of {', '.join(_READERS)} with named columns, or a hub dataset")
    if not path.exists() and kind in _READERS:
        raise SourceError(f"{source}: no such file")
    if path.exists():
        return itertools.islice(_READERS[kind](path), limit)
    return _hub_rows(str(source), split, limit)


def _folder_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in folder_files(folder, list(_READERS)):
        for place, row in _READERS[path.suffix.lower()](path):
            yield f"{path.relative_to(folder)} {place}", row


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        is_list = path.suffix.lower() == ".json" and re.match(rb"(\xef\xbb\xbf)?\s*\[", file.read(256)) is not None
    return _json_list(path) if is_list else _json_lines(path)


def _json_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not JSON ({first_line(error)}); expected a list of objects, or one object a line") from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise SourceError(f"{path} item {index}: holds a JSON {type(row).__name__}; expected an object")
        yield f"item {index}", row


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in text_lines(path):
        if line.text.strip():
            yield f"line {line.number}", json_row(line.text, f"{path} line {line.number}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _numbered(row for batch in file.iter_batches() for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{path}: is not a complete Parquet file ({first_line(error)}); get it again") from error


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for place, row in _numbered(csv.DictReader(file, strict=True)):
                if None in row or None in row.values():
                    raise SourceError(f"{path} {place}: has another number of cells than the line of column names; mend it")
                yield place, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: is not CSV in UTF-8 with a line of column names ({error}); mend it") from error


def _hub_rows(name: str, split: str, limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets
    import datasets.config

    repository, _, configuration = name.partition(":")
    streaming = limit is not None and not datasets.config.HF_HUB_OFFLINE
    with hub_errors(name, split):
        dataset = datasets.load_dataset(repository, configuration or None, split=split, streaming=streaming)
        yield from _numbered(dict(row) for row in itertools.islice(iter(dataset), limit))


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"row {index}", row) for index, row in enumerate(rows))


def _class(value: Any, where: str, column: str) -> str:
    if isinstance(value, str | int) and str(value).strip():
        return str(value)
    kind = "nothing" if value is None or isinstance(value, str) else type(value).__name__
    raise InputError(f"{where}: column {column} holds {kind}, expected a class (text, a whole number or a boolean); mend or remove the row")


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}
