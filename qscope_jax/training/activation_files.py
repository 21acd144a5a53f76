"""The files of an activation cache: a manifest, and shards of equally many tokens with one safetensors file a layer.

manifest.json                        model, layers, sizes, counts, statistics, and every file's size and SHA-256
shard000000/layer12.safetensors      `residuals` [tokens, D]: the stream of that layer at the kept tokens
shard000000/tokens.safetensors       `token_ids`, `pieces`, `positions` [tokens]: what these tokens were
shard000000/shard.json               the place in the data after the shard, and sums for the statistics
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from qscope_jax.data.files import read_json
from qscope_jax.data.resumable import MANIFEST_FILE, verify_manifest
from qscope_jax.errors import InputError, ShapeError, SourceError
from qscope_jax.sae.formats.mapped_tensors import map_safetensors

FORMAT = "qscope_jax activations"
VERSION = 1
ROWS = "residuals"
TOKENS_FILE = "tokens.safetensors"
SHARD_FILE = "shard.json"
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
"""What rows can be on disk."""

# Rows begin at a page of the file, whatever the header says.
_HEADER = 4096
_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NAMED = 3


def shard_name(index: int) -> str:
    """Folder of a shard, 0-based."""
    return f"shard{index:06d}"


def layer_file(layer: int) -> str:
    """File of a layer inside a shard."""
    return f"layer{layer}.safetensors"


@dataclass(frozen=True)
class ActivationCache:
    """A finished cache, as its manifest describes it.

    Attributes:
        folder: Where it is.
        model: Name of the model.
        revision: Its commit, if it came from the hub.
        layers: 0-based, in the order they were asked for.
        d_model: Width of a row.
        dtype: Of the rows on disk.
        tokens: Rows of every layer.
        shard_tokens: Rows of a shard; the last may have fewer.
        seen: Tokens that the model read, padding aside.
        dropped: Those among them that the filter left out, damaged ones included.
        damaged: Those among them whose stream was NaN or infinite.
        filter: Its settings, `max_norm_multiple` and `drop_first`.
        statistics: Layer -> `mean_squared_norm` (exact) and `median_norm` (from a histogram, within 1.1 %) of the rows.
        files: File -> its size and checksum.
    """

    folder: Path
    model: str
    revision: str | None
    layers: tuple[int, ...]
    d_model: int
    dtype: str
    tokens: int
    shard_tokens: int
    seen: int
    dropped: int
    damaged: int
    filter: dict[str, Any]
    statistics: dict[int, dict[str, float]]
    files: dict[str, dict[str, Any]]

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.tokens // self.shard_tokens)

    @property
    def bits(self) -> np.dtype:
        """Whole numbers of the rows' size, which NumPy copies faster than bfloat16."""
        return np.dtype(f"u{DTYPES[self.dtype].itemsize}")

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the manifest aside."""
        return sum(facts["bytes"] for facts in self.files.values())

    def check(self, layers: Collection[int], *, d_model: int | None = None, verify: bool = False) -> None:
        """Check that the files of some layers are there and whole; those of other layers may be missing.

        Args:
            layers: Which.
            d_model: The width that rows should have.
            verify: Compare checksums too, which reads everything.

        Raises:
            InputError: a layer that the cache does not have, none, or one given twice.
            ShapeError: another width.
            SourceError: files are missing, short or changed.
        """
        if not layers or len(set(layers)) != len(layers):
            raise InputError(f"layers {list(layers)}: give one or more, none of them twice")
        if missing := [layer for layer in layers if layer not in self.layers]:
            raise InputError(f"{self.folder}: has no activations of layer {missing[0]}; it has layers {', '.join(map(str, self.layers))}")
        if d_model is not None and d_model != self.d_model:
            raise ShapeError(f"{self.folder}: rows are {self.d_model} wide, expected {d_model}; it was made by {self.model}, choose that model")
        names = [f"{shard_name(shard)}/{layer_file(layer)}" for shard in range(self.shards) for layer in layers]
        wrong = [name for name in names if name not in self.files or _size(self.folder / name) != self.files[name]["bytes"]]
        if not wrong and verify:
            wrong = verify_manifest(self.folder, names)
        if wrong:
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise SourceError(
                f"{self.folder}: {', '.join(wrong[:_NAMED])}{more}: missing, short or changed since the cache was made; copy or make it again"
            )

    def map_rows(self, layer: int, shard: int) -> np.ndarray:
        """A memory map of the rows of a layer in a shard, [tokens, D].

        Raises:
            SourceError: the file is missing, or not what the manifest says.
        """
        path = self.folder / shard_name(shard) / layer_file(layer)
        rows = map_safetensors(path).get(ROWS)
        expected = (min(self.shard_tokens, self.tokens - shard * self.shard_tokens), self.d_model)
        if rows is None or rows.shape != expected or rows.dtype != DTYPES[self.dtype]:
            found = "none" if rows is None else f"{rows.dtype.name} {list(rows.shape)}"
            raise SourceError(f"{path}: holds {found} as `{ROWS}`, expected {self.dtype} {list(expected)}; copy or make the cache again")
        return rows


def read_cache(folder: str | Path) -> ActivationCache:
    """Read the manifest of a finished cache.

    Raises:
        SourceError: there is none, or it is of something else.
    """
    folder = Path(folder).expanduser()
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise SourceError(f"{folder}: has no {MANIFEST_FILE}; expected the folder of a finished activation cache")
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise SourceError(f"{path}: is not the manifest of a finished activation cache; choose the folder of one")
    if found.get("format_version") != VERSION:
        raise SourceError(f"{path}: has version {found.get('format_version')}, this program reads {VERSION}; make the cache again")
    try:
        sizes = {name: int(found[name]) for name in ("d_model", "tokens", "shard_tokens")}
        counts = {name: int(found[f"{name}_tokens"]) for name in ("seen", "dropped", "damaged")}
        others = {name: found[name] for name in ("model", "revision", "dtype", "filter", "files")}
        layers, statistics = tuple(map(int, found["layers"])), {int(layer): facts for layer, facts in found["statistics"].items()}
        usable = min(sizes.values()) > 0 and found["dtype"] in DTYPES and isinstance(found["files"], dict)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path}: is damaged ({type(error).__name__} at {error}); copy or make the cache again") from error
    if not usable:
        raise SourceError(f"{path}: is damaged (its sizes or types make no sense); copy or make the cache again")
    return ActivationCache(folder, layers=layers, statistics=statistics, **sizes, **counts, **others)


def holds_cache(folder: Path) -> bool:
    """Whether a folder is a finished cache, which may be replaced by another."""
    try:
        read_cache(folder)
    except SourceError:
        return False
    return True


class RowsFile:
    """A safetensors file of one tensor whose rows are appended; its header is written last, when their number is known."""

    def __init__(self, path: Path):
        """Open the file, which is replaced if it is there."""
        self._rows, self._width, self._dtype = 0, 0, np.dtype(np.float32)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._file.write(bytes(_HEADER))

    def __enter__(self) -> "RowsFile":
        """Nothing more to do."""
        return self

    def append(self, rows_ND: np.ndarray) -> None:
        """Write rows, of the same type and width every time."""
        self._rows, self._width, self._dtype = self._rows + len(rows_ND), rows_ND.shape[1], rows_ND.dtype
        view = np.ascontiguousarray(rows_ND).view(np.uint8).reshape(-1).data
        while view:
            view = view[self._file.write(view) :]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write the header, unless something failed, and close."""
        with self._file:
            if kind is None:
                size = self._rows * self._width * self._dtype.itemsize
                entry = {"dtype": _SAFETENSORS[self._dtype.name], "shape": [self._rows, self._width], "data_offsets": [0, size]}
                text = json.dumps({ROWS: entry}).encode().ljust(_HEADER - 8)
                self._file.seek(0)
                self._file.write(len(text).to_bytes(8, "little") + text)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
