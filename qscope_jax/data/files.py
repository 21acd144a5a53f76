"""Writing files so that a reader never meets half of one."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.errors import SourceError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on failure.

    With `directory=True` the temporary name is a fresh folder, and an existing folder at `path` is replaced as a whole.

    Raises:
        SourceError: the parent folder cannot be made or written to.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if directory:
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            temporary.chmod(0o777 & ~_umask())
        else:
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            os.close(handle)
            temporary = Path(name)
            temporary.chmod(0o666 & ~_umask())
    except OSError as error:
        raise SourceError(f"{target}: cannot be written ({error.strerror or error}); choose a folder that you may write to") from error
    try:
        yield temporary
        if directory and target.exists():
            replace_folder(temporary, target)
        else:
            os.replace(temporary, target)
    except OSError as error:
        raise SourceError(f"{target}: writing failed ({error.strerror or error}); nothing was changed there") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value`, in `plain` terms, as indented UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain(value), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """The value in JSON's terms: NumPy scalars and arrays as numbers and lists, keys as text, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); expected a JSON file there") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not valid JSON ({error}); re-download or mend it") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def replace_folder(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, a full folder; should that fail, the old folder is back in its place."""
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        os.replace(target, retired / target.name)
    except BaseException:
        retired.rmdir()
        raise
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(retired / target.name, target)
        retired.rmdir()
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
