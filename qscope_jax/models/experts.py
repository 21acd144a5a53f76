"""Mixture of experts: each token goes through the few experts that its router prefers; none is ever dropped.

One reference form and two that do only the work chosen, picked by backend in `strategy`; tests hold them equal.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qscope_jax.models.config import ModelConfig
from qscope_jax.models.linear import linear, precision_for


class MixtureOfExperts(nnx.Module):
    """Router and experts; every expert is a SwiGLU.

    p = softmax(x W_router^T)  in float32;  p, e = the experts_per_token largest [/ their sum]
    y = sum_k p_k expert_{e_k}(x)  [+ sigmoid(w_shared x) shared_expert(x)]
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        """Random weights: normal with standard deviation 0.02, output projections scaled down with depth."""
        keys = iter(jax.random.split(key, 7))
        experts, hidden, width, down = config.num_experts, config.d_expert, config.d_model, 0.02 / math.sqrt(2 * config.num_layers)

        def weight(*shape: int, scale: float = 0.02) -> nnx.Param:
            return nnx.Param((jax.random.normal(next(keys), shape, jnp.float32) * scale).astype(config.dtype))

        self.router = weight(experts, width)
        self.experts_gate_up_proj = weight(experts, 2, hidden, width)
        self.experts_down_proj = weight(experts, width, hidden, scale=down)
        if config.d_shared_expert:
            self.shared_gate_proj, self.shared_up_proj = weight(config.d_shared_expert, width), weight(config.d_shared_expert, width)
            self.shared_down_proj, self.shared_gate = weight(width, config.d_shared_expert, scale=down), weight(1, width)
        self.experts_per_token, self.norm_expert_weights = config.experts_per_token, config.norm_expert_weights

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's contribution to the residual stream."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        weights_NK, experts_NK = self.route(x_ND)
        gate_up, down = (w[...].astype(x_ND.dtype) for w in (self.experts_gate_up_proj, self.experts_down_proj))
        out_ND = mix(x_ND, weights_NK, experts_NK, gate_up, down)
        if hasattr(self, "shared_gate"):
            hidden_NI = jax.nn.silu(linear(x_ND, self.shared_gate_proj[...])) * linear(x_ND, self.shared_up_proj[...])
            share_N1 = jax.nn.sigmoid(linear(x_ND, self.shared_gate[...]).astype(jnp.float32)).astype(x_ND.dtype)
            out_ND += share_N1 * linear(hidden_NI, self.shared_down_proj[...])
        return out_ND.reshape(x_BTD.shape)

    def route(self, x_ND: Float[Array, "N D"]) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
        """Weight and number of each token's experts, the most probable first; computed in float32 whatever the model's dtype."""
        probabilities = jax.nn.softmax(linear(x_ND.astype(jnp.float32), self.router[...].astype(jnp.float32)), axis=-1)
        weights_NK, experts_NK = jax.lax.top_k(probabilities, self.experts_per_token)
        if self.norm_expert_weights:
            weights_NK = weights_NK / jnp.sum(weights_NK, axis=-1, keepdims=True)
        return weights_NK.astype(x_ND.dtype), experts_NK


def strategy() -> str:
    """The one place that picks a form: grouped matrix products on accelerators, blocks on a CPU, whose `ragged_dot` expands over experts."""
    return "blocks" if jax.default_backend() == "cpu" else "grouped"


def mix(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    experts_NK: Int[Array, "N K"],
    gate_up_E2ID: Float[Array, "E 2 I D"],
    down_EDI: Float[Array, "E D I"],
    how: str | None = None,
) -> Float[Array, "N D"]:
    """`sum_k weights[n, k] * expert_{experts[n, k]}(x[n])`.

    Args:
        x_ND: Tokens.
        weights_NK: Weight of each chosen expert.
        experts_NK: The chosen experts, distinct in each row.
        gate_up_E2ID: Gate and up projection of each expert, both [out, in].
        down_EDI: Down projections.
        how: `reference` (every expert for every token), `blocks` or `grouped` (only the chosen ones); default by `strategy`.
    """
    how = how or strategy()
    shards = jax.sharding.get_abstract_mesh().shape.get("expert", 1)
    if shards == 1 or gate_up_E2ID.shape[0] % shards:
        return _mix(x_ND, weights_NK, experts_NK, gate_up_E2ID, down_EDI, how).astype(x_ND.dtype)

    def own(x_ND: Array, weights_NK: Array, experts_NK: Array, gate_up_E2ID: Array, down_EDI: Array) -> Array:
        first = jax.lax.axis_index("expert").astype(experts_NK.dtype) * gate_up_E2ID.shape[0]
        return jax.lax.psum(_mix(x_ND, weights_NK, experts_NK - first, gate_up_E2ID, down_EDI, how), "expert")

    # Every shard has all tokens of its data shard and adds what its own experts give them: one sum of [N, D] crosses devices, no weight does.
    split, whole = PartitionSpec("expert"), PartitionSpec()
    over_shards = jax.shard_map(own, in_specs=(whole, whole, whole, split, split), out_specs=whole, axis_names=frozenset({"expert"}), check_vma=False)
    return over_shards(x_ND, weights_NK, experts_NK, gate_up_E2ID, down_EDI).astype(x_ND.dtype)


def _mix(x_ND: Array, weights_NK: Array, experts_NK: Array, gate_up_E2ID: Array, down_EDI: Array, how: str) -> Array:
    """What these experts give; a number that is not one of theirs gives nothing. In float32, so that sums over shards round once."""
    if how == "reference":
        return _every_expert(x_ND, weights_NK, experts_NK, gate_up_E2ID, down_EDI).astype(jnp.float32)
    tokens, chosen = experts_NK.shape
    experts = gate_up_E2ID.shape[0]
    known_NK = (experts_NK >= 0) & (experts_NK < experts)
    weights_NK = jnp.where(known_NK, weights_NK, 0)
    experts_A = jnp.where(known_NK, experts_NK, experts).reshape(-1)
    order_A = jnp.argsort(experts_A, stable=True).astype(jnp.int32)  # assignments (token, slot) by expert, those of others last
    counts_E = jnp.zeros((experts,), jnp.int32).at[experts_A].add(1, mode="drop")
    form = _blocks if how == "blocks" else _grouped
    out_AD = form(x_ND, order_A // chosen, counts_E, gate_up_E2ID, down_EDI)
    # Back to the order of tokens, so that each sums its own experts in the order of their probability.
    out_NKD = jnp.zeros_like(out_AD).at[order_A].set(out_AD, unique_indices=True).reshape(tokens, chosen, -1)
    return jnp.einsum("nk,nkd->nd", weights_NK, out_NKD, precision=precision_for(x_ND.dtype), preferred_element_type=jnp.float32)


def _every_expert(x_ND: Array, weights_NK: Array, experts_NK: Array, gate_up_E2ID: Array, down_EDI: Array) -> Array:
    def add(total_ND: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
        number, *weights = expert
        share_N = jnp.sum(jnp.where(experts_NK == number, weights_NK, jnp.zeros((), weights_NK.dtype)), axis=1)
        return total_ND + share_N[:, None] * _expert(x_ND, *weights), None

    numbers = jnp.arange(gate_up_E2ID.shape[0], dtype=experts_NK.dtype)
    return jax.lax.scan(add, jnp.zeros_like(x_ND), (numbers, gate_up_E2ID, down_EDI))[0]


def _blocks(x_ND: Array, tokens_A: Array, counts_E: Array, gate_up_E2ID: Array, down_EDI: Array) -> Array:
    """Assignments cut into blocks of one expert each, about as long as an expert's mean share; a block that none fills is skipped."""
    assignments, experts = tokens_A.shape[0], counts_E.shape[0]
    size = 1 << min(max(math.ceil(math.log2(max(assignments / experts, 1))), 0), 8)
    blocks_E = (counts_E + size - 1) // size
    last_E, starts_E = jnp.cumsum(blocks_E, dtype=jnp.int32), jnp.cumsum(counts_E, dtype=jnp.int32) - counts_E
    # Full blocks are at most assignments // size, and each expert has at most one that is not full.
    most = assignments // size + (min(experts, assignments) if size > 1 else 0)
    lanes = jnp.arange(size, dtype=jnp.int32)

    def one(out_AD: Array, block: Array) -> tuple[Array, None]:
        def work(out_AD: Array) -> Array:
            expert = jnp.searchsorted(last_E, block, side="right").astype(jnp.int32)
            within = lanes + size * (block - (last_E[expert] - blocks_E[expert]))
            # Lanes beyond the expert's assignments compute on a token that is there, and are written nowhere.
            places = jnp.where(within < counts_E[expert], starts_E[expert] + within, assignments)
            y = _expert(x_ND[tokens_A[jnp.minimum(places, assignments - 1)]], gate_up_E2ID[expert], down_EDI[expert])
            return out_AD.at[places].set(y, mode="drop")

        return jax.lax.cond(block < last_E[-1], work, lambda out_AD: out_AD, out_AD), None

    start = jnp.zeros((assignments, x_ND.shape[1]), x_ND.dtype)
    return jax.lax.scan(one, start, jnp.arange(most, dtype=jnp.int32))[0]


def _grouped(x_ND: Array, tokens_A: Array, counts_E: Array, gate_up_E2ID: Array, down_EDI: Array) -> Array:
    """XLA's grouped matrix product over assignments sorted by expert."""

    def product(x: Array, w: Array) -> Array:
        numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (w.ndim - 1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
        return jax.lax.ragged_dot_general(x, w, counts_E, numbers, precision=precision_for(x.dtype))

    experts, _, hidden, width = gate_up_E2ID.shape
    both_AI = product(x_ND[tokens_A], gate_up_E2ID.reshape(experts, 2 * hidden, width))
    return product(jax.nn.silu(both_AI[:, :hidden]) * both_AI[:, hidden:], down_EDI)


def _expert(x_ND: Array, gate_up_2ID: Array, down_DI: Array) -> Array:
    return linear(jax.nn.silu(linear(x_ND, gate_up_2ID[0])) * linear(x_ND, gate_up_2ID[1]), down_DI)
