"""The tensors of a safetensors file as views of one memory map, and of an npz file as arrays."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from qscope_jax.errors import SourceError, UnsafeFileError
from qscope_jax.models.safetensors_file import read_header, write_file

_MAX_NPZ_ENTRIES = 100


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read-only views of a safetensors file, by name; only its header is read, and checked against the file's size.

    Raises:
        SourceError: the file is missing, truncated or malformed.
    """
    entries = read_header(path)
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be mapped ({error})") from error
    return {name: np.ndarray(entry.shape, entry.dtype, buffer=mapped, offset=entry.offset) for name, entry in entries.items()}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write arrays as a safetensors file; strided ones are made contiguous one at a time.

    Raises:
        SourceError: the file cannot be written.
    """
    write_file(path, ((name, array.shape, array.dtype) for name, array in tensors.items()), tensors.values())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file, by name, copied into memory: its entries may be compressed. Nothing in it can be executed.

    Raises:
        SourceError: the file is missing, truncated or malformed.
        UnsafeFileError: it holds Python objects, or far more arrays than an SAE has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) > _MAX_NPZ_ENTRIES:
                raise UnsafeFileError(f"{path}: holds {len(names)} arrays, far more than an SAE has; refusing to read it")
            return {name.removesuffix(".npy"): _array(archive, name) for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if "allow_pickle" in str(error):
            raise UnsafeFileError(f"{path}: holds Python objects, which are never unpickled; nothing was executed") from error
        raise SourceError(f"{path}: is not a valid npz file ({error}); it is truncated or damaged, download it again") from error


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as entry:
        return np.lib.format.read_array(entry, allow_pickle=False)
