"""Texts with the class of each, from a JSON-lines or Parquet file."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_jax.data.texts import load_texts
from qscope_jax.errors import InputError, SourceError

_KINDS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their classes, which are names: whole numbers and booleans are written out.

    Attributes:
        texts: The texts, none of them blank.
        labels: The class of each.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]


def load_labelled_texts(source: str | Path, *, column: str = "text", label_column: str = "label", limit: int | None = None) -> LabelledTexts:
    """Read texts with their classes; rows whose text is blank are left out.

    Args:
        source: A `.jsonl` or `.json` file (one JSON object a line) or a `.parquet` file.
        column: Key or column that holds the text.
        label_column: Key or column that holds the class: text, a whole number or a boolean.
        limit: Read at most this many rows.

    Raises:
        SourceError: there is no such file, or it is empty, damaged, or of another kind.
        InputError: there is no such column, it holds something else, or a row has no class.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() not in _KINDS or path.is_dir():
        raise SourceError(f"{source}: holds no labelled texts; give one file of {', '.join(_KINDS)} with a text and a label in each row")
    texts = load_texts(path, column=column, limit=limit)
    read = _parquet_labels if path.suffix.lower() == ".parquet" else _json_labels
    rows = zip(texts, itertools.islice(read(path, label_column), len(texts)), strict=True)
    kept = [(text, _label(value, f"{path} {where}", label_column)) for text, (where, value) in rows if text.strip()]
    return LabelledTexts(tuple(text for text, _ in kept), tuple(label for _, label in kept))


def _json_labels(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Where each label stands and its value; `load_texts` has found every line sound."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                _check_column(f"{path} line {number}", column, list(row))
                yield f"line {number}", row[column]


def _parquet_labels(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _check_column(str(path), column, file.schema_arrow.names)
        number = itertools.count()
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield f"row {next(number)}", value


def _label(value: Any, where: str, column: str) -> str:
    if isinstance(value, str | int) and str(value).strip():
        return str(value)
    kind = "nothing" if value is None or isinstance(value, str) else type(value).__name__
    raise InputError(f"{where}: column {column} holds {kind}, expected a class (text, a whole number or a boolean); mend or remove the row")


def _check_column(where: str, column: str, there: Sequence[str]) -> None:
    if column not in there:
        raise InputError(f"{where}: has no column {column!r}; the columns there are {', '.join(map(repr, there)) or 'none'}")
