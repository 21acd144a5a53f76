"""PyTorch `.pt` files without torch: read through one memory map, written from numpy arrays.

Reading executes nothing and copies nothing: the pickle goes through an interpreter that can only describe tensors (`torch_pickle`), the
archive through a strict directory reader (`stored_zip`), and each tensor becomes a read-only view of the mapped file.
"""

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qscope_jax.data.files import atomic_path
from qscope_jax.errors import InputError, SourceError, UnsafeFileError
from qscope_jax.sae.formats.stored_zip import Entry, read_directory, verify_checksums
from qscope_jax.sae.formats.torch_pickle import STORAGES, Storage, TensorRecord, emit_pickle, parse_pickle

_LEGACY_START = bytes.fromhex("80028a0a6cfc9c46")
_LFS_START = b"version https://git-lfs"
_MAX_PICKLE_BYTES = 1 << 20
_MAX_DIMENSIONS = 8
_ALIGNMENT = 64
_WRITE_BLOCK_BYTES = 1 << 24
_ZIP64_BYTES = 1 << 30


def read_torch_file(path: str | os.PathLike[str], *, verify: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a file that holds a flat dict (or state dict) of them, by name, in file order.

    Args:
        path: A file written by `torch.save` (torch >= 1.6) or `write_torch_file`.
        verify: Also read every byte once and compare checksums; without it only headers are read.

    Returns:
        Read-only strided views of one `np.memmap`; bfloat16 as `ml_dtypes.bfloat16`. A tensor saved transposed arrives with its strides.

    Raises:
        UnsafeFileError: the file asks for anything but tensors, or a tensor reaches outside its storage; nothing was executed.
        SourceError: the file is missing, truncated, malformed, in the legacy format, or holds something else than a flat dict of tensors.
    """
    where = str(path)
    mapped, entries, prefix, content = _open(where, verify)
    if not isinstance(content, dict):
        raise SourceError(f"{where}: holds a {_kind(content)}, expected a dict of tensors; save it as torch.save({{name: tensor, ...}}, path)")
    arrays = {}
    for name, record in content.items():
        if not isinstance(name, str) or not isinstance(record, TensorRecord):
            raise SourceError(f"{where}: key {name!r} holds a {_kind(record)}, expected a flat dict from strings to tensors")
        arrays[name] = _view(record, mapped, entries.get(f"{prefix}data/{record.storage.key}"), f"{where}: tensor {name!r}")
    return arrays


def torch_file_kinds(path: str | os.PathLike[str]) -> dict[str, str]:
    """What each top-level key of a PyTorch file holds ("tensor", "dict", "str", ...): enough to recognise a format.

    Returns:
        Key -> kind, in file order; empty when the file holds something else than a dict.

    Raises:
        SourceError: as `read_torch_file`, except that any plain content is accepted.
    """
    content = _open(str(path), verify=False)[3]
    return {str(key): _kind(value) for key, value in content.items()} if isinstance(content, dict) else {}


def write_torch_file(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a dict of tensors that `torch.load` opens with `weights_only=True`, mapped or not; bit-exact and atomic.

    The same tensors always give the same bytes. Strided arrays are made contiguous block by block, so memory does not double.

    Args:
        path: The file to write; an existing one is replaced when the new one is complete.
        tensors: Name -> array of one of the element types in `torch_pickle.STORAGES`.

    Raises:
        InputError: an element type is not one of those.
        SourceError: the file cannot be written.
    """
    records = {}
    for index, (name, array) in enumerate(tensors.items()):
        dtype = array.dtype.newbyteorder("<")
        if dtype not in STORAGES.values():
            known = ", ".join(known.name for known in STORAGES.values())
            raise InputError(f"{path}: tensor {name!r} is {array.dtype}, which is not written; cast it to one of {known}")
        size = tuple(array.shape)
        stride = tuple(math.prod(max(extent, 1) for extent in size[axis + 1 :]) for axis in range(array.ndim))
        records[name] = TensorRecord(Storage(dtype, str(index), array.size), 0, size, stride)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", iter([emit_pickle(records)]))
        _add(archive, "byteorder", iter([b"little"]))
        for record, array in zip(records.values(), tensors.values(), strict=True):
            _add(archive, f"data/{record.storage.key}", _contiguous_blocks(array, record.storage.dtype), array.nbytes)
        _add(archive, "version", iter([b"3\n"]))


def _open(where: str, verify: bool) -> tuple[np.memmap, dict[str, Entry], str, Any]:
    """Map the file, check the archive, parse the pickle: the map, the entries, the prefix of their names, the pickled object."""
    try:
        mapped = np.memmap(where, dtype=np.uint8, mode="r")
    except FileNotFoundError as error:
        raise SourceError(f"{where}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise SourceError(f"{where}: cannot be read as a PyTorch file ({error})") from error
    data = mapped.data
    start = bytes(data[:32])
    if start.startswith(_LEGACY_START):
        raise SourceError(f"{where}: is in PyTorch's legacy format, which cannot be read safely; load it in torch >= 1.6 and save it again")
    if start.startswith(_LFS_START):
        raise SourceError(f"{where}: is a git-lfs pointer, not the file itself; run `git lfs pull` or download it from the hub")
    if not start.startswith(b"PK\x03\x04"):
        raise SourceError(f"{where}: is not a PyTorch file (starts with {start[:8].hex(' ')}, expected a ZIP archive)")
    entries = read_directory(data, where)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UnsafeFileError(f"{where}: the archive holds {len(pickles)} entries named data.pkl, expected one; torch.save did not write this")
    prefix = pickles[0].removesuffix("data.pkl")
    byteorder = entries.get(f"{prefix}byteorder")
    if byteorder and (order := bytes(data[byteorder.start : byteorder.start + min(byteorder.size, 16)])) != b"little":
        raise SourceError(f"{where}: byte order is {order!r}, only b'little' is read; save it again on a little-endian machine")
    entry = entries[pickles[0]]
    if entry.size > _MAX_PICKLE_BYTES:
        raise UnsafeFileError(f"{where}: its pickle has {entry.size} bytes, at most {_MAX_PICKLE_BYTES} are accepted for a file of tensors")
    if verify:
        verify_checksums(data, entries, where)
    return mapped, entries, prefix, parse_pickle(bytes(data[entry.start : entry.start + entry.size]), where)


def _view(record: TensorRecord, mapped: np.memmap, entry: Entry | None, where: str) -> np.ndarray:
    """The tensor as a view of the mapped file, after proving that it stays inside its storage and is no larger than it."""
    storage, itemsize = record.storage, record.storage.dtype.itemsize
    if entry is None:
        raise SourceError(f"{where} refers to storage {storage.key!r}, which the archive lacks; the file is incomplete, download it again")
    if entry.size != storage.numel * itemsize:
        raise UnsafeFileError(f"{where} claims {storage.numel} {storage.dtype} elements, its storage has {entry.size} bytes; the file is damaged")
    if len(record.size) > _MAX_DIMENSIONS:
        raise UnsafeFileError(f"{where} has {len(record.size)} dimensions, at most {_MAX_DIMENSIONS} are accepted")
    count = math.prod(record.size)
    last = record.offset + sum((extent - 1) * step for extent, step in zip(record.size, record.stride, strict=True))
    inside = last < storage.numel if count else record.offset <= storage.numel
    if not inside or count > storage.numel:
        raise UnsafeFileError(
            f"{where} (offset {record.offset}, size {record.size}, stride {record.stride}) reaches outside its storage of {storage.numel} elements "
            "or repeats them; nothing was read. Save it again contiguous"
        )
    try:
        strides = tuple(step * itemsize for step in record.stride)
        return np.ndarray(record.size, storage.dtype, buffer=mapped, offset=entry.start + record.offset * itemsize, strides=strides)
    except (ValueError, OverflowError) as error:  # an empty tensor may claim absurd extents or steps
        raise UnsafeFileError(f"{where} has size {record.size} and stride {record.stride}, which no array can have") from error


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, TensorRecord) else "dict" if isinstance(value, dict) else type(value).__name__


def _add(archive: zipfile.ZipFile, name: str, blocks: Iterator[Any], size: int = 0) -> None:
    """Store one entry whose data start at a multiple of 64 bytes, through an extra field in its local header only, as torch does."""
    info = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    wide = size > _ZIP64_BYTES
    unpadded = (archive.fp.tell() if archive.fp else 0) + 30 + len(info.filename) + 4 + (20 if wide else 0)
    padding = -unpadded % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=wide) as entry:
        for block in blocks:
            entry.write(block)
    info.extra = b""


def _contiguous_blocks(array: np.ndarray, dtype: np.dtype) -> Iterator[memoryview]:
    """The bytes of `array` in row-major order, little-endian, in blocks of whole leading rows."""
    rows = array.reshape(1) if array.ndim == 0 else array
    if rows.size == 0:
        return
    step = max(1, _WRITE_BLOCK_BYTES * len(rows) // rows.nbytes)
    for start in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[start : start + step], dtype=dtype)
        yield block.reshape(-1).view(np.uint8).data
