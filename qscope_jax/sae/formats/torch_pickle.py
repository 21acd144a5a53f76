"""The pickle inside a PyTorch file: read by a small interpreter that can call nothing, and written without torch.

`torch.save` describes tensors with some twenty-five pickle opcodes and a handful of globals. The interpreter below knows exactly those. It
never imports or calls what a pickle names, and it hashes only strings and ints. (A `pickle.Unpickler` with a restricted `find_class` still
crashes on deeply nested keys, hangs on doubly nested ones, and allocates gigabytes for one large memo index.)
Layout as measured on torch 2.13; protocol 2 is what every version of `torch.save` writes.
"""

import enum
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from qscope_jax.errors import SourceError, UnsafeFileError

STORAGES: Mapping[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
"""PyTorch storage class -> element type; the types that are read and written."""


@dataclass(frozen=True)
class Storage:
    """A run of elements in the archive entry `data/<key>`."""

    dtype: np.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRecord:
    """A strided view of a storage, as the pickle states it; `offset` and `stride` count elements. Not yet checked against the storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def parse_pickle(data: bytes, where: str) -> Any:
    """The object that a PyTorch pickle describes: dicts, lists, tuples, numbers and strings, with a `TensorRecord` for each tensor.

    Raises:
        UnsafeFileError: the pickle names a global, uses an opcode or a persistent id that no plain file of tensors needs.
        SourceError: the pickle is truncated or malformed, or a tensor needs post-processing (a lazy negation).
    """
    machine = _Machine(where)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except ValueError as error:
        raise SourceError(f"{where}: its pickle is malformed ({_short(error)}); the file is damaged, download it again") from error
    raise SourceError(f"{where}: its pickle ends early; the file is damaged, download it again")


def emit_pickle(tensors: Mapping[str, TensorRecord]) -> bytes:
    """A protocol-2 pickle of a plain dict of tensors, which torch reads with `weights_only=True`."""
    parts = [b"\x80\x02}("]
    for name, tensor in tensors.items():
        storage = tensor.storage
        class_name = next(name for name, dtype in STORAGES.items() if dtype == storage.dtype)
        parts += [
            _string(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _string("storage") + f"ctorch\n{class_name}\n".encode() + _string(storage.key) + _string("cpu") + _integer(storage.numel) + b"tQ",
            _integer(tensor.offset) + _integers(tensor.size) + _integers(tensor.stride),
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join(parts) + b"u."


class _Callable(enum.Enum):
    """Globals that a pickle may apply with REDUCE; each stands for itself and is never a function."""

    TENSOR = "torch._utils _rebuild_tensor_v2"
    PARAMETER = "torch._utils _rebuild_parameter"
    ORDERED_DICT = "collections OrderedDict"


class _OrderedDict(dict[Any, Any]):
    """Told from a plain dict because BUILD may attach a module's `_metadata` to it, which is dropped."""


_MARK = object()
_GLOBALS: dict[str, _Callable | np.dtype] = {
    **{member.value: member for member in _Callable},
    **{f"torch {name}": dtype for name, dtype in STORAGES.items()},
}
_LITERALS = frozenset({"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"})
_MAKERS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Stack and memo of the interpreter; `step` runs one opcode."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _MAKERS:
            self.stack.append(_MAKERS[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.peek()
        elif opcode in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise self.malformed(f"memo {argument} is read before it is written")
            self.stack.append(self.memo[argument])
        elif opcode in _TUPLES:
            self.stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[opcode])])))
        elif opcode in _HANDLERS:
            _HANDLERS[opcode](self, argument)
        else:
            raise UnsafeFileError(f"{self.where}: its pickle uses opcode {opcode}, which torch.save never writes for tensors; nothing was executed")

    def pop(self) -> Any:
        value = self.peek()
        self.stack.pop()
        return value

    def peek(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise self.malformed("its stack runs empty")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise self.malformed("a mark is missing")
        self.stack.pop()
        return items[::-1]

    def malformed(self, what: str) -> SourceError:
        return SourceError(f"{self.where}: its pickle is malformed ({what}); the file is damaged, download it again")

    def unsafe(self, what: str) -> UnsafeFileError:
        return UnsafeFileError(f"{self.where}: its pickle {what}; nothing was executed. Re-save it with torch.save as a plain dict of tensors")

    def proto(self, argument: int) -> None:
        if argument != 2:
            raise self.malformed(f"protocol {argument}, expected 2")

    def global_(self, argument: str) -> None:
        if argument not in _GLOBALS:
            raise self.unsafe(f"asks for {_short(argument.replace(' ', '.'))}, which a file of tensors may not use")
        self.stack.append(_GLOBALS[argument])

    def tuple_(self, _: None) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def set_items(self, argument: None, count: int | None = None) -> None:
        items = self.pop_to_mark() if count is None else list(reversed([self.pop() for _ in range(count)]))
        target = self.peek()
        if not isinstance(target, dict) or len(items) % 2:
            raise self.malformed("items are set on something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.unsafe(f"has a dict key of type {type(key).__name__}, expected strings")
            target[key] = value

    def append(self, argument: None, count: int | None = None) -> None:
        items = self.pop_to_mark() if count is None else [self.pop()]
        target = self.peek()
        if not isinstance(target, list):
            raise self.malformed("items are appended to something that is not a list")
        target.extend(items)

    def persistent_id(self, _: None) -> None:
        match self.pop():
            case ("storage", np.dtype() as dtype, str(key), str(), int(numel)) if type(numel) is int and numel >= 0:
                self.stack.append(Storage(dtype, key, numel))
            case _:
                raise self.unsafe("refers to an object outside of it in a way that is not a tensor storage")

    def build(self, _: None) -> None:
        self.pop()
        if not isinstance(self.peek(), _OrderedDict):
            raise self.unsafe(f"sets the state of a {type(self.peek()).__name__}")

    def reduce(self, _: None) -> None:
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case _Callable.ORDERED_DICT, ():
                self.stack.append(_OrderedDict())
            case _Callable.PARAMETER, (TensorRecord() as tensor, bool(), _OrderedDict() as hooks) if not hooks:
                self.stack.append(tensor)
            case _Callable.TENSOR, (Storage() as storage, offset, tuple(size), tuple(stride), bool(), _OrderedDict() as hooks, *rest) if not hooks:
                if len(rest) > 1 or (rest and rest[0]):
                    raise self.malformed("a tensor carries metadata, such as a pending negation; re-save it after .resolve_neg()")
                if len(size) != len(stride) or not all(type(value) is int and value >= 0 for value in (offset, *size, *stride)):
                    raise self.unsafe("holds a tensor whose offset, size or stride is not a whole number >= 0")
                self.stack.append(TensorRecord(storage, offset, size, stride))
            case _Callable(), _:
                raise self.unsafe(f"gives {function.value.replace(' ', '.')} arguments that torch.save does not write")
            case _:
                raise self.unsafe(f"calls a {type(function).__name__}")


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.proto,
    "GLOBAL": _Machine.global_,
    "TUPLE": _Machine.tuple_,
    "SETITEM": lambda machine, argument: machine.set_items(argument, 2),
    "SETITEMS": _Machine.set_items,
    "APPEND": lambda machine, argument: machine.append(argument, 1),
    "APPENDS": _Machine.append,
    "BINPERSID": _Machine.persistent_id,
    "BUILD": _Machine.build,
    "REDUCE": _Machine.reduce,
}


def _short(text: object) -> str:
    """One printable line of at most about a hundred characters, whatever a file put into it."""
    line = str(text)[:100]
    return line if line.isprintable() else repr(line)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
