"""Hugging Face checkpoints: one invertible table of names, read and written by streaming slices."""

import mmap
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qscope_jax.data.files import atomic_path, read_json, write_json
from qscope_jax.data.hub import Source
from qscope_jax.errors import ArchitectureError, ShapeError, SourceError
from qscope_jax.models.config import DTYPES, ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.safetensors_file import TensorEntry, read_header, write_file
from qscope_jax.parallel.rules import parameter_sharding

# Tree path -> Hugging Face name, for each layer and expert. Weights are kept as they lie on disk ([out, in]), so the table needs
# neither transposes nor splits and reads both ways.
_LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "layers.input_norm": "model.layers.{layer}.input_layernorm.weight",
    "layers.post_attention_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    **{f"layers.mixer.{name}": f"model.layers.{{layer}}.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"layers.feed_forward.{name}": f"model.layers.{{layer}}.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
}
_QWEN3 = _LLAMA | {f"layers.mixer.{name}": f"model.layers.{{layer}}.self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
_QWEN3_MOE = _QWEN3 | {
    "layers.feed_forward.router": "model.layers.{layer}.mlp.gate.weight",
    "layers.feed_forward.experts_gate_up_proj": "model.layers.{layer}.mlp.experts.{expert}.{half}.weight",
    "layers.feed_forward.experts_down_proj": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
_QWEN3_5 = _QWEN3_MOE | {
    **{
        f"layers.mixer.{name}": f"model.layers.{{layer}}.linear_attn.{name}.weight"
        for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "out_proj")
    },
    **{f"layers.mixer.{name}": f"model.layers.{{layer}}.linear_attn.{name}" for name in ("A_log", "dt_bias")},
    "layers.mixer.delta_norm": "model.layers.{layer}.linear_attn.norm.weight",
    **{
        f"layers.feed_forward.shared_{name}": f"model.layers.{{layer}}.mlp.shared_expert.{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj")
    },
    "layers.feed_forward.shared_gate": "model.layers.{layer}.mlp.shared_expert_gate.weight",
}
# In the wrapper with a vision tower the text decoder is one part of several.
_QWEN3_5_WRAPPED = {path: name.replace("model.", "model.language_model.", 1) for path, name in _QWEN3_5.items()}
# Where all experts of a layer are one tensor, the halves of `gate_up_proj` lie behind each other, as in our array.
_FUSED = {name: "model.layers.{layer}.mlp.experts." + name.removeprefix("experts_") for name in ("experts_gate_up_proj", "experts_down_proj")}
_GEMMA2 = _LLAMA | {
    "layers.mixer_output_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.post_attention_norm": "model.layers.{layer}.pre_feedforward_layernorm.weight",
    "layers.feed_forward_output_norm": "model.layers.{layer}.post_feedforward_layernorm.weight",
}
NAME_TABLES: dict[str, dict[str, str]] = {
    "gemma2": _GEMMA2,
    "llama": _LLAMA,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_5": _QWEN3_5_WRAPPED,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5_WRAPPED,
    "qwen3_5_moe_text": _QWEN3_5,
}
# Tensors that a decoder of the family knowingly leaves out: vision tower and multi-token prediction. An export carries them over.
LEFT_OUT = {family: ("model.visual.", "mtp.") for family in NAME_TABLES if family.startswith("qwen3_5")}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_SHARD_BYTES = 5_000_000_000
CARRIED_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json",
                 "chat_template.jinja", "generation_config.json")  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """How one array of a decoder lies in a checkpoint: as one tensor, or as one for each index of its leading dimensions.

    Attributes:
        names: Names of the tensors, the last leading dimension fastest.
        stacked: The leading dimensions: repeats of the layer, experts, and the halves of an expert's gate and up projection.
        shape: Shape of each tensor, as a part of the array.
        disk_shape: Its shape on disk, of the same elements in the same order.
    """

    names: tuple[str, ...]
    stacked: tuple[int, ...]
    shape: tuple[int, ...]
    disk_shape: tuple[int, ...]

    def index(self, number: int) -> tuple[int, ...]:
        """Where the tensor of that number lies in the array."""
        return tuple(int(i) for i in np.unravel_index(number, self.stacked)) if self.stacked else ()


def placement(path: tuple[Any, ...], shape: tuple[int, ...], config: ModelConfig) -> Placement:
    """Placement of the leaf with a key path and shape of a decoder of `config`."""
    parameter = parameter_path(path)
    pattern = NAME_TABLES[config.family][".".join(parameter)]
    if config.fused_experts and parameter[-1] in _FUSED:
        pattern = _FUSED[parameter[-1]].replace("model.", _prefix(config.family), 1)
    leading = [kind for kind in ("{layer}", "{expert}", "{half}") if kind in pattern]
    if not leading:
        return Placement((pattern,), (), shape, shape)
    place = next(index for key in path if isinstance(index := getattr(key, "key", getattr(key, "idx", None)), int))
    layers = [repeat * config.period + place for repeat in range(shape[0])]
    experts = range(shape[1] if "{expert}" in leading else 1)
    halves = ("gate_proj", "up_proj") if "{half}" in leading else ("",)
    names = tuple(pattern.format(layer=layer, expert=e, half=half) for layer in layers for e in experts for half in halves)
    part = shape[len(leading) :]
    fused = config.fused_experts and parameter[-1] == "experts_gate_up_proj"
    return Placement(names, shape[: len(leading)], part, (part[0], part[1] * part[2], part[3]) if fused else part)


def _prefix(family: str) -> str:
    return NAME_TABLES[family]["final_norm"].removesuffix("norm.weight")


def read_config(source: Source) -> ModelConfig:
    """Config of the checkpoint at `source`; stop tokens of `generation_config.json` are added to those of the config."""
    config = ModelConfig.from_hf(read_json(source.path("config.json")))
    if not source.has("generation_config.json"):
        return config
    eos = read_json(source.path("generation_config.json")).get("eos_token_id")
    extra = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra))))


def decoder_plan(config: ModelConfig, names: Iterable[str]) -> tuple[list[tuple[Any, jax.ShapeDtypeStruct]], Any, list[Placement]]:
    """Key path, shape and dtype of every array of a decoder, the tree that they make up, and where each lies in a checkpoint.

    Args:
        config: The checkpoint's config.
        names: Its tensors' names: they alone tell whether the experts of a layer are one tensor.
    """
    config = replace(config, fused_experts=any(name.endswith(".mlp.experts.gate_up_proj") for name in names))
    leaves, tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda: Decoder(config, jax.random.key(0))))
    return leaves, tree, [placement(path, leaf.shape, config) for path, leaf in leaves]


def carried_tensors(names: Iterable[str], config: ModelConfig) -> frozenset[str]:
    """Those tensors of a checkpoint that the decoder does not read and a copy must hold all the same."""
    head = {"lm_head.weight"} if config.tie_embeddings else set()
    return frozenset(name for name in names if name in head or is_left_out(name, config))


def is_left_out(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is of a part that is not built here: vision tower or multi-token prediction."""
    return name.startswith(LEFT_OUT.get(config.family, ("\0",)))


def check_tensors(where: str, found: Mapping[str, Any], config: ModelConfig, plan: Sequence[Placement]) -> frozenset[str]:
    """Check that a checkpoint holds what a decoder of `config` needs and nothing that it would ignore; returns the carried names.

    Args:
        where: The checkpoint's name, for messages.
        found: Entries with `name`, `shape` and `dtype`, by name.
        config: The checkpoint's config.
        plan: Placements of that config's decoder.

    Raises:
        SourceError: a tensor is missing.
        ShapeError: one has another shape than the config demands.
        ArchitectureError: one has no place in the decoder, or is quantised.
    """
    carried = carried_tensors(found, config)
    expected = {name for place in plan for name in place.names}
    if missing := sorted(expected - set(found)):
        raise SourceError(f"{where}: {len(missing)} tensors are missing, first {missing[0]}; a file is absent or config.json of another model")
    if extra := sorted(set(found) - expected - carried):
        raise ArchitectureError(f"{where}: {len(extra)} tensors have no place in a {config.family} decoder, first {extra[0]}; none is ignored")
    for place in plan:
        for name in place.names:
            _check(where, found[name], place.disk_shape)
    return carried


def checked_entries(source: Source, config: ModelConfig) -> tuple[dict[str, TensorEntry], frozenset[str]]:
    """Every tensor of a Hugging Face checkpoint after `check_tensors`, and the names of the carried ones."""
    entries = _entries(source)
    return entries, check_tensors(source.name, entries, config, decoder_plan(config, entries)[2])


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds the values of all of them."""
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(reduce(jnp.promote_types, dtypes))


def load_decoder(source: Source, config: ModelConfig, mesh: Mesh, *, keep_dtypes: bool = False) -> Decoder:
    """Read a checkpoint's weights straight onto the mesh, each device's slices by themselves.

    Args:
        source: Hugging Face folder or repository.
        config: Its config, as `read_config` gives it.
        mesh: Where the weights go.
        keep_dtypes: Keep every tensor's own dtype, so that saving writes it back bit for bit, instead of casting to `config.dtype`.
            (Layers stacked in one array share the widest of theirs.) Activations have `config.dtype` in either case.

    Raises:
        SourceError: a shard or tensor is missing, truncated or unreadable.
        ShapeError: a tensor does not have the shape that the config demands, or is not finite.
        ArchitectureError: the checkpoint holds tensors that this decoder would ignore.
    """
    entries = _entries(source)
    leaves, tree, plan = decoder_plan(config, entries)
    check_tensors(source.name, entries, config, plan)

    def make(item: tuple[tuple[Any, jax.ShapeDtypeStruct], Placement]) -> jax.Array:
        (path, leaf), place = item
        sharding = parameter_sharding(parameter_path(path)[-1], leaf.shape, mesh)
        parts = [entries[name] for name in place.names]
        own = widest(part.dtype for part in parts)
        dtype = own if keep_dtypes and own.name in DTYPES else np.dtype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: _read(parts, place, dtype, index))

    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(make, zip(leaves, plan, strict=True)))
    return jax.tree_util.tree_unflatten(tree, arrays)


@dataclass(frozen=True)
class DecoderTensor:
    """One tensor to write: a part of an array of a decoder.

    Attributes:
        name: Its Hugging Face name.
        shape: Its shape on disk.
        array: The array of the decoder.
        index: Its place among the leading dimensions.
    """

    name: str
    shape: tuple[int, ...]
    array: Any
    index: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return np.dtype(self.array.dtype)

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, in host memory."""
        return np.asarray(self.array[self.index] if self.index else self.array).reshape(self.shape)


def decoder_tensors(decoder: Decoder) -> list[DecoderTensor]:
    """Every tensor of a decoder under its Hugging Face name."""
    tensors = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(decoder)[0]:
        place = placement(path, leaf.shape, decoder.config)
        tensors += [DecoderTensor(name, place.disk_shape, leaf, place.index(number)) for number, name in enumerate(place.names)]
    return tensors


def save_decoder(decoder: Decoder, path: Path, *, carry_from: Source | None = None, carried: Sequence[Any] = ()) -> None:
    """Write a Hugging Face folder: sharded safetensors, index, config, the tokenizer files of `carry_from` and the tensors `carried`.

    The folder appears whole or not at all; one tensor is in host memory at a time.

    Raises:
        SourceError: `path` is a folder of something else, which would be lost, or cannot be written to.
    """
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise SourceError(f"{path}: is a folder that holds something else than a model; choose a new or empty one")
    config = decoder.config
    tensors = [*decoder_tensors(decoder), *carried]
    tensors.sort(key=lambda tensor: tensor.name)
    with atomic_path(path, directory=True) as folder:
        shards = shards_of(tensors)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = shard_name(number, len(shards))
            plan = [(tensor.name, tensor.shape, tensor.dtype) for tensor in shard]
            write_file(folder / file, plan, (tensor.read() for tensor in shard))
            weight_map |= {tensor.name: file for tensor in shard}
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors)
            write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(folder / "config.json", config.to_hf())
        for name in CARRIED_FILES:
            if carry_from is not None and carry_from.has(name):
                shutil.copyfile(carry_from.path(name), folder / name)


def _entries(source: Source) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint, from its index or its single file."""
    if not source.has(INDEX_FILE):
        if not source.has(SINGLE_FILE):
            raise SourceError(f"{source.name}: neither {INDEX_FILE} nor {SINGLE_FILE}; expected a Hugging Face folder with safetensors weights")
        return read_header(source.path(SINGLE_FILE))
    weight_map = read_json(source.path(INDEX_FILE)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SourceError(f"{source.name}: {INDEX_FILE} has no weight_map of tensor names to file names; download it again")
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise SourceError(f"{source.name}: {INDEX_FILE} names the file {file!r} outside its own folder")
        # A tensor that lies in two files is read from the one that the index names.
        entries |= {name: entry for name, entry in read_header(source.path(file)).items() if weight_map.get(name, file) == file}
    if lost := sorted(set(weight_map) - set(entries)):
        raise SourceError(f"{source.name}: {INDEX_FILE} promises tensor {lost[0]}, which is in none of the files")
    return entries


def _check(where: str, entry: Any, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise ShapeError(f"{where}: tensor {entry.name} has shape {entry.shape}, config.json demands {shape}")
    if not jnp.issubdtype(entry.dtype, jnp.floating):
        raise ArchitectureError(f"{where}: tensor {entry.name} is of {entry.dtype}; quantised weights are not implemented")


def parameter_path(path: tuple[Any, ...]) -> list[str]:
    """Attribute names of a leaf's key path, without list indices and the variable's own `value`."""
    return [key.name for key in path if getattr(key, "name", "value") != "value"]


def _read(parts: list[TensorEntry], place: Placement, dtype: np.dtype, index: Sequence[slice] | None) -> np.ndarray:
    """One device's slice of an array whose tensors are `parts`."""
    assert index is not None
    bounds = [part.indices(size)[:2] for part, size in zip(index, place.stacked + place.shape, strict=True)]
    stacked, rows = bounds[: len(place.stacked)], bounds[len(place.stacked) :]
    whole_columns = all((start, stop) == (0, size) for (start, stop), size in zip(rows[1:], place.shape[1:], strict=True))
    out = _aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
    for target in np.ndindex(*(stop - start for start, stop in stacked)):
        number = int(np.ravel_multi_index([t + start for t, (start, _) in zip(target, stacked, strict=True)], place.stacked)) if stacked else 0
        if whole_columns:
            parts[number].read_rows(out[target], rows[0][0])
        else:
            block = np.empty((rows[0][1] - rows[0][0], *place.shape[1:]), dtype)
            parts[number].read_rows(block, rows[0][0])
            out[target][...] = block[(slice(None), *(slice(*bound) for bound in rows[1:]))]
    return out


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised array at a multiple of 64 bytes, which the CPU backend takes over without a copy.

    Mapped here, not by NumPy, which asks for huge pages: where memory is fragmented, or lent by a hypervisor, the system finds those so slowly that
    loading took four times as long.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size), np.uint8).view(dtype).reshape(shape)


_Sized = TypeVar("_Sized", bound=Any)


def shards_of(tensors: Sequence[_Sized]) -> list[list[_Sized]]:
    """Tensors (whatever has `nbytes`), in their order, in files of a size that tools and hubs take."""
    shards: list[list[_Sized]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def shard_name(number: int, count: int) -> str:
    """File name of the shard of that number, counted from 1."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
