"""Rows with named columns, from JSON lines, Parquet, CSV or the hub: texts with what is known of each."""

import csv
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_jax.data.texts import check_column, first_line, hub_errors, json_row, text_lines
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
        values = ["" if value is None else value for value in self.column(name)]
        for value, place in zip(values, self.places, strict=True):
            if not isinstance(value, str):
                raise InputError(f"{self.name} {place}: column {name} holds {type(value).__name__}, expected text; choose another column")
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:  # half of a surrogate pair, written as an escape; tokenizers fail on it
                found = f"{value[error.start]!a}, which is not a character"
                raise InputError(f"{self.name} {place}: column {name} holds {found}; mend or remove the row") from error
        return values

    def classes(self, name: str) -> list[str]:
        """A column of classes, which are names: whole numbers and booleans are written out.

        Raises:
            InputError: there is no such column, it holds something else, or a row has no class.
        """
        return [_class(value, f"{self.name} {place}", name) for value, place in zip(self.column(name), self.places, strict=True)]


def load_table(source: str | Path, *, split: str = "train", limit: int | None = None) -> Table:
    """Read rows.

    Args:
        source: A `.jsonl` or `.json` file (one JSON object a line), a `.parquet` or `.csv` file, or a dataset on the hub: `owner/name`, or
            `owner/name:configuration`.
        split: Split of a hub dataset.
        limit: Read at most this many rows. A hub dataset is then streamed instead of downloaded, unless the hub is offline.

    Raises:
        SourceError: there is no such source, or it is empty, damaged, or of another kind.
        InputError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected 1 row or more")
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    if path.is_dir() or (path.exists() and kind not in _READERS):
        raise SourceError(f"{source}: is no table; give a file of {', '.join(_READERS)} with named columns, or a hub dataset")
    if path.exists():
        table = _READERS[kind](path, limit)
    elif kind in _READERS:
        raise SourceError(f"{source}: no such file")
    else:
        table = _hub_rows(str(source), split, limit)
    if not len(table):
        raise SourceError(f"{source}: holds no rows; check the source")
    return table


def _json_rows(path: Path, limit: int | None) -> Table:
    lines = itertools.islice((line for line in text_lines(path) if line.text.strip()), limit)
    found = [(json_row(line.text, f"{path} line {line.number}"), f"line {line.number}") for line in lines]
    return Table(str(path), tuple(row for row, _ in found), tuple(place for _, place in found))


def _parquet_rows(path: Path, limit: int | None) -> Table:
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                rows += batch.to_pylist()
                if limit is not None and len(rows) >= limit:
                    break
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{path}: is not a complete Parquet file ({first_line(error)}); get it again") from error
    return _numbered(str(path), rows[:limit])


def _csv_rows(path: Path, limit: int | None) -> Table:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(itertools.islice(reader, limit))
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: is not CSV in UTF-8 with a line of column names ({error}); mend it") from error
    if any(None in row or None in row.values() for row in rows):
        number = next(i for i, row in enumerate(rows) if None in row or None in row.values())
        raise SourceError(f"{path} row {number}: has another number of cells than the line of column names; mend it")
    return _numbered(str(path), rows)


def _hub_rows(name: str, split: str, limit: int | None) -> Table:
    import datasets
    import datasets.config

    repository, _, configuration = name.partition(":")
    streaming = limit is not None and not datasets.config.HF_HUB_OFFLINE
    with hub_errors(name, split):
        dataset = datasets.load_dataset(repository, configuration or None, split=split, streaming=streaming)
        rows = [dict(row) for row in itertools.islice(iter(dataset), limit)]
    return _numbered(name, rows)


def _numbered(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(name, tuple(rows), tuple(f"row {index}" for index in range(len(rows))))


def _class(value: Any, where: str, column: str) -> str:
    if isinstance(value, str | int) and str(value).strip():
        return str(value)
    kind = "nothing" if value is None or isinstance(value, str) else type(value).__name__
    raise InputError(f"{where}: column {column} holds {kind}, expected a class (text, a whole number or a boolean); mend or remove the row")


_READERS: dict[str, Callable[[Path, int | None], Table]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}
