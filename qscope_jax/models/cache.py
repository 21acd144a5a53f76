"""What a decoder remembers between calls."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from qscope_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """State of a batch of sequences, returned anew by every call.

    All rows write at the same slot: prompts are padded on the left, so that their last tokens align.

    Attributes:
        layers: State of each layer of the period, as its mixer defines it, with a leading axis of R repeats.
        segment_ids_BS: Segment of each slot; 0 marks padding and slots not written yet.
        slot: Next slot to write, the same for all rows; 0 until the prompt has been read, which is how phases are told apart.
        lengths_B: Tokens read so far in each row, padding not counted: the position of the next one.
        prompt_lengths_B: The same after the first call.
    """

    layers: tuple[Any, ...]
    segment_ids_BS: Int[Array, "B S"]
    slot: Int[Array, ""]
    lengths_B: Int[Array, " B"]
    prompt_lengths_B: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Keys and values of an attention layer, heads before slots so that no step transposes the whole cache."""

    k_RBGSC: Array
    v_RBGSC: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeltaState:
    """State of a gated delta net.

    Attributes:
        memory: [R, B, G, J, key, value] in float32, J value heads to each of G key heads.
        inputs: What the short convolution still sees, [R, B, slots, channels].
    """

    memory: Array
    inputs: Array


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens, prompt padding included."""
    layers = tuple(_empty(config, mixer, batch, slots) for mixer in config.mixers[: config.period])
    zeros = jnp.zeros((batch,), jnp.int32)
    return Cache(layers, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32), zeros, zeros)


def _empty(config: ModelConfig, mixer: str, batch: int, slots: int) -> KeyValues | DeltaState:
    if mixer == "gated_delta":
        heads = (config.delta_key_heads, config.delta_value_heads // config.delta_key_heads)
        channels = 2 * config.delta_key_heads * config.delta_key_dim + config.delta_value_heads * config.delta_value_dim
        memory = jnp.zeros((config.repeats, batch, *heads, config.delta_key_dim, config.delta_value_dim), jnp.float32)
        return DeltaState(memory, jnp.zeros((config.repeats, batch, config.delta_conv - 1, channels), config.dtype))
    shape = (config.repeats, batch, config.num_kv_heads, slots, config.head_dim)
    return KeyValues(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
