"""Grouped-query attention: the module, its reference form, and the one place where a faster form is chosen."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.models.cache import KeyValues
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.linear import linear, precision_for, rms_norm, soft_cap
from qscope_jax.models.rotary import apply_rotary

# Finite, so that a row of padding gives a uniform average instead of NaN.
_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """Which tokens of a call belong together, for mixers with a state.

    Attributes:
        number_BT: Documents begun in the row up to each token; 0 goes on from the cache. Padding has the number of what precedes it.
        valid_BT: False at padding.
        ids_BS: Segment ids of the tokens, and before them of the few slots that a short convolution still sees.
    """

    number_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]
    ids_BS: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceContext:
    """What every mixer needs to know about the tokens of a call; computed once, shared by all layers."""

    cos: Float[Array, "B T 1 C"]
    sin: Float[Array, "B T 1 C"]
    mask_BTS: Bool[Array, "B T S"]
    window_mask_BTS: Bool[Array, "B T S"] | None
    slot: Int[Array, ""] | Int[Array, " B"]
    documents: Documents | None


class Attention(nnx.Module):
    """Causal softmax attention with G key/value heads shared by H query heads, rotary positions and optional q/k norms."""

    def __init__(self, config: ModelConfig, key: jax.Array, *, sliding: bool = False):
        """Random weights: normal with standard deviation 0.02, output projection scaled down with depth.

        Args:
            config: The decoder's.
            key: Of the weights.
            sliding: See only the last `config.sliding_window` tokens.
        """
        self.sliding = sliding
        q, k, v, o = jax.random.split(key, 4)
        width, heads, groups = config.d_model, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        dtype = jnp.dtype(config.dtype)

        def weight(key: jax.Array, rows: int, columns: int, scale: float) -> nnx.Param:
            return nnx.Param((jax.random.normal(key, (rows, columns), jnp.float32) * scale).astype(dtype))

        self.config = config
        self.q_proj = weight(q, heads * (2 if config.attention_gate else 1), width, 0.02)
        self.k_proj = weight(k, groups, width, 0.02)
        self.v_proj = weight(v, groups, width, 0.02)
        self.o_proj = weight(o, width, heads, 0.02 / math.sqrt(2 * config.num_layers))
        if config.qk_norm:
            first = jnp.zeros if config.unit_offset_norms else jnp.ones
            self.q_norm, self.k_norm = nnx.Param(first((config.head_dim,), dtype)), nnx.Param(first((config.head_dim,), dtype))

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: SequenceContext, cache: KeyValues | None, repeat: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        """Mix the tokens of a call with each other and with those in the cache.

        Args:
            x_BTD: Normed residual stream.
            context: Rotary tables, mask and write slot of this call.
            cache: Keys and values of this layer of the period for all R repeats, or None.
            repeat: Which of the R repeats this layer is.

        Returns:
            The layer's contribution to the residual stream, and the updated cache.
        """
        config = self.config
        batch, length, _ = x_BTD.shape
        q = linear(x_BTD, self.q_proj[...]).reshape(batch, length, config.num_heads, -1)
        q, gate_BTHC = (q[..., : config.head_dim], q[..., config.head_dim :]) if config.attention_gate else (q, None)
        k = linear(x_BTD, self.k_proj[...]).reshape(batch, length, config.num_kv_heads, config.head_dim)
        v = linear(x_BTD, self.v_proj[...]).reshape(batch, length, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            q, k = (rms_norm(x, w[...], config.norm_eps, config.unit_offset_norms) for x, w in ((q, self.q_norm), (k, self.k_norm)))
        q, k = apply_rotary(q, context.cos, context.sin), apply_rotary(k, context.cos, context.sin)
        mask_BTS = context.window_mask_BTS if self.sliding else context.mask_BTS
        assert mask_BTS is not None
        scale = config.attention_scale or config.head_dim**-0.5
        if cache is None and _implementation(config) == "cudnn":
            out_BTHC = jax.nn.dot_product_attention(q, k, v, mask=mask_BTS[:, None], scale=scale, implementation="cudnn")
            return self._project(out_BTHC, gate_BTHC), None
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if cache is not None:
            cache = KeyValues(*(_written(x, new, repeat, context.slot) for x, new in ((cache.k_RBGSC, k), (cache.v_RBGSC, v))))
            k, v = (x[0] if x.shape[0] == 1 else x[repeat] for x in (cache.k_RBGSC, cache.v_RBGSC))
        form = partial(attend, scale=scale, softcap=config.attention_softcap)
        out_BTHC = form(q, k, v, mask_BTS) if cache is not None else in_blocks(form, q, k, v, mask_BTS)
        return self._project(out_BTHC, gate_BTHC), cache

    def _project(self, out_BTHC: Array, gate_BTHC: Array | None) -> Array:
        if gate_BTHC is not None:
            out_BTHC *= jax.nn.sigmoid(gate_BTHC.astype(jnp.float32)).astype(out_BTHC.dtype)
        return linear(out_BTHC.reshape(*out_BTHC.shape[:2], -1), self.o_proj[...])


def attend(
    q_BTHC: Float[Array, "B T H C"],
    k_BGSC: Float[Array, "B G S C"],
    v_BGSC: Float[Array, "B G S C"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float,
    softcap: float = 0.0,
) -> Float[Array, "B T H C"]:
    """Reference attention: scaled (and capped) scores, softmax in float32, weighted values. `mask` is true where a query may look.

    A query that may look nowhere (padding) gets the mean of the values, a finite number that nobody reads.
    """
    batch, length, heads, width = q_BTHC.shape
    groups = k_BGSC.shape[1]
    q = (q_BTHC * scale).reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, groups, -1, width)
    precision = precision_for(q.dtype)
    scores = jnp.einsum("bgqc,bgsc->bgqs", q, k_BGSC, precision=precision, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, heads // groups, length, -1)
    scores = jnp.where(mask_BTS[:, None, None], soft_cap(scores, softcap), _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BGSC.dtype).reshape(batch, groups, -1, scores.shape[-1])
    out = jnp.einsum("bgqs,bgsc->bgqc", weights, v_BGSC, precision=precision)
    return out.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)


def in_blocks(
    form: Callable[..., Array],
    q_BTHC: Float[Array, "B T H C"],
    k_BGTC: Float[Array, "B G T C"],
    v_BGTC: Float[Array, "B G T C"],
    mask_BTT: Bool[Array, "B T T"],
) -> Float[Array, "B T H C"]:
    """A form of attention among the tokens of one call, which see no later ones: each block of queries meets only the keys up to its end.

    Four blocks leave out 3/8 of the scores, which the mask would throw away; below 64 queries a block is not worth its overhead.
    """
    length = q_BTHC.shape[1]
    block = max(length // 4, 64)
    if length % block or length == block:
        return form(q_BTHC, k_BGTC, v_BGTC, mask_BTT)
    ends = range(block, length + 1, block)
    parts = [form(q_BTHC[:, e - block : e], k_BGTC[:, :, :e], v_BGTC[:, :, :e], mask_BTT[:, e - block : e, :e]) for e in ends]
    return jnp.concatenate(parts, axis=1)


def causal_mask(
    queries_BT: Int[Array, "B T"], keys_BS: Int[Array, "B S"], slot: Int[Array, ""] | Int[Array, " B"], window: int | None = None
) -> Bool[Array, "B T S"]:
    """True where the query at index t may see the key in slot s: same segment, not padding, not later, and within the window.

    Args:
        queries_BT: Segment ids of the tokens of this call; 0 is padding.
        keys_BS: Segment ids of all slots.
        slot: Slot of the first query, one for all rows or one for each.
        window: Tokens that a query sees, itself included; None is all.
    """
    same = (queries_BT[:, :, None] == keys_BS[:, None, :]) & (keys_BS[:, None, :] > 0)
    query_slots = slot[..., None] + jnp.arange(queries_BT.shape[1], dtype=jnp.int32)  # [T], or [B, T]
    back = query_slots[..., None] - jnp.arange(keys_BS.shape[1], dtype=jnp.int32)
    return same & (back >= 0 if window is None else (back >= 0) & (back < window))


def _written(cache_RBGSC: Array, new_BGTC: Array, repeat: Int[Array, ""] | int, slot: Array) -> Array:
    """A layer's keys or values with those of this call at their slots."""
    if slot.ndim == 0:
        return jax.lax.dynamic_update_slice(cache_RBGSC, new_BGTC[None], (repeat, 0, 0, slot, 0))
    rows_B1 = jnp.arange(slot.shape[0], dtype=jnp.int32)[:, None]
    slots_BT = slot[:, None] + jnp.arange(new_BGTC.shape[2], dtype=jnp.int32)
    return cache_RBGSC.at[repeat, rows_B1, :, slots_BT].set(new_BGTC.swapaxes(1, 2), unique_indices=True)


def _implementation(config: ModelConfig) -> str:
    """The one place that picks an attention kernel: cuDNN's for half precision on NVIDIA GPUs, the reference elsewhere."""
    if config.attention_softcap:
        return "reference"  # cuDNN's has no soft-cap
    if config.attention != "auto":
        return config.attention
    half = jnp.dtype(config.dtype).itemsize == 2
    return "cudnn" if half and jax.default_backend() == "gpu" and config.head_dim <= 128 else "reference"
