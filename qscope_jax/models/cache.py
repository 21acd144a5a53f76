"""What a decoder remembers between calls."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from qscope_jax.models.config import ModelConfig
from qscope_jax.parallel.rules import keep_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """State of a batch of sequences, returned anew by every call.

    After `init_cache` all rows write at the same slot: prompts are padded on the left, so that their last tokens align. Where `slot` is one for
    each row, a row's tokens lie in its first slots without gaps, so that what it computes does not depend on when it began.

    Attributes:
        layers: State of each layer of the period, as its mixer defines it, with a leading axis of R repeats.
        segment_ids_BS: Segment of each slot; 0 marks padding and slots not written yet.
        slot: Next slot to write: one for all rows, or one for each, which moves on with its row's tokens alone.
        lengths_B: Tokens read so far in each row, padding not counted: the position of the next one.
        prompt_lengths_B: Tokens of each row's prompt, by which phases are told apart; where 0, those of the first call.
    """

    layers: tuple[Any, ...]
    segment_ids_BS: Int[Array, "B S"]
    slot: Int[Array, ""] | Int[Array, " B"]
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


def align_left(cache: Cache) -> Cache:
    """A cache of prompts that were padded on the left, with every row's tokens in its first slots and a slot for each row."""
    slots = cache.segment_ids_BS.shape[1]
    # What a row has in front of its tokens goes to its end; slots behind those written hold nothing.
    from_BS = (jnp.arange(slots, dtype=jnp.int32) + (cache.slot - cache.lengths_B)[:, None]) % slots

    def moved(layer: KeyValues | DeltaState) -> KeyValues | DeltaState:
        if isinstance(layer, DeltaState):
            return layer
        index = from_BS[None, :, None, :, None]
        return KeyValues(jnp.take_along_axis(layer.k_RBGSC, index, axis=3), jnp.take_along_axis(layer.v_RBGSC, index, axis=3))

    ids_BS = jnp.take_along_axis(cache.segment_ids_BS, from_BS, axis=1)
    return replace(cache, layers=tuple(moved(layer) for layer in cache.layers), segment_ids_BS=ids_BS, slot=cache.lengths_B)


def copy_rows(cache: Cache, source: Cache, chosen_B: Int[Array, " B"]) -> Cache:
    """A cache in which row b begins anew with row `chosen_B[b]` of another, or stays as it is where that is negative.

    Args:
        cache: With a slot for each row.
        source: The same, of no more slots.
        chosen_B: Rows of `source`.
    """
    new_B = chosen_B >= 0
    rows_B = jnp.maximum(chosen_B, 0)

    def copied(old: Array, other: Array, axis: int) -> Array:
        # A row is written up to the slots that the other cache has; what it had behind them is marked as empty by its segment ids.
        taken = jnp.take(other, rows_B, axis=axis)
        begin = old[tuple(slice(size) for size in taken.shape)]
        new = new_B.reshape((-1,) + (1,) * (old.ndim - axis - 1))
        return jax.lax.dynamic_update_slice(old, jnp.where(new, taken, begin), (0,) * old.ndim)

    ids_ES = jnp.pad(source.segment_ids_BS, ((0, 0), (0, cache.segment_ids_BS.shape[1] - source.segment_ids_BS.shape[1])))
    return Cache(
        jax.tree.map(lambda old, other: copied(old, other, 1), cache.layers, source.layers),
        copied(cache.segment_ids_BS, ids_ES, 0),
        *(copied(getattr(cache, name), getattr(source, name), 0) for name in ("slot", "lengths_B", "prompt_lengths_B")),
    )


def keep_cache_rows(cache: Cache) -> Cache:
    """`keep_rows` for a cache with a slot for each row; heads lie over `tensor`, as their weights do."""

    def kept(layer: KeyValues | DeltaState) -> KeyValues | DeltaState:
        if isinstance(layer, DeltaState):
            return DeltaState(keep_rows(layer.memory, 1, heads=2), keep_rows(layer.inputs, 1))
        return KeyValues(keep_rows(layer.k_RBGSC, 1, heads=2), keep_rows(layer.v_RBGSC, 1, heads=2))

    rest = {name: keep_rows(getattr(cache, name)) for name in ("segment_ids_BS", "slot", "lengths_B", "prompt_lengths_B")}
    return Cache(layers=tuple(kept(layer) for layer in cache.layers), **rest)


def _empty(config: ModelConfig, mixer: str, batch: int, slots: int) -> KeyValues | DeltaState:
    if mixer == "gated_delta":
        heads = (config.delta_key_heads, config.delta_value_heads // config.delta_key_heads)
        channels = 2 * config.delta_key_heads * config.delta_key_dim + config.delta_value_heads * config.delta_value_dim
        memory = jnp.zeros((config.repeats, batch, *heads, config.delta_key_dim, config.delta_value_dim), jnp.float32)
        return DeltaState(memory, jnp.zeros((config.repeats, batch, config.delta_conv - 1, channels), config.dtype))
    shape = (config.repeats, batch, config.num_kv_heads, slots, config.head_dim)
    return KeyValues(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
