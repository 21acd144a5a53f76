"""The two programs of SAE training, as they would run on a mesh: the model's pass up to the highest tapped layer, and the SAEs' step.

Everything is abstract: shapes, dtypes and shardings; no array is made and no checkpoint is read.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qscope_jax.cli.train_sae import Config, sae_config
from qscope_jax.data.files import read_json
from qscope_jax.errors import ConfigError
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.published import PUBLISHED
from qscope_jax.parallel.rules import batch_sharding, leaf_name, parameter_sharding, replicated
from qscope_jax.training.activations import buffer_spec
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.sae_step import SAEStep


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config of `qscope train-sae` trains, on a mesh.

    Attributes:
        config: The verb's options.
        model: The backbone's config.
        sae: Size and training of the SAEs.
        layers: Tapped layers.
        mesh: Devices.
    """

    config: Config
    model: ModelConfig
    sae: SAEConfig
    layers: tuple[int, ...]
    mesh: Mesh

    @property
    def num_saes(self) -> int:
        """SAEs trained: one for each layer and seed."""
        return len(self.layers) * self.sae.num_seeds

    @property
    def rows(self) -> int:
        """Rows of a lane of the activation buffer: what it holds mixed, and room for one pass of the model."""
        config = self.config
        return (config.batch_tokens * config.buffer_batches + config.model_batch * config.sequence_length) // config.lanes


def make_run(config: Config, mesh: Mesh) -> Run:
    """Read a run from the verb's options.

    Raises:
        QscopeError: no such model or layer, sizes that the mesh does not divide, or a run from a cache, which needs no model.
    """
    if config.activations:
        raise ConfigError(f"activations is {config.activations}; only runs that make their activations are planned, leave it out")
    model = backbone(config.model, config.dtype)
    layers = tuple(range(model.num_layers)) if config.layers is None else config.layers
    if outside := [layer for layer in layers if not 0 <= layer < model.num_layers]:
        raise ConfigError(f"layer {outside[0]} is out of range; {config.model} has layers 0 to {model.num_layers - 1}")
    sae = sae_config(config, model.d_model)
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    for name, size, divisor, why in (
        ("model_batch", config.model_batch, data * fsdp, "rows lie over data and fsdp"),
        ("model_batch", config.model_batch, config.lanes, "a lane has whole rows"),
        ("batch_tokens", config.batch_tokens, config.lanes, "every lane gives as many tokens"),
        ("lanes", config.lanes, data, "lanes lie over data"),
        ("layers", len(layers), fsdp, "SAEs lie over fsdp"),
        ("num_features", sae.num_features, tensor, "features lie over tensor"),
    ):
        if size % divisor:
            raise ConfigError(f"{name} is {size}, expected a multiple of {divisor} on this mesh ({why}); change it or the mesh")
    return Run(config, model, sae, layers, mesh)


def backbone(name: str, dtype: str | None) -> ModelConfig:
    """The config of a folder's model, or of a published one by its name; nothing is downloaded.

    Raises:
        QscopeError: the folder's config.json cannot be read, or the name is not known.
    """
    path = Path(name).expanduser()
    if path.exists():
        hf = read_json(path if path.is_file() else path / "config.json")
    else:
        known = {one.lower(): one for one in PUBLISHED}.get(name.rsplit("/", 1)[-1].removesuffix("-Base").lower())
        if known is None:
            raise ConfigError(f"model {name}: no such folder, and no config is known here; known are {', '.join(PUBLISHED)}, or give a config.json")
        hf = PUBLISHED[known]
    config = ModelConfig.from_hf(hf)
    return config if dtype is None else dataclasses.replace(config, dtype=dtype)


def decoder_arrays(model: ModelConfig, mesh: Mesh) -> Decoder:
    """The decoder's parameters, placed as a loaded model's are."""
    abstract = jax.eval_shape(lambda: Decoder(model, jax.random.key(0)))

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parameter_sharding(leaf_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, abstract)


def buffer_array(run: Run) -> jax.ShapeDtypeStruct:
    """The activation buffer [M, lanes, rows, D]."""
    sharding = NamedSharding(run.mesh, buffer_spec(run.mesh, len(run.layers)))
    shape = (len(run.layers), run.config.lanes, run.rows, run.model.d_model)
    return jax.ShapeDtypeStruct(shape, run.model.dtype, sharding=sharding)


def lower_model(run: Run, decoder: Decoder) -> jax.stages.Lowered:
    """The pass that feeds all SAEs: tokens in, residual streams of the tapped layers out."""
    shape = (run.config.model_batch, run.config.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(run.mesh, 2))
    taps = jax.ShapeDtypeStruct((len(run.layers),), jnp.int32, sharding=replicated(run.mesh))
    highest = max(run.layers)

    def residuals(decoder: Decoder, tokens_BT: Any, segment_ids: Any, taps: Any) -> Any:
        return decoder(tokens_BT, segment_ids=segment_ids, taps=taps, stop_after=highest).residuals

    with jax.set_mesh(run.mesh):
        return jax.jit(residuals).lower(decoder, tokens, tokens, taps)


def lower_sae(run: Run) -> tuple[jax.stages.Lowered, Any]:
    """The training step of all SAEs, and their state."""
    width = run.model.d_model
    step = SAEStep(run.sae, run.sae.aux_slots(width), run.mesh)
    state = step.abstract_state(run.num_saes, width)
    return step.lower(run.num_saes, width, run.config.batch_tokens, jnp.dtype(run.model.dtype)), state


def batch_bytes(run: Run) -> int:
    """Bytes of a device's share of a batch of activations."""
    parts = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    return len(run.layers) * run.config.batch_tokens * run.model.d_model * jnp.dtype(run.model.dtype).itemsize // parts


def bytes_a_device(tree: Any) -> int:
    """Bytes that the largest shards of a tree of placed arrays take on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
