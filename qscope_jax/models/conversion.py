"""Model folders from one layout to the other, tensor by tensor: no decoder is built, and a few tensors are in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from qscope_jax.data.files import write_json
from qscope_jax.data.hub import Source
from qscope_jax.data.resumable import ResumableFolder, source_fingerprint, verify_manifest
from qscope_jax.errors import InputError, QscopeError, ShapeError, SourceError
from qscope_jax.models.config import DTYPES, ModelConfig
from qscope_jax.models.orbax_folder import (
    WEIGHTS,
    OrbaxEntry,
    checked_orbax_entries,
    grouped,
    holds_model,
    is_orbax_folder,
    read_group,
    write_companions,
)
from qscope_jax.models.orbax_folder import write_group as write_orbax_group
from qscope_jax.models.safetensors_file import TensorEntry, all_finite, write_file
from qscope_jax.models.weights import INDEX_FILE, LEFT_OUT, checked_entries, is_left_out, read_config, shard_name, shards_of

Layout = Literal["orbax", "hf"]
LAYOUTS: tuple[Layout, ...] = ("orbax", "hf")
_FURTHER_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "LICENSE")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a model folder as it is to be written: name, shape and dtype; `carried` ones go through as bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    entry: TensorEntry | OrbaxEntry
    carried: bool = False

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class StoredModel:
    """The tensors of a model folder of either layout, checked against its config and read one at a time.

    Attributes:
        source: Where they lie.
        config: Its config.
        tensors: What there is, in the order in which reading is cheapest.
        carried: Names of those that no decoder reads.
    """

    def __init__(self, source: Source, dtype: str | None = None):
        """Read headers, not values.

        Args:
            source: Model folder or repository.
            dtype: What the decoder's tensors are read as; None is each one's own.

        Raises:
            QscopeError: as for `load_model`, NaN aside.
        """
        if dtype not in (None, *DTYPES):
            raise InputError(f"dtype {dtype!r} is not one that a model can have; expected {', '.join(DTYPES)}")
        self.source, self.config = source, read_config(source)
        entries, self.carried = (checked_orbax_entries if is_orbax_folder(source) else checked_entries)(source, self.config)
        tensors = [self._tensor(entry, dtype) for _, entry in sorted(entries.items())]
        self.tensors = [tensor for group in grouped(tensors, self.carried).values() for tensor in group]
        self._group: tuple[Path, dict[str, np.ndarray]] | None = None

    def read(self, tensor: StoredTensor) -> np.ndarray:
        """The tensor's values, in its dtype.

        Raises:
            SourceError: the source is damaged.
            ShapeError: values that are not finite, or not in the dtype asked for.
        """
        entry = tensor.entry
        if isinstance(entry, OrbaxEntry):
            return self._from_group(tensor, entry)
        if tensor.carried:
            raw = np.empty(tensor.nbytes, np.uint8)
            replace(entry, dtype=raw.dtype, shape=raw.shape).read_rows(raw)
            return raw.view(tensor.dtype).reshape(tensor.shape)
        values = np.empty(tensor.shape, tensor.dtype)
        entry.read_rows(values)
        return values

    def _tensor(self, entry: TensorEntry | OrbaxEntry, dtype: str | None) -> StoredTensor:
        carried = entry.name in self.carried
        return StoredTensor(entry.name, entry.shape, entry.dtype if carried or dtype is None else np.dtype(dtype), entry, carried)

    def _from_group(self, tensor: StoredTensor, entry: OrbaxEntry) -> np.ndarray:
        if self._group is None or self._group[0] != entry.group or tensor.name not in self._group[1]:
            self._group = None  # before the next one is read
            self._group = entry.group, read_group(entry.group)
        values = self._group[1].pop(tensor.name)  # most are read once; what was handed out is not kept
        if not tensor.carried and not all_finite(values):
            raise ShapeError(f"{entry.group}: tensor {tensor.name} holds NaN or infinite values; the checkpoint is damaged")
        if values.dtype == tensor.dtype:
            return values
        with np.errstate(over="ignore"):
            values = values.astype(tensor.dtype)
        if not all_finite(values):
            raise ShapeError(f"{entry.group}: tensor {tensor.name} holds values too large for {tensor.dtype.name}; keep {entry.dtype.name}")
        return values


@dataclass(frozen=True)
class CarriedTensor:
    """A tensor that no decoder reads, and that a save of the decoder writes as its source has it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    read: Callable[[], np.ndarray]


def left_out(source: Source | None, config: ModelConfig) -> list[CarriedTensor]:
    """The tensors of a decoder's source that are of parts not built here (vision tower, multi-token prediction)."""
    if source is None or config.family not in LEFT_OUT:
        return []
    model = StoredModel(source)
    tensors = [tensor for tensor in model.tensors if is_left_out(tensor.name, model.config)]
    return [CarriedTensor(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, partial(model.read, tensor)) for tensor in tensors]


def narrowed(model: StoredModel) -> dict[tuple[str, str], int]:
    """How many tensors lose precision or range in the dtype they are read as, by their own dtype and that one."""
    counts: dict[tuple[str, str], int] = {}
    for tensor in model.tensors:
        if not _holds(tensor.dtype, tensor.entry.dtype):
            key = tensor.entry.dtype.name, tensor.dtype.name
            counts[key] = counts.get(key, 0) + 1
    return counts


def convert_model(
    source: Source,
    destination: Path,
    to: Layout,
    *,
    dtype: str | None = None,
    lossy: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> StoredModel:
    """Write a model folder in the other layout, or in the same one; an interrupted run is resumed by the same call.

    Args:
        source: Model folder of either layout, or a hub repository.
        destination: Folder to make.
        to: Its layout.
        dtype: What the tensors become; None keeps each one's own, bit for bit.
        lossy: Allow a dtype that does not hold every value of the present one.
        overwrite: Replace a model that is at the destination.
        progress: Called with the bytes just written or found finished.
        check: Called with the hidden folder before it is put in its place; what it raises keeps it from being so.

    Raises:
        QscopeError: the source is not sound, the destination may not or cannot be written, or a dtype would lose precision.
    """
    model = StoredModel(source, dtype)
    if (lost := narrowed(model)) and not lossy:
        (own, wanted), count = next(iter(lost.items()))
        raise InputError(f"{source.name}: {count} tensors of {own} lose precision as {wanted}; pass --lossy if that is meant")
    if is_orbax_folder(source) and source.has("manifest.json") and source.folder is not None and (differing := verify_manifest(source.folder)):
        raise SourceError(f"{source.name}: {differing[0]} is not as its manifest says; copy the folder again")
    plan = {"source": source.name, "files": _identity(source), "to": to, "dtype": dtype}
    tell = progress or (lambda size: None)
    with ResumableFolder(destination, plan, overwrite=overwrite, replaceable=holds_model) as folder:
        units = (_write_orbax if to == "orbax" else _write_hf)(folder, model, tell)
        config = source.path("config.json") if dtype is None else replace(model.config, dtype=dtype).to_hf()
        write_companions(folder, config, source, _FURTHER_FILES)
        if check is not None:
            try:
                check(folder.path)
            except QscopeError:
                for unit in units:  # or the next run would find them finished
                    folder.discard(unit)
                raise
        folder.finish(format=to)
    return model


def differing_tensors(model: StoredModel, written: StoredModel, progress: Progress | None = None) -> Iterator[str]:
    """Names of tensors that are not in both models with the same dtype, shape and bits."""
    others = {tensor.name: tensor for tensor in written.tensors}
    for tensor in model.tensors:
        other = others.pop(tensor.name, None)
        if other is None or (other.shape, other.dtype) != (tensor.shape, tensor.dtype) or not _same(model.read(tensor), written.read(other)):
            yield tensor.name
        if progress is not None:
            progress(tensor.nbytes)
    yield from others


def _write_orbax(folder: ResumableFolder, model: StoredModel, tell: Progress) -> list[str]:
    """Write what is not finished; returns the units that hold tensors."""
    groups = grouped(model.tensors, model.carried)
    for group, members in groups.items():
        if not folder.done(f"{WEIGHTS}/{group}"):
            write_orbax_group(folder, group, {tensor.name: model.read(tensor) for tensor in members})
        tell(sum(tensor.nbytes for tensor in members))
    return [f"{WEIGHTS}/{group}" for group in groups]


def _write_hf(folder: ResumableFolder, model: StoredModel, tell: Progress) -> list[str]:
    """The same as shards of safetensors, with their index."""
    shards = shards_of(model.tensors)
    for number, shard in enumerate(shards, 1):
        name = shard_name(number, len(shards))
        if folder.done(name):
            tell(sum(tensor.nbytes for tensor in shard))
            continue
        with folder.unit(name) as path:
            write_file(path, [(tensor.name, tensor.shape, tensor.dtype) for tensor in shard], _values(model, shard, tell))
    if len(shards) > 1 and not folder.done(INDEX_FILE):
        weight_map = {tensor.name: shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for tensor in shard}
        total = sum(tensor.nbytes for tensor in model.tensors)
        with folder.unit(INDEX_FILE) as path:
            write_json(path, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]


def _values(model: StoredModel, tensors: Sequence[StoredTensor], tell: Progress) -> Iterator[np.ndarray]:
    for tensor in tensors:
        yield model.read(tensor)
        tell(tensor.nbytes)


def _identity(source: Source) -> Any:
    """What tells whether the source of an interrupted conversion is still the same: its files' sizes and times, or the commit."""
    return source_fingerprint(source.folder) if source.folder is not None else source.path("config.json").parent.name


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether every value of a floating dtype is one of the other as well."""
    if wide == narrow:
        return True
    a, b = ml_dtypes.finfo(wide), ml_dtypes.finfo(narrow)
    return a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same bytes: 0.0 equals -0.0 otherwise."""
    return np.array_equal(np.ascontiguousarray(a).reshape(-1).view(np.uint8), np.ascontiguousarray(b).reshape(-1).view(np.uint8))
