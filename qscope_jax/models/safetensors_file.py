"""Reading and writing safetensors by plain reads and writes.

The `safetensors` package maps files into memory and copies out of the mapping, so a process that loads a model is charged for it twice.
Reading ranges straight into their final buffers, and writing tensors one after the other, keeps the peak at what is asked for. The
format: eight bytes of header length, a JSON header with dtype, shape and byte offsets, then the data.
"""

import io
import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qscope_jax.data.files import atomic_path
from qscope_jax.errors import ShapeError, SourceError

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
_BLOCK = 1 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its file, dtype, shape, and first byte."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The whole tensor in its own dtype; checked as by `read_rows`."""
        out = np.empty(self.shape, self.dtype)
        self.read_rows(out)
        return out

    def read_rows(self, out: np.ndarray, start: int = 0) -> None:
        """Read rows `start` onwards into the C-contiguous array `out`, casting if its dtype differs, and check that they are finite.

        Raises:
            SourceError: the file ends early or cannot be read.
            ShapeError: NaN or infinity among the values, or a value too large for the dtype of `out`.
        """
        row = int(np.prod(self.shape[1:], dtype=np.int64)) if self.shape else 1
        flat = out.reshape(-1)
        per_block = max(_BLOCK // self.dtype.itemsize, 1)
        staging = None if out.dtype == self.dtype else np.empty(min(per_block, flat.size), self.dtype)
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset + start * row * self.dtype.itemsize)
                for begin in range(0, flat.size, per_block):
                    end = min(begin + per_block, flat.size)
                    block = flat[begin:end] if staging is None else staging[: end - begin]
                    self._fill(file, block)
                    if staging is not None:
                        flat[begin:end] = self._cast(block, out.dtype)
        except OSError as error:
            raise SourceError(f"{self.file}: cannot be read ({error.strerror})") from error

    def _cast(self, block: np.ndarray, dtype: np.dtype) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = block.astype(dtype)
        if not all_finite(cast):
            raise ShapeError(f"{self.file}: tensor {self.name} holds values too large for {dtype.name}; load it as {self.dtype.name}, its own dtype")
        return cast

    def _fill(self, file: io.RawIOBase, block: np.ndarray) -> None:
        view = block.view(np.uint8).data.cast("B")
        while view:
            count = file.readinto(view)
            if not count:
                raise SourceError(f"{self.file}: ends inside tensor {self.name}; the file is truncated, download it again")
            view = view[count:]
        if not all_finite(block):
            raise ShapeError(f"{self.file}: tensor {self.name} holds NaN or infinite values; the checkpoint is damaged")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """List the tensors of a safetensors file after checking the header against the file's size.

    Raises:
        SourceError: not a safetensors file, truncated, or with a dtype that is not known here.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise SourceError(f"{path}: {size} bytes cannot hold a safetensors header of {length}; the file is truncated or of another kind")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: its header is not safetensors JSON; the file is damaged or of another kind") from error
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        entries[name] = _entry(path, name, value, 8 + length, size)
    return entries


def write_file(path: Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], data: Iterable[np.ndarray]) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    Args:
        path: Destination, replaced atomically.
        tensors: Name, shape and dtype of each tensor, in file order.
        data: The arrays, in the same order; each is taken when its turn comes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in tensors:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in data:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before the next one is made
        if file.tell() != 8 + len(text) + offset:
            raise ValueError(f"{path}: wrote {file.tell()} bytes, expected {8 + len(text) + offset}")
        file.flush()
        os.fsync(file.fileno())


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(map(operator.index, value["shape"])), map(operator.index, value["data_offsets"])
        count = math.prod(shape)
        known = dtype in _DTYPES
    except (TypeError, KeyError, ValueError) as error:
        raise SourceError(f"{path}: the header entry of {name} is malformed; the file is damaged, download it again") from error
    if not known:
        raise SourceError(f"{path}: tensor {name} has dtype {dtype}; readable are {', '.join(_DTYPES)}")
    if min(shape, default=0) < 0 or end - begin != count * _DTYPES[dtype].itemsize or begin < 0:
        raise SourceError(f"{path}: tensor {name} declares shape {shape} but {end - begin} bytes; the header is damaged")
    if base + end > size:
        raise SourceError(f"{path}: ends at byte {size}, but tensor {name} should reach to {base + end}; the file is truncated, download it again")
    return TensorEntry(path, name, _DTYPES[dtype], shape, base + begin)


# Signed and unsigned view of a dtype's bits, its exponent mask, and the sign bit.
_BITS: Mapping[np.dtype, tuple[type, type, int, int]] = {
    np.dtype(np.float32): (np.int32, np.uint32, 0x7F800000, 0x80000000),
    np.dtype(np.float16): (np.int16, np.uint16, 0x7C00, 0x8000),
    np.dtype(ml_dtypes.bfloat16): (np.int16, np.uint16, 0x7F80, 0x8000),
}


def all_finite(block: np.ndarray) -> bool:
    """Whether all values are finite, at memory speed.

    NaN and infinity have all exponent bits set, so they are the largest integers of either sign: two maxima over the bits decide, and no
    temporary array is made.
    """
    if block.dtype in _BITS and block.size:
        signed, unsigned, exponent, sign = _BITS[block.dtype]
        return int(block.view(signed).max()) < exponent and int(block.view(unsigned).max()) < sign | exponent
    return block.dtype.kind != "f" or bool(np.isfinite(block).all())
