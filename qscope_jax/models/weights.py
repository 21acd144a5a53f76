"""Hugging Face checkpoints: one invertible table of names, read and written by streaming slices."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

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
_CARRIED_TENSORS = {family: ("model.visual.", "mtp.") for family in NAME_TABLES if family.startswith("qwen3_5")}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 5_000_000_000
_CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json",
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
    parameter = _parameter(path)
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


def carried_tensors(names: Iterable[str], config: ModelConfig) -> list[str]:
    """Those tensors of a checkpoint, sorted, that a decoder of this family leaves out and an export carries over unchanged."""
    return sorted(name for name in names if name.startswith(_CARRIED_TENSORS.get(config.family, ("\0",))))


def _prefix(family: str) -> str:
    return NAME_TABLES[family]["final_norm"].removesuffix("norm.weight")


def read_config(source: Source) -> ModelConfig:
    """Config of the checkpoint at `source`; stop tokens of `generation_config.json` are added to those of the config."""
    config = ModelConfig.from_hf(read_json(source.path("config.json")))
    if "moe" in config.feed_forwards and config.family in _CARRIED_TENSORS:
        config = replace(config, fused_experts=any(name.endswith(".mlp.experts.gate_up_proj") for name in _entries(source)))
    if not source.has("generation_config.json"):
        return config
    eos = read_json(source.path("generation_config.json")).get("eos_token_id")
    extra = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra))))


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
    if config.tie_embeddings:
        entries.pop("lm_head.weight", None)
    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    plan = [placement(path, leaf.shape, config) for path, leaf in leaves]
    expected = {name for place in plan for name in place.names}
    if missing := sorted(expected - set(entries)):
        raise SourceError(f"{source.name}: {len(missing)} tensors are missing, first {missing[0]}; a file is absent or config.json of another model")
    if extra := sorted(set(entries) - expected - set(carried_tensors(entries, config))):
        raise ArchitectureError(f"{source.name}: {len(extra)} tensors have no place in a {config.family} decoder, first {extra[0]}; none is ignored")
    for place in plan:
        for name in place.names:
            _check(source, entries[name], place.disk_shape)

    def make(item: tuple[tuple[Any, jax.ShapeDtypeStruct], Placement]) -> jax.Array:
        (path, leaf), place = item
        sharding = parameter_sharding(_parameter(path)[-1], leaf.shape, mesh)
        parts = [entries[name] for name in place.names]
        own = reduce(jnp.promote_types, [part.dtype for part in parts])
        dtype = own if keep_dtypes and own.name in DTYPES else np.dtype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: _read(parts, place, dtype, index))

    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(make, zip(leaves, plan, strict=True)))
    return jax.tree_util.tree_unflatten(tree, arrays)


def save_decoder(decoder: Decoder, path: Path, *, carry_from: Source | None = None) -> None:
    """Write a Hugging Face folder: sharded safetensors, index, config, and the tokenizer files of `carry_from`.

    Tensors of `carry_from` that the decoder leaves out are carried over. The folder appears whole or not at all; one tensor is in host
    memory at a time.

    Raises:
        SourceError: `path` is a folder of something else, which would be lost, or cannot be written to.
    """
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise SourceError(f"{path}: is a folder that holds something else than a model; choose a new or empty one")
    config = decoder.config
    leaves, _ = jax.tree_util.tree_flatten_with_path(decoder)
    tensors = []
    for path_, leaf in leaves:
        place = placement(path_, leaf.shape, config)
        parts = [_Part(leaf, place.index(number)) for number in range(len(place.names))]
        tensors += [_Tensor(name, place.disk_shape, np.dtype(leaf.dtype), part) for name, part in zip(place.names, parts, strict=True)]
    if carry_from is not None and config.family in _CARRIED_TENSORS:
        entries = _entries(carry_from)
        tensors += [_Tensor(name, entries[name].shape, entries[name].dtype, entries[name].read) for name in carried_tensors(entries, config)]
    tensors.sort(key=lambda tensor: tensor.name)
    with atomic_path(path, directory=True) as folder:
        shards = _shards(tensors)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(folder / file, [(tensor.name, tensor.shape, tensor.dtype) for tensor in shard], (tensor.read() for tensor in shard))
            weight_map |= {tensor.name: file for tensor in shard}
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors)
            write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(folder / "config.json", config.to_hf())
        for name in _CARRIED:
            if carry_from is not None and carry_from.has(name):
                shutil.copyfile(carry_from.path(name), folder / name)


def _entries(source: Source) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint, from its index or its single file."""
    if not source.has(_INDEX):
        if not source.has(_SINGLE):
            raise SourceError(f"{source.name}: neither {_INDEX} nor {_SINGLE}; expected a Hugging Face folder with safetensors weights")
        return read_header(source.path(_SINGLE))
    weight_map = read_json(source.path(_INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SourceError(f"{source.name}: {_INDEX} has no weight_map of tensor names to file names; download it again")
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise SourceError(f"{source.name}: {_INDEX} names the file {file!r} outside its own folder")
        # A tensor that lies in two files is read from the one that the index names.
        entries |= {name: entry for name, entry in read_header(source.path(file)).items() if weight_map.get(name, file) == file}
    if lost := sorted(set(weight_map) - set(entries)):
        raise SourceError(f"{source.name}: {_INDEX} promises tensor {lost[0]}, which is in none of the files")
    return entries


def _check(source: Source, entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise ShapeError(f"{source.name}: tensor {entry.name} has shape {entry.shape}, config.json demands {shape}")
    if not jnp.issubdtype(entry.dtype, jnp.floating):
        raise ArchitectureError(f"{source.name}: tensor {entry.name} is of {entry.dtype}; quantised weights are not implemented")


def _parameter(path: tuple[Any, ...]) -> list[str]:
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
    """Uninitialised array at a multiple of 64 bytes, which the CPU backend takes over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write, read when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class _Part:
    """A part of an array on the devices, brought to the host when called."""

    array: Any
    index: tuple[int, ...]

    def __call__(self) -> np.ndarray:
        return np.asarray(self.array[self.index] if self.index else self.array)


def _shards(tensors: list[_Tensor]) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
