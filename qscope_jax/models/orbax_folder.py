"""Model folders whose weights are Orbax checkpoints, one for each layer: what a pod reads slice by slice, and what an interrupted copy resumes.

    config.json, tokenizer files     as in a Hugging Face folder
    manifest.json                    size and SHA-256 of every file
    weights/layer_00000 ...          a standard Orbax checkpoint each: Hugging Face tensor name -> array, in its Hugging Face shape and own dtype
    weights/shared                   the same for embedding, head and final norm
    weights/carried                  tensors that the decoder does not read and that a copy keeps

A group above `_GROUP_BYTES` goes on in `layer_00000.1` and so on, so that whoever reads or writes holds little; readers take any grouping.
"""

import gc
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qscope_jax.data.files import read_json, write_json
from qscope_jax.data.hub import Source
from qscope_jax.data.orbax_arrays import describe_arrays, read_arrays, write_arrays
from qscope_jax.data.resumable import MANIFEST_FILE, ResumableFolder
from qscope_jax.errors import ShapeError, SourceError
from qscope_jax.models.config import DTYPES, ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.weights import (
    CARRIED_FILES,
    INDEX_FILE,
    SINGLE_FILE,
    check_tensors,
    decoder_plan,
    decoder_tensors,
    parameter_path,
    widest,
)
from qscope_jax.parallel.rules import parameter_sharding

WEIGHTS = "weights"
_GROUP_BYTES = 400_000_000
_COLLECT_BYTES = 256_000_000
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_Sized = TypeVar("_Sized", bound=Any)


@dataclass(frozen=True)
class OrbaxEntry:
    """Where one tensor lies: the checkpoint that holds it, its name, dtype and shape."""

    group: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def is_orbax_folder(source: Source) -> bool:
    """Whether the source is a local folder of this layout."""
    return source.folder is not None and (source.folder / WEIGHTS).is_dir() and not (source.has(INDEX_FILE) or source.has(SINGLE_FILE))


def holds_model(path: Path) -> bool:
    """Whether a folder is a model's, of either layout, so that another may take its place."""
    return (path / "config.json").is_file()


def checked_orbax_entries(source: Source, config: ModelConfig) -> tuple[dict[str, OrbaxEntry], frozenset[str]]:
    """Every tensor of the folder after `check_tensors`, and the names of the carried ones."""
    entries = read_entries(source)
    return entries, check_tensors(source.name, entries, config, decoder_plan(config, entries)[2])


def read_entries(source: Source) -> dict[str, OrbaxEntry]:
    """Every tensor of the folder, whose files must have the sizes that its manifest says.

    Raises:
        SourceError: a file is missing, truncated or not what the layout says, or a tensor lies in two groups.
    """
    assert source.folder is not None
    _check_sizes(source.folder)
    entries: dict[str, OrbaxEntry] = {}
    for group in sorted(path for path in (source.folder / WEIGHTS).iterdir() if path.is_dir() and not path.name.startswith(".")):
        for name, facts in describe_arrays(group.resolve()).items():
            if name in entries:
                raise SourceError(f"{source.name}: tensor {name} lies in {entries[name].group.name} and in {group.name}; expected it once")
            entries[name] = OrbaxEntry(group, name, np.dtype(facts.dtype), tuple(facts.shape))
    return entries


def read_group(group: Path) -> dict[str, np.ndarray]:
    """The tensors of one group, in host memory.

    Raises:
        SourceError: the checkpoint is damaged.
    """
    return read_arrays(group.resolve())


def load_orbax(source: Source, config: ModelConfig, mesh: Mesh, *, keep_dtypes: bool = False) -> Decoder:
    """Read the weights straight onto the mesh, group by group, each device its slices; the peak is near the model and one group.

    Args:
        source: Folder of this layout.
        config: Its config, as `read_config` gives it.
        mesh: Where the weights go.
        keep_dtypes: As for `load_decoder`.

    Raises:
        SourceError: a tensor is missing, or a checkpoint damaged.
        ShapeError: a tensor does not have the shape that the config demands, is not finite, or does not fit the dtype asked for.
        ArchitectureError: the folder holds tensors that this decoder would ignore.
    """
    entries = read_entries(source)
    leaves, tree, plan = decoder_plan(config, entries)
    check_tensors(source.name, entries, config, plan)
    slots: dict[str, _Slot] = {}
    for number, ((path, leaf), place) in enumerate(zip(leaves, plan, strict=True)):
        own = widest(entries[name].dtype for name in place.names)
        dtype = own if keep_dtypes and own.name in DTYPES else np.dtype(leaf.dtype)
        sharding = parameter_sharding(parameter_path(path)[-1], leaf.shape, mesh)
        slots |= {name: _Slot(number, place.index(i), leaf.shape, place.disk_shape, dtype, sharding) for i, name in enumerate(place.names)}
    arrays: dict[int, jax.Array] = {}
    uncollected = 0
    # Reading takes a few times the tensor's size for a moment: the largest come first, while there is little else.
    for group, names in sorted(_by_group(entries).items(), key=lambda item: -max(entries[name].nbytes for name in item[1])):
        if not slots.keys().isdisjoint(names):
            _load_group(group, [entries[name] for name in names], slots, arrays)
            uncollected += sum(entries[name].nbytes for name in names)
        if uncollected >= _COLLECT_BYTES:
            # Orbax's finished tasks refer to each other, and to what they have read. Not after every group: it takes up to a second.
            gc.collect()
            uncollected = 0
    return jax.tree_util.tree_unflatten(tree, [arrays[number] for number in range(len(leaves))])


def save_orbax(decoder: Decoder, path: Path, *, carry_from: Source | None = None, carried: Sequence[Any] = ()) -> None:
    """Write a folder of this layout, with the tokenizer files of `carry_from` and the tensors `carried`; it appears whole or not at all.

    Raises:
        SourceError: `path` is a folder of something else, which would be lost, or cannot be written to.
    """
    tensors = sorted([*decoder_tensors(decoder), *carried], key=lambda tensor: tensor.name)
    groups = grouped(tensors, frozenset(tensor.name for tensor in carried))
    # What is in memory has no name by which another process could know it again: a broken save leaves nothing to resume.
    with ResumableFolder(path, {"source": None, "id": uuid.uuid4().hex}, overwrite=True, replaceable=holds_model) as folder:
        try:
            for group, members in groups.items():
                write_group(folder, group, {tensor.name: tensor.read() for tensor in members})
            write_companions(folder, decoder.config.to_hf(), carry_from)
            folder.finish(format="orbax")
        except BaseException:
            for unit in (*(f"{WEIGHTS}/{group}" for group in groups), "config.json", *CARRIED_FILES):
                folder.discard(unit)
            raise


def grouped(tensors: Sequence[_Sized], carried: frozenset[str] = frozenset()) -> dict[str, list[_Sized]]:
    """Tensors (whatever has `name` and `nbytes`), in their order, by the group they are written to."""
    by_place: dict[str, list[_Sized]] = {}
    for tensor in tensors:
        layer = _LAYER.search(tensor.name)
        place = "carried" if tensor.name in carried else f"layer_{int(layer[1]):05d}" if layer else "shared"
        by_place.setdefault(place, []).append(tensor)
    groups: dict[str, list[_Sized]] = {}
    for place, members in sorted(by_place.items()):
        part, size = 0, 0
        for tensor in members:
            if size and size + tensor.nbytes > _GROUP_BYTES:
                part, size = part + 1, 0
            groups.setdefault(f"{place}.{part}" if part else place, []).append(tensor)
            size += tensor.nbytes
    return groups


def write_group(folder: ResumableFolder, group: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one group as a unit of `folder`.

    Raises:
        SourceError: the disk is full or writing failed.
    """
    with folder.unit(f"{WEIGHTS}/{group}") as path:
        write_arrays(path, arrays)


def write_companions(folder: ResumableFolder, config: Mapping[str, Any] | Path, carry_from: Source | None, extra: Sequence[str] = ()) -> None:
    """Write `config.json`, from its content or from a file, and the tokenizer files that `carry_from` has, each as a unit of `folder`."""
    if not folder.done("config.json"):
        with folder.unit("config.json") as path:
            if isinstance(config, Path):
                shutil.copyfile(config, path)
            else:
                write_json(path, config)
    for name in (*CARRIED_FILES, *extra):
        if carry_from is not None and not folder.done(name) and carry_from.has(name):
            with folder.unit(name) as path:
                shutil.copyfile(carry_from.path(name), path)


@dataclass(frozen=True)
class _Slot:
    """Where a tensor goes: which array of the decoder, and where among its leading dimensions."""

    number: int
    index: tuple[int, ...]
    shape: tuple[int, ...]
    disk_shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding

    @property
    def part_sharding(self) -> NamedSharding:
        """Sharding of the tensor alone: that of the array without its leading dimensions."""
        spec = tuple(self.sharding.spec)
        spec += (None,) * (len(self.shape) - len(spec))
        spec = spec[len(self.index) :]
        # Two dimensions that are one on disk cannot be split there as they are here.
        return NamedSharding(self.sharding.mesh, PartitionSpec(*(spec if len(spec) == len(self.disk_shape) else spec[:1])))


def _load_group(group: Path, entries: Sequence[OrbaxEntry], slots: Mapping[str, _Slot], arrays: dict[int, jax.Array]) -> None:
    """Load a group and put its tensors where they belong."""
    wanted = {entry.name: jax.ShapeDtypeStruct(entry.shape, entry.dtype, sharding=slots[entry.name].part_sharding)
              for entry in entries if entry.name in slots}  # fmt: skip
    parts = read_arrays(group.resolve(), {entry.name: wanted.get(entry.name) for entry in entries})
    names = list(wanted)
    finite, fits = _finite([parts[name] for name in names], tuple(slots[name].dtype.name for name in names))
    for name, is_finite, does_fit in zip(names, *jax.device_get((finite, fits)), strict=True):
        if not is_finite:
            raise ShapeError(f"{group}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
        if not does_fit:
            own = wanted[name].dtype.name
            raise ShapeError(f"{group}: tensor {name} holds values too large for {slots[name].dtype.name}; load it as {own}, its own dtype")
    for name in names:
        slot, part = slots[name], parts.pop(name)
        if (part.shape, part.dtype) == (slot.shape, slot.dtype):
            array = part
        elif all(size == 1 for size in slot.shape[: len(slot.index)]):
            array = jnp.reshape(part.astype(slot.dtype), slot.shape)
        else:
            stack = arrays.pop(slot.number) if slot.number in arrays else jnp.zeros(slot.shape, slot.dtype, device=slot.sharding)
            array = _insert(stack, part, np.array(slot.index, np.int32))
        arrays[slot.number] = jax.device_put(array, slot.sharding)


@partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    """The stack with one of its parts replaced, in place."""
    part = part.astype(stack.dtype).reshape((1,) * len(index) + stack.shape[len(index) :])
    return jax.lax.dynamic_update_slice(stack, part, (*index, *(jnp.int32(0) for _ in range(stack.ndim - len(index)))))


@partial(jax.jit, static_argnums=1)
def _finite(parts: list[jax.Array], dtypes: tuple[str, ...]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Whether each part is finite, and whether it still is in the dtype it gets."""
    cast = [part.astype(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
    return [jnp.isfinite(part).all() for part in parts], [jnp.isfinite(part).all() for part in cast]


def _by_group(entries: Mapping[str, OrbaxEntry]) -> dict[Path, list[str]]:
    groups: dict[Path, list[str]] = {}
    for entry in entries.values():
        groups.setdefault(entry.group, []).append(entry.name)
    return groups


def _check_sizes(folder: Path) -> None:
    """Find missing and cut files before Orbax does: it reads with many tasks at once, and where one fails the others complain on stderr."""
    if not (folder / MANIFEST_FILE).is_file():
        raise SourceError(f"{folder}: has no {MANIFEST_FILE}, without which nobody knows whether it is whole; copy or convert the folder again")
    files = read_json(folder / MANIFEST_FILE).get("files")
    if not isinstance(files, dict):
        raise SourceError(f"{folder}: {MANIFEST_FILE} lists no files; copy or convert the folder again")
    for name, facts in files.items():
        size = facts.get("bytes") if isinstance(facts, dict) else None
        if name.startswith(f"{WEIGHTS}/") and (not (folder / name).is_file() or (folder / name).stat().st_size != size):
            raise SourceError(f"{folder}: {name} is missing or not of the {size} bytes that {MANIFEST_FILE} says; copy the folder again")
