"""Hugging Face checkpoints: one invertible table of names, read and written by streaming slices."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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

# Tree path -> Hugging Face name, `{}` standing for the layer. Weights are kept as they lie on disk ([out, in]), so the table needs
# neither transposes nor splits and reads both ways.
_QWEN3 = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "layers.input_norm": "model.layers.{}.input_layernorm.weight",
    "layers.post_attention_norm": "model.layers.{}.post_attention_layernorm.weight",
    **{f"layers.mixer.{name}": f"model.layers.{{}}.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{f"layers.feed_forward.{name}": f"model.layers.{{}}.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
}
NAME_TABLES: dict[str, dict[str, str]] = {"qwen3": _QWEN3}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 5_000_000_000
_CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json",
            "chat_template.jinja", "generation_config.json")  # fmt: skip


def read_config(source: Source) -> ModelConfig:
    """Config of the checkpoint at `source`; stop tokens of `generation_config.json` are added to those of the config."""
    config = ModelConfig.from_hf(read_json(source.path("config.json")))
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
    plan = [_hf_names(path, leaf.shape, config) for path, leaf in leaves]
    expected = {name for names in plan for name in names}
    if missing := sorted(expected - set(entries)):
        raise SourceError(f"{source.name}: {len(missing)} tensors are missing, first {missing[0]}; a file is absent or config.json of another model")
    if extra := sorted(set(entries) - expected):
        raise ArchitectureError(f"{source.name}: {len(extra)} tensors have no place in a {config.family} decoder, first {extra[0]}; none is ignored")
    for (_, leaf), names in zip(leaves, plan, strict=True):
        for name in names:
            _check(source, entries[name], _tensor_shape(name, leaf))

    def make(item: tuple[tuple[Any, jax.ShapeDtypeStruct], list[str]]) -> jax.Array:
        (path, leaf), names = item
        sharding = parameter_sharding(_parameter(path)[-1], leaf.shape, mesh)
        parts = [entries[name] for name in names]
        own = reduce(jnp.promote_types, [part.dtype for part in parts])
        dtype = own if keep_dtypes and own.name in DTYPES else np.dtype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: _read(parts, leaf.shape, dtype, index))

    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(make, zip(leaves, plan, strict=True)))
    return jax.tree_util.tree_unflatten(tree, arrays)


def save_decoder(decoder: Decoder, path: Path, *, carry_from: Source | None = None) -> None:
    """Write a Hugging Face folder: sharded safetensors, index, config, and the tokenizer files of `carry_from`.

    The folder appears whole or not at all; one tensor is in host memory at a time.

    Raises:
        SourceError: `path` is a folder of something else, which would be lost, or cannot be written to.
    """
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise SourceError(f"{path}: is a folder that holds something else than a model; choose a new or empty one")
    config = decoder.config
    leaves, _ = jax.tree_util.tree_flatten_with_path(decoder)
    tensors = [(name, leaf, repeat) for key, leaf in leaves for repeat, name in enumerate(_hf_names(key, leaf.shape, config))]
    tensors.sort(key=lambda item: item[0])
    with atomic_path(path, directory=True) as folder:
        shards = _shards(tensors)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            plan = [(name, _tensor_shape(name, leaf), np.dtype(leaf.dtype)) for name, leaf, _ in shard]
            write_file(folder / file, plan, (_host(name, leaf, repeat) for name, leaf, repeat in shard))
            weight_map |= {name: file for name, _, _ in shard}
        if len(shards) > 1:
            total = sum(int(np.prod(_tensor_shape(n, leaf))) * leaf.dtype.itemsize for n, leaf, _ in tensors)
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


def _hf_names(path: tuple[Any, ...], shape: tuple[int, ...], config: ModelConfig) -> list[str]:
    """Hugging Face names of a leaf: one, or one for each repeat of its layer."""
    pattern = NAME_TABLES[config.family][".".join(_parameter(path))]
    if "{}" not in pattern:
        return [pattern]
    place = next(index for key in path if isinstance(index := getattr(key, "key", getattr(key, "idx", None)), int))
    return [pattern.format(repeat * config.period + place) for repeat in range(shape[0])]


def _read(parts: list[TensorEntry], shape: tuple[int, ...], dtype: np.dtype, index: Sequence[slice] | None) -> np.ndarray:
    """One device's slice of a leaf; `parts` has one tensor for each repeat when the leaf is stacked."""
    assert index is not None
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    stacked = len(shape) > len(parts[0].shape)
    rows = bounds[1:] if stacked else bounds
    whole_columns = all((start, stop) == (0, size) for (start, stop), size in zip(rows[1:], parts[0].shape[1:], strict=True))
    out = _aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
    for target, part in zip(out if stacked else [out], parts[slice(*bounds[0])] if stacked else parts, strict=True):
        if whole_columns:
            part.read_rows(target, rows[0][0])
        else:
            block = np.empty((rows[0][1] - rows[0][0], *part.shape[1:]), dtype)
            part.read_rows(block, rows[0][0])
            target[...] = block[(slice(None), *(slice(*bound) for bound in rows[1:]))]
    return out


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised array at a multiple of 64 bytes, which the CPU backend takes over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _tensor_shape(name: str, leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape[1:] if ".layers." in name else leaf.shape)


def _host(name: str, leaf: Any, repeat: int) -> np.ndarray:
    return np.asarray(leaf[repeat] if ".layers." in name else leaf)


def _shards(tensors: list[tuple[str, Any, int]]) -> list[list[tuple[str, Any, int]]]:
    shards: list[list[tuple[str, Any, int]]] = [[]]
    size = 0
    for item in tensors:
        nbytes = int(np.prod(_tensor_shape(item[0], item[1]), dtype=np.int64)) * item[1].dtype.itemsize
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += nbytes
    return shards
