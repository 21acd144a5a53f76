"""A dict of arrays as a standard Orbax checkpoint, and back: whole or in slices, with every failure in one line."""

import contextlib
import errno
import gc
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.errors import SourceError

_CHUNK_BYTES = 64 << 20  # what one device's slice is read in; also bounds the writer's copies
_SPARE_BYTES = 1 << 20  # metadata of a checkpoint


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as one Orbax checkpoint, a folder that does not exist yet.

    Raises:
        OSError: the disk is full, or the file system fails.
        SourceError: Orbax cannot write it.
    """
    from orbax.checkpoint import v1 as ocp

    # Asked beforehand: where a disk fills up under Orbax, threads of its libraries print pages of their own.
    if shutil.disk_usage(path.parent).free < sum(array.nbytes for array in arrays.values()) + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    context = ocp.Context()
    # Weights hardly compress; stored as they are, they are written and read twice as fast.
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    with _quiet(), context:
        try:
            ocp.save(str(path.absolute()), {name: np.ascontiguousarray(array) for name, array in arrays.items()})
        except OSError:
            raise
        except Exception as error:  # TensorStore reports its failures as ValueError, with the system's words inside
            raise SourceError(f"{path}: Orbax cannot write it ({_first_line(error)})") from error


def read_arrays(path: Path, wanted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arrays of an Orbax checkpoint by name.

    Args:
        path: The checkpoint.
        wanted: What to read of each array: a `jax.ShapeDtypeStruct` with a sharding, or None to leave it out. Default: all, to the host.

    Raises:
        SourceError: it is missing, incomplete, damaged or of something else than a dict of arrays.
    """
    from orbax.checkpoint import v1 as ocp

    with _reading(path):
        if wanted is not None:
            chosen = {name: ocp.PLACEHOLDER if target is None else target for name, target in wanted.items()}
            return {name: array for name, array in ocp.load(str(path.absolute()), chosen).items() if wanted[name] is not None}
        restored = ocp.load(str(path.absolute()))
    if not isinstance(restored, dict):
        raise SourceError(f"{path}: holds a {type(restored).__name__}, expected a dict of arrays")
    return {str(name): np.asarray(array) for name, array in restored.items()}


def describe_arrays(path: Path) -> dict[str, Any]:
    """Shape and dtype of every array of an Orbax checkpoint, by name; no values are read.

    Raises:
        SourceError: as `read_arrays`.
    """
    from orbax.checkpoint import v1 as ocp

    with _reading(path):
        found = ocp.metadata(str(path.absolute())).metadata
    if not isinstance(found, dict) or not all(hasattr(facts, "shape") and hasattr(facts, "dtype") for facts in found.values()):
        raise SourceError(f"{path}: holds something else than arrays by name; expected a folder that this program wrote")
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever Orbax says about a damaged checkpoint into one line."""
    try:
        with _quiet():
            yield
    except Exception as error:  # Orbax, TensorStore and the file system each have their own
        raise SourceError(f"{path}: the Orbax checkpoint is damaged or incomplete ({_first_line(error)}); copy or convert it again") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's running commentary, and without what asyncio, through which it runs, reports of further tasks when one has failed."""
    commentary, tasks = logging.getLogger("absl"), logging.getLogger("asyncio")
    levels = commentary.level, tasks.level
    commentary.setLevel(logging.ERROR)
    tasks.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except Exception:
        gc.collect()  # the reports are made when the tasks are collected
        raise
    finally:
        commentary.setLevel(levels[0])
        tasks.setLevel(levels[1])


def _first_line(error: Exception) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return said if len(said) <= 150 else said[:150] + " ..."
