"""Logical axis names of every parameter, and the one table that maps them to mesh axes."""

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qscope_jax.errors import ConfigError

_Tree = TypeVar("_Tree")

# Logical name -> mesh axis, for parameters. `None` is replicated.
PARAMETER_RULES: dict[str, str | None] = {
    "layers": None,
    "vocabulary": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "hidden": "tensor",
    "experts": "expert",
    "features": "tensor",
    "stack": "fsdp",
    "model": None,
    "single": None,
}

# Last component of a parameter's path -> logical names of its trailing dimensions. Leading ones are stacked layers.
PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocabulary", "embed"),
    "head": ("vocabulary", "embed"),
    "final_norm": ("embed",),
    "input_norm": ("embed",),
    "post_attention_norm": ("embed",),
    "mixer_output_norm": ("embed",),
    "feed_forward_output_norm": ("embed",),
    "q_proj": ("heads", "embed"),
    "k_proj": ("kv_heads", "embed"),
    "v_proj": ("kv_heads", "embed"),
    "o_proj": ("embed", "heads"),
    "q_norm": ("head",),
    "k_norm": ("head",),
    "gate_proj": ("hidden", "embed"),
    "up_proj": ("hidden", "embed"),
    "down_proj": ("embed", "hidden"),
    "router": ("experts", "embed"),
    "experts_gate_up_proj": ("experts", "single", "hidden", "embed"),
    "experts_down_proj": ("experts", "embed", "hidden"),
    "shared_gate_proj": ("hidden", "embed"),
    "shared_up_proj": ("hidden", "embed"),
    "shared_down_proj": ("embed", "hidden"),
    "shared_gate": ("single", "embed"),
    # Queries, keys and values lie behind each other in one array, whose equal parts would not be whole heads.
    "in_proj_qkv": ("single", "embed"),
    "conv1d": ("single", "single", "single"),
    "in_proj_z": ("heads", "embed"),
    "in_proj_b": ("heads", "embed"),
    "in_proj_a": ("heads", "embed"),
    "A_log": ("heads",),
    "dt_bias": ("heads",),
    "delta_norm": ("head",),
    "out_proj": ("embed", "heads"),
    # Low-rank updates are small; their weight keeps its own name above them in the path.
    "lora_A": ("single", "single"),
    "lora_B": ("single", "single"),
    "W_enc": ("features", "model"),
    "W_dec": ("features", "model"),
    "b_enc": ("features",),
    "b_dec": ("model",),
    "threshold": ("features",),
}


def partition_spec(logical: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Map logical axis names to a `PartitionSpec` on `mesh`.

    A dimension that its mesh axis does not divide is replicated: a model with two key/value heads runs on four tensor shards.

    Raises:
        ConfigError: two dimensions of one array map to the same mesh axis.
    """
    axes: list[str | None] = []
    for name, size in zip(logical, shape, strict=True):
        axis = PARAMETER_RULES[name] if name is not None else None
        axes.append(axis if axis is not None and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None)
    used = [axis for axis in axes if axis is not None]
    if len(used) != len(set(used)):
        raise ConfigError(f"logical axes {tuple(logical)} map to {tuple(axes)}: one mesh axis cannot split two dimensions")
    return PartitionSpec(*axes)


def parameter_sharding(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Sharding of the parameter called `name` (the last component of its path), with any stacked leading dimensions."""
    logical = PARAMETER_AXES[name]
    stacked = ("layers",) * (len(shape) - len(logical))
    return NamedSharding(mesh, partition_spec((*stacked, *logical), shape, mesh))


def stack_spec(path: Sequence[object]) -> PartitionSpec:
    """Spec of an array of stacked SAEs, or of one that is shaped like it, by its key path: the stack over `fsdp`, features over `tensor`.

    Arrays that are not of a parameter's name hold a number of each SAE, or one of each feature.
    """
    try:
        logical = PARAMETER_AXES[leaf_name(path)]
    except StopIteration:
        logical = ("features",) if any(getattr(key, "name", None) == "tokens_since_fired" for key in path) else ()
    return PartitionSpec(*(PARAMETER_RULES[name] for name in ("stack", *logical)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Sharding of a batch: rows over `data` and `fsdp`, the other dimensions whole."""
    return NamedSharding(mesh, _rows_spec(ndim))


def _rows_spec(ndim: int) -> PartitionSpec:
    return PartitionSpec(("data", "fsdp"), *(None,) * (ndim - 1))


def keep_rows(x: jax.Array, axis: int = 0, *, heads: int | None = None) -> jax.Array:
    """Ask the partitioner to leave a batch's rows where they are, over `data` and `fsdp`, on the mesh that is set.

    Said after every layer: weights and rows share the axis `fsdp`, and the partitioner, left alone, moves activations instead of weights.

    Args:
        x: An array with a dimension of rows.
        axis: That dimension.
        heads: A dimension that lies over `tensor`, if any.
    """
    mesh = jax.sharding.get_abstract_mesh()
    wanted = {axis: ("data", "fsdp")} | ({} if heads is None else {heads: ("tensor",)})
    spec: list[tuple[str, ...] | None] = [None] * x.ndim
    for place, names in wanted.items():
        shards = 1 if mesh.empty else math.prod(mesh.shape.get(name, 1) for name in names)
        if shards > 1 and x.shape[place] % shards == 0:
            spec[place] = names
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x


def place_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch on the mesh; of an array that spans processes each reads only the rows that are its own."""
    sharding = batch_sharding(mesh, rows.ndim)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def on_host(array: jax.Array) -> np.ndarray:
    """A whole array; where its shards lie in several processes, each of them must ask and gets it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def shard_tree(tree: _Tree, mesh: Mesh) -> _Tree:
    """Put every array of a module onto `mesh` by its parameter name."""
    return jax.tree_util.tree_map_with_path(lambda path, x: jax.device_put(x, parameter_sharding(leaf_name(path), x.shape, mesh)), tree)


def leaf_name(path: Sequence[object]) -> str:
    """Parameter name of a leaf: the last attribute of its key path that is not the variable's own `value`."""
    names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
    return next(name for name in reversed(names) if name in PARAMETER_AXES)
