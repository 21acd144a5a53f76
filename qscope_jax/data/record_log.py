"""A JSON-lines file of finished work that only grows: what stands there need not be done again after an interruption."""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qscope_jax.data.files import plain
from qscope_jax.errors import SourceError


class RecordLog:
    """Records by their key, in memory and on disk, one JSON object a line; several threads may add to it.

    The key is a record's first field. Of records with one key the last counts. A line that an interruption has cut is skipped.
    """

    def __init__(self, path: str | os.PathLike[str], key: str, what: str):
        """Read the file, if there is one; nothing is written yet.

        Args:
            path: The file.
            key: Name of the first field, whose value is text.
            what: What a record is, for messages.

        Raises:
            SourceError: the file cannot be read, or holds something else.
        """
        self.path = Path(path).expanduser()
        self._key, self._what = key, what
        self._lock = threading.Lock()
        self._records: dict[str, dict[str, Any]] = {}
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read ({error.strerror or error}); choose another file") from error
        self._cut = bool(data) and not data.endswith(b"\n")
        for number, line in enumerate(data.splitlines(), 1):
            self._read(line, number)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records, in the order in which their keys first came."""
        return iter(list(self._records.values()))

    def get(self, key: str) -> dict[str, Any] | None:
        """A record, if it is there."""
        return self._records.get(key)

    def add(self, key: str, fields: Mapping[str, Any]) -> None:
        """Add a record; when this returns, the system has it.

        Raises:
            SourceError: the file cannot be written; what it holds stays.
        """
        record = {self._key: key, **plain(fields)}
        line = json.dumps(record, ensure_ascii=True) + "\n"
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n" * self._cut + line)
            except OSError as error:
                raise SourceError(f"{self.path}: writing failed ({error.strerror or error}); what was finished before stays") from error
            self._cut = False
            self._records[key] = record

    def _read(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            self._records[str(record[self._key])] = record
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            # A line that was cut begins as every record does; anything else is a file of another kind, which must not be added to.
            start = f'{{"{self._key}": "'.encode()
            if not (start.startswith(line) or line.startswith(start)):
                raise SourceError(f"{self.path} line {number}: is no {self._what}; choose another file") from error
