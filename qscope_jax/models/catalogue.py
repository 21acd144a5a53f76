"""How large models are, counted from their configs: nothing is downloaded and no array is made."""

import math
from dataclasses import dataclass, replace

import jax

from qscope_jax.models.cache import init_cache
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.published import PUBLISHED


@dataclass(frozen=True)
class ModelSize:
    """What a model takes.

    Attributes:
        name: Of the model.
        family: `model_type` of its config.
        num_layers: Layers L.
        d_model: Model width D.
        parameters: Numbers in all its arrays; a tied embedding counts once.
        bytes_bfloat16: The same in bytes, two each.
        cache_bytes_per_token: What each token of a sequence adds to the cache, in bfloat16.
        state_bytes: What a sequence takes however long it is: recurrent states.
    """

    name: str
    family: str
    num_layers: int
    d_model: int
    parameters: int
    bytes_bfloat16: int
    cache_bytes_per_token: int
    state_bytes: int


def model_size(name: str, config: ModelConfig) -> ModelSize:
    """Count a decoder's parameters and its cache."""
    config = replace(config, dtype="bfloat16")
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))))
    one, two = (_cache_bytes(config, slots) for slots in (1, 2))
    return ModelSize(name, config.family, config.num_layers, config.d_model, parameters, 2 * parameters, two - one, 2 * one - two)


def published_sizes() -> dict[str, ModelSize]:
    """Sizes of the published models by name."""
    return {name: model_size(name, ModelConfig.from_hf(config)) for name, config in PUBLISHED.items()}


def _cache_bytes(config: ModelConfig, slots: int) -> int:
    leaves = jax.eval_shape(lambda: jax.tree.leaves(init_cache(config, 1, slots).layers))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
