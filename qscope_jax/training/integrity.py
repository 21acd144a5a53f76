"""Whole or torn: size and SHA-256 of every file of a finished folder, kept in a record inside it and checked before the folder is read."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qscope_jax.data.files import atomic_path, plain

RECORD = "record.json"
_READERS = min(8, os.cpu_count() or 1)  # hashing lets go of Python's lock: several files are read at once


def write_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Record a finished folder: its files as they are now, and facts about it that should be as trustworthy.

    Raises:
        OSError: a file cannot be read.
        SourceError: the record cannot be written.
    """
    body = {"files": _contents(folder), "facts": plain(facts)}
    with atomic_path(folder / RECORD) as temporary:
        temporary.write_text(_text(body), encoding="ascii")


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts in a folder's record; the folder's files are not looked at.

    Raises:
        ValueError: there is no record, or it is damaged.
    """
    return _read(folder)["facts"]


def damage(folder: Path) -> str | None:
    """What is wrong with a recorded folder, in a few words; None if every byte is as it was. Reads every file.

    A folder without a record counts as damaged: whatever wrote it was stopped before it had finished.
    """
    try:
        expected = _read(folder)["files"]
        found = _sizes(folder)
        for name in sorted({*expected, *found}):
            if name not in found:
                return f"{name} is missing"
            if name not in expected:
                return f"{name} does not belong to it"
            if found[name] != expected[name][0]:
                return f"{name} has {found[name]} bytes of {expected[name][0]}"
        return next((f"{name} was altered" for name, facts in _contents(folder).items() if facts != expected[name]), None)
    except (ValueError, OSError) as error:
        return str(error)


def _read(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / RECORD).read_bytes().decode("ascii")
    except FileNotFoundError:
        raise ValueError("it was not finished") from None
    except UnicodeDecodeError:
        raise ValueError(f"{RECORD} was altered") from None
    try:
        body = json.loads(text)
        body.pop("sha256")
        if _text(body) == text:
            return body
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{RECORD} was altered")


def _text(body: Mapping[str, Any]) -> str:
    """The record as it is on disk: canonical, so that no byte of it can change unseen."""
    digest = hashlib.sha256(_canonical(body).encode()).hexdigest()
    return _canonical({**body, "sha256": digest})


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _contents(folder: Path) -> dict[str, list[Any]]:
    sizes = _sizes(folder)
    with ThreadPoolExecutor(_READERS) as readers:
        return {name: [sizes[name], digest] for name, digest in zip(sizes, readers.map(lambda name: _digest(folder / name), sizes), strict=True)}


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return {path.relative_to(folder).as_posix(): path.lstat().st_size for path in files if path != folder / RECORD}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
