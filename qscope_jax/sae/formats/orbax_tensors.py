"""A dict of arrays as an Orbax checkpoint, and back."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from qscope_jax.errors import SourceError


def write_orbax(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays as one Orbax checkpoint, a folder that does not exist yet.

    Raises:
        SourceError: it cannot be written.
    """
    from orbax.checkpoint import v1 as ocp

    with _quiet():
        try:
            ocp.save(str(path.absolute()), {name: np.ascontiguousarray(array) for name, array in tensors.items()})
        except OSError:
            raise
        except Exception as error:  # TensorStore reports its failures as ValueError, with the system's words inside
            raise SourceError(f"{path}: Orbax cannot write it ({_first_line(error)})") from error


def read_orbax(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an Orbax checkpoint, by name, copied into memory.

    Raises:
        SourceError: it is missing, incomplete or damaged.
    """
    from orbax.checkpoint import v1 as ocp

    with _quiet():
        try:
            restored = ocp.load(str(path.absolute()))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
            raise SourceError(f"{path}: is not a complete Orbax checkpoint ({_first_line(error)}); write it again") from error
    if not isinstance(restored, dict):
        raise SourceError(f"{path}: holds a {type(restored).__name__}, expected a dict of arrays")
    return {str(name): np.asarray(array) for name, array in restored.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's running commentary, which it logs as warnings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
