"""The one decoder: tokens in, logits and chosen residual streams out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qscope_jax.errors import InputError
from qscope_jax.models.attention import Attention, Documents, SequenceContext, causal_mask
from qscope_jax.models.cache import Cache
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.delta_net import GatedDeltaNet
from qscope_jax.models.edits import Edit, EditContext, apply_edits
from qscope_jax.models.experts import MixtureOfExperts
from qscope_jax.models.feedforward import GatedMLP
from qscope_jax.models.linear import linear, rms_norm, soft_cap
from qscope_jax.models.rotary import rotary_tables
from qscope_jax.parallel.rules import keep_rows

_MIXERS = {"full_attention": Attention, "sliding_attention": partial(Attention, sliding=True), "gated_delta": GatedDeltaNet}
_FEED_FORWARDS = {"dense": GatedMLP, "moe": MixtureOfExperts}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass returns.

    Attributes:
        logits: Scores over the vocabulary, float32; one position a row when only the last was asked for; None with `stop_after`.
        residuals: Residual stream after each tapped layer, in the order of `taps`; None without taps.
        cache: The continued cache, or None.
    """

    logits: Float[Array, "B T V"] | None
    residuals: Float[Array, "M B T D"] | None
    cache: Cache | None


class Layer(nnx.Module):
    """One decoder block: norm, mixer [, norm], residual add, norm, feed-forward [, norm], residual add."""

    def __init__(self, config: ModelConfig, kind: int, key: jax.Array):
        """Random weights for the layer at place `kind` of the period."""
        mixer_key, feed_forward_key = jax.random.split(key)
        self.norm_eps, self.unit_offset_norms = config.norm_eps, config.unit_offset_norms
        self.input_norm = _first_gain(config)
        self.mixer = _MIXERS[config.mixers[kind]](config, mixer_key)
        self.post_attention_norm = _first_gain(config)
        self.feed_forward = _FEED_FORWARDS[config.feed_forwards[kind]](config, feed_forward_key)
        if config.output_norms:
            self.mixer_output_norm, self.feed_forward_output_norm = _first_gain(config), _first_gain(config)

    def __call__(self, x_BTD: Array, context: SequenceContext, cache: Any, repeat: Int[Array, ""] | int) -> tuple[Array, Any]:
        """The residual stream after this block, and the mixer's updated cache."""
        mixed, cache = self.mixer(self._norm("input_norm", x_BTD), context, cache, repeat)
        x_BTD = x_BTD + self._norm("mixer_output_norm", mixed)
        fed = self.feed_forward(self._norm("post_attention_norm", x_BTD))
        return x_BTD + self._norm("feed_forward_output_norm", fed), cache

    def _norm(self, name: str, x_BTD: Array) -> Array:
        """The norm of that name, which leaves x as it is where the family has none."""
        gain = getattr(self, name, None)
        return x_BTD if gain is None else rms_norm(x_BTD, gain[...], self.norm_eps, self.unit_offset_norms)


def _first_gain(config: ModelConfig) -> nnx.Param:
    return nnx.Param((jnp.zeros if config.unit_offset_norms else jnp.ones)((config.d_model,), config.dtype))


class Decoder(nnx.Module):
    """A decoder-only transformer, a stateless pytree of parameters.

    `layers` holds one module for each place of the layer period; its arrays carry a leading axis of R repeats, over which a scan runs.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        """Random weights, for training from scratch, tests and (under `jax.eval_shape`) the abstract model."""
        embed_key, head_key, layer_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.d_model)
        self.config = config
        self.embedding = nnx.Param((jax.random.normal(embed_key, shape, jnp.float32) * 0.02).astype(config.dtype))
        if not config.tie_embeddings:
            self.head = nnx.Param((jax.random.normal(head_key, shape, jnp.float32) * 0.02).astype(config.dtype))
        self.final_norm = _first_gain(config)
        keys = jax.random.split(layer_key, (config.period, config.repeats))
        self.layers = nnx.List([jax.vmap(lambda k, kind=kind: Layer(config, kind, k))(keys[kind]) for kind in range(config.period)])

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        edits: Sequence[Edit] = (),
        taps: Int[Array, " M"] | Int[np.ndarray, " M"] | None = None,
        stop_after: int | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> DecoderOutput:
        """Run the decoder.

        Args:
            tokens_BT: Token ids.
            positions: Rotary positions; by default they count from 0 in every segment (and go on from the cache).
            segment_ids: Document of each token, 0 for padding; tokens see only their own document. Default: one document a row.
            cache: State to continue from, see `init_cache`; rows must then be padded on the left.
            edits: Interventions, applied after each layer in order.
            taps: Distinct layers whose residual stream is returned (after both residual adds, after edits, before the final norm).
                Values, not shape, choose the layers: changing them compiles nothing. As a NumPy array they are constants of the program, and
                where layers are not scanned their streams are kept as they are, without a buffer.
            stop_after: Layer above which nothing is computed (and no logits). Static: each value compiles once.
            logits: `last` scores only the last position.

        Raises:
            InputError: `stop_after` is not a layer.
        """
        if stop_after is not None and not 0 <= stop_after < self.config.num_layers:
            raise InputError(f"stop_after={stop_after} is out of range; the decoder has layers 0 to {self.config.num_layers - 1}")
        segment_ids = jnp.ones_like(tokens_BT) if segment_ids is None else segment_ids
        context, edit_context, cache = self._prepare(segment_ids, positions, cache, bool(edits))
        x_BTD = self.embedding[...][tokens_BT].astype(self.config.dtype)
        if self.config.scale_embeddings:
            x_BTD *= jnp.asarray(math.sqrt(self.config.d_model), x_BTD.dtype)
        x_BTD = keep_rows(x_BTD)
        buffer, rows_L = None, None
        if isinstance(taps, np.ndarray) and self.config.repeats == 1:
            buffer = _Kept(taps.tolist(), jnp.zeros_like(x_BTD))
        elif taps is not None:
            buffer = jnp.zeros((taps.shape[0] + 1, *x_BTD.shape), x_BTD.dtype)
            rows_L = _tap_rows(jnp.asarray(taps), self.config.num_layers)
        run = _Run(self.config, context, edit_context, tuple(edits), rows_L)
        x_BTD, buffer, states = run.layers(self.layers, x_BTD, buffer, None if cache is None else cache.layers, stop_after)
        if cache is not None and states is not None:
            cache = Cache(states, cache.segment_ids_BS, cache.slot, cache.lengths_B, cache.prompt_lengths_B)
        residuals = buffer.stacked() if isinstance(buffer, _Kept) else None if buffer is None else buffer[:-1]
        if stop_after is not None:
            return DecoderOutput(None, residuals, cache)
        return DecoderOutput(self.unembed(x_BTD[:, -1:] if logits == "last" else x_BTD), residuals, cache)

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and vocabulary scores of a residual stream, in float32."""
        normed = rms_norm(x_BTD, self.final_norm[...], self.config.norm_eps, self.config.unit_offset_norms)
        table = self.embedding if self.config.tie_embeddings else self.head
        return soft_cap(linear(normed, table[...]).astype(jnp.float32), self.config.logit_softcap)

    def _prepare(
        self, segment_ids: Array, positions: Array | None, cache: Cache | None, edited: bool
    ) -> tuple[SequenceContext, EditContext | None, Cache | None]:
        """Everything the layers share: positions, mask, write slot, and the cache with this call's tokens entered."""
        config = self.config
        valid_BT = segment_ids > 0
        local_BT = _positions(segment_ids)
        documents = _documents(segment_ids, cache, config.delta_conv - 1) if "gated_delta" in config.mixers else None
        if cache is None:
            slot, keys_BS = jnp.zeros((), jnp.int32), segment_ids
            lengths_BT = _segment_lengths(segment_ids, local_BT) if edited else local_BT
        else:
            slot = cache.slot
            local_BT = local_BT + cache.lengths_B[:, None]
            count_B = jnp.sum(valid_BT, axis=1, dtype=jnp.int32)
            lengths_B = cache.lengths_B + count_B
            prompt_B = jnp.where(cache.prompt_lengths_B > 0, cache.prompt_lengths_B, lengths_B)
            lengths_BT = jnp.broadcast_to(prompt_B[:, None], segment_ids.shape)
            if slot.ndim == 0:
                keys_BS = jax.lax.dynamic_update_slice(cache.segment_ids_BS, segment_ids, (0, slot))
            else:
                rows_B1, slots_BT = jnp.arange(len(slot), dtype=jnp.int32)[:, None], slot[:, None] + jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
                keys_BS = cache.segment_ids_BS.at[rows_B1, slots_BT].set(segment_ids, unique_indices=True)
            cache = Cache(cache.layers, keys_BS, slot + (segment_ids.shape[1] if slot.ndim == 0 else count_B), lengths_B, prompt_B)
        positions = local_BT if positions is None else positions
        cos, sin = rotary_tables(positions, config.rotary_width, config.rope_theta, config.rope_scaling)
        window = causal_mask(segment_ids, keys_BS, slot, config.sliding_window) if "sliding_attention" in config.mixers else None
        context = SequenceContext(cos, sin, causal_mask(segment_ids, keys_BS, slot), window, slot, documents)
        return context, EditContext(local_BT, lengths_BT, valid_BT) if edited else None, cache


class _Kept:
    """Streams of layers that are known when a program is traced: the compiler sees through the stack and the slices that users take of it."""

    def __init__(self, layers: Sequence[int], nothing: Array):
        self._streams = dict.fromkeys(layers, nothing)

    def keep(self, layer: int, x: Array) -> None:
        """Keep a stream, if it was asked for."""
        if layer in self._streams:
            self._streams[layer] = x

    def stacked(self) -> Array:
        """All of them, in the order asked for; zeros where a layer was not reached."""
        return jnp.stack(list(self._streams.values()))


@dataclass(frozen=True)
class _Run:
    """The loop over layers of one call."""

    config: ModelConfig
    context: SequenceContext
    edit_context: EditContext | None
    edits: tuple[Edit, ...]
    rows_L: Array | None

    def layers(
        self, layers: Any, x: Array, buffer: Array | _Kept | None, states: Any, stop_after: int | None
    ) -> tuple[Array, Array | _Kept | None, Any]:
        """Run layers 0 to `stop_after` (all of them when None)."""
        period, repeats = self.config.period, self.config.repeats
        count = self.config.num_layers if stop_after is None else stop_after + 1
        whole, rest = divmod(count, period)
        carry = (x, buffer, states)
        if repeats == 1 or whole == 0:
            return self._period([_at(layer, 0) for layer in layers], carry, 0, min(count, period))

        def body(carry: Any, step: Any) -> tuple[Any, None]:
            repeat, weights = step
            weights = [_at(layer, repeat) for layer in layers] if weights is None else list(weights)
            return self._period(weights, carry, repeat, period), None

        body = jax.checkpoint(body, prevent_cse=False) if self.config.remat else body
        indices = jnp.arange(whole, dtype=jnp.int32)
        # A shortened loop indexes the whole stack: slicing off a prefix would copy the weights.
        carry, _ = jax.lax.scan(body, carry, (indices, tuple(layers) if whole == repeats else None))
        return self._period([_at(layer, whole) for layer in layers[:rest]], carry, jnp.int32(whole), rest) if rest else carry

    def _period(self, layers: Sequence[Any], carry: Any, repeat: Array | int, count: int) -> Any:
        """Run the first `count` layers of one period."""
        x, buffer, states = carry
        states = None if states is None else list(states)
        for place, layer in enumerate(layers[:count]):
            index = jnp.asarray(repeat * self.config.period + place, jnp.int32)
            call = jax.checkpoint(layer.__call__) if self.config.remat and self.config.repeats == 1 else layer
            x, state = call(x, self.context, None if states is None else states[place], repeat)
            if states is not None:
                states[place] = state
            x = keep_rows(apply_edits(x, self.edits, index, self.edit_context))
            if isinstance(buffer, _Kept):
                buffer.keep(place, x)  # no scan: the place in the period is the layer
            elif buffer is not None and self.rows_L is not None:
                buffer = jax.lax.dynamic_update_index_in_dim(buffer, x, self.rows_L[index], 0)
        return x, buffer, None if states is None else tuple(states)


def _at(layer: Any, repeat: Array | int) -> Any:
    return jax.tree.map(lambda x: x[repeat] if not isinstance(repeat, int) or x.shape[0] > 1 else x.reshape(x.shape[1:]), layer)


def _tap_rows(taps: Int[Array, " M"], num_layers: int) -> Int[Array, " L"]:
    """Row of the tap buffer that each layer writes; untapped layers write the last row, which nobody reads."""
    rows = jnp.full((num_layers,), taps.shape[0], jnp.int32)
    return rows.at[taps].set(jnp.arange(taps.shape[0], dtype=jnp.int32))


def _positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token in its segment; 0 at padding."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(segment_ids > 0, index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1), 0)


def _documents(segment_ids: Int[Array, "B T"], cache: Cache | None, before: int) -> Documents:
    """The documents of a call; the first goes on from the cache where its segment is that of the cache's last token."""
    valid_BT = segment_ids > 0
    if cache is None:
        earlier_BS, last_B = jnp.zeros((segment_ids.shape[0], before), jnp.int32), jnp.zeros((segment_ids.shape[0],), jnp.int32)
    else:
        ids_BS = cache.segment_ids_BS  # slots not written yet hold 0
        slots = jnp.arange(ids_BS.shape[1], dtype=jnp.int32)
        latest_B = jnp.max(jnp.where(ids_BS > 0, slots, 0), axis=1, keepdims=True)
        last_B = jnp.take_along_axis(ids_BS, latest_B, axis=1)[:, 0]
        starts_B = jnp.broadcast_to(cache.slot, last_B.shape)
        earlier_BS = jnp.take_along_axis(jnp.pad(ids_BS, ((0, 0), (before, 0))), starts_B[:, None] + jnp.arange(before, dtype=jnp.int32), axis=1)
    # The segment of the last token before each one, padding left out.
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    latest_BT = jnp.pad(jax.lax.cummax(jnp.where(valid_BT, index, -1), axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_BT = jnp.where(latest_BT < 0, last_B[:, None], jnp.take_along_axis(segment_ids, jnp.maximum(latest_BT, 0), axis=1))
    starts_BT = valid_BT & (segment_ids != previous_BT)
    return Documents(jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), valid_BT, jnp.concatenate([earlier_BS, segment_ids], axis=1))


def _segment_lengths(segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Length of the segment that each token belongs to: position of the segment's last token, plus one."""
    length = segment_ids.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment_ids.shape)
    last = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    ends = jax.lax.cummin(jnp.where(last, index, length - 1), axis=1, reverse=True)
    return jnp.take_along_axis(positions, ends, axis=1) + 1
