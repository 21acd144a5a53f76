"""What verbs write: one JSON file with the resolved options and the result."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qscope_jax.data.files import write_json
from qscope_jax.errors import SourceError


def check_writable(path: str, *, folder: bool = False) -> None:
    """Find out before long work, not after it, that a result can be written; nothing is left behind.

    Args:
        path: The file (or folder) to be; an empty name is no file and always fine.
        folder: Whether `path` is to be a folder.

    Raises:
        SourceError: it cannot.
    """
    if not path:
        return
    target = Path(path).expanduser()
    if target.is_dir() and not folder:
        raise SourceError(f"{path}: is a folder, expected the name of a file to write")
    nearest = target if folder else target.parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return
    except OSError as error:
        raise SourceError(f"{path}: cannot be written ({error.strerror or error}); choose a folder that you may write to") from error


def write_result(path: str, verb: str, config: Any, result: Mapping[str, Any]) -> None:
    """Write `{"verb", "config", **result}` as JSON; an empty path writes nothing."""
    if path:
        write_json(Path(path).expanduser(), {"verb": verb, "config": dataclasses.asdict(config), **result})
