"""Products with a sparse code of N tokens and K features each, without an array of [N, F].

Three primitives serve decoding, encoding's gradient and decoding's gradient. Each has a `dense` form (scatter to [N, F], one matmul), a
`gather` form ([N, K, D] at once) and a `scan` form (small steps, no temporary memory). `strategy` chooses by backend and shape;
tests hold the forms equal. Matrices and streams may be bfloat16, which halves what is read; sums are float32.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qscope_jax.models.linear import precision_for


def strategy(num_features: int, width: int, k: int) -> str:
    """The form for a dictionary of `num_features` directions `width` wide and k active features a token.

    On a CPU a token costs K row updates (about 0.5 microseconds and a nanosecond for each element) or 2*F*D multiply-adds of a dense
    product (about 130 GFLOP/s on two cores); small dictionaries are denser than they are sparse. GPUs gather; TPUs multiply.
    """
    backend = jax.default_backend()
    if backend == "cpu":
        return "dense" if 1.5e-11 * num_features * width < k * (5e-7 + 1e-9 * width) else "scan"
    return "dense" if backend == "tpu" else "gather"


def combine_rows(
    values_NK: Float[Array, "N K"], indices_NK: Int[Array, "N K"], W_FD: Float[Array, "F D"], how: str | None = None
) -> Float[Array, "N D"]:
    """`sum_k values[n, k] * W[indices[n, k]]`: decoding, and the gradient of encoding with respect to its input."""
    how = how or strategy(W_FD.shape[0], W_FD.shape[1], indices_NK.shape[1])
    if how == "dense":
        return _product("nf,fd->nd", _densify(values_NK.astype(W_FD.dtype), indices_NK, W_FD.shape[0]), W_FD)
    if how == "gather":
        return _product("nk,nkd->nd", values_NK.astype(W_FD.dtype), W_FD[indices_NK])

    def add(total_ND: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
        value_N, index_N = column
        return total_ND + value_N[:, None] * W_FD[index_N].astype(jnp.float32), None

    start = jnp.zeros((values_NK.shape[0], W_FD.shape[1]), jnp.float32)
    return jax.lax.scan(add, start, (values_NK.T, indices_NK.T))[0]


def dot_rows(y_ND: Float[Array, "N D"], indices_NK: Int[Array, "N K"], W_FD: Float[Array, "F D"], how: str | None = None) -> Float[Array, "N K"]:
    """`y[n] . W[indices[n, k]]`: the gradient of decoding with respect to the values."""
    how = how or strategy(W_FD.shape[0], W_FD.shape[1], indices_NK.shape[1])
    y_ND = y_ND.astype(W_FD.dtype)
    if how == "dense":
        return jnp.take_along_axis(_product("nd,fd->nf", y_ND, W_FD), indices_NK, axis=1)
    if how == "gather":
        return _product("nd,nkd->nk", y_ND, W_FD[indices_NK])
    # The rows of eight tokens fit into a core's cache.
    return jax.lax.map(lambda token: _product("kd,d->k", W_FD[token[1]], token[0]), (y_ND, indices_NK), batch_size=8)


def residual_rows(
    target_ND: Float[Array, "N D"], values_NK: Float[Array, "N K"], indices_NK: Int[Array, "N K"], W_FD: Float[Array, "F D"], how: str | None = None
) -> tuple[Float[Array, "N D"], Float[Array, "N K"]]:
    """What decoding leaves of a target, `e = target - combine_rows(...)`, and `dot_rows(e, ...)` with the same rows of W.

    On a CPU a token's rows are fetched from memory once for both.
    """
    how = how or strategy(W_FD.shape[0], W_FD.shape[1], indices_NK.shape[1])
    if how != "scan":
        rest_ND = target_ND - combine_rows(values_NK, indices_NK, W_FD, how)
        return rest_ND, dot_rows(rest_ND, indices_NK, W_FD, how)

    def of_token(token: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        target_D, values_K, indices_K = token
        rows_KD = W_FD[indices_K]
        rest_D = target_D - _product("k,kd->d", values_K.astype(W_FD.dtype), rows_KD)
        return rest_D, _product("kd,d->k", rows_KD, rest_D.astype(W_FD.dtype))

    return jax.lax.map(of_token, (target_ND, values_NK, indices_NK), batch_size=8)


def scatter_rows(
    values_NK: Float[Array, "N K"], indices_NK: Int[Array, "N K"], y_ND: Float[Array, "N D"], num_features: int, how: str | None = None
) -> Float[Array, "F D"]:
    """`out[f] = sum of values[n, k] * y[n] over indices[n, k] = f`: the gradient of either matrix."""
    how = how or strategy(num_features, y_ND.shape[1], indices_NK.shape[1])
    if how == "dense":
        return _product("nf,nd->fd", _densify(values_NK.astype(y_ND.dtype), indices_NK, num_features), y_ND)
    if how == "gather":
        zeros_FD = jnp.zeros((num_features, y_ND.shape[1]), jnp.float32)
        return zeros_FD.at[indices_NK].add(values_NK[..., None] * y_ND[:, None].astype(jnp.float32))
    return _sum_by_feature(values_NK, indices_NK, y_ND.astype(jnp.float32), num_features)


def _product(formula: str, left: Array, right: Array) -> Array:
    return jnp.einsum(formula, left, right, precision=precision_for(right.dtype), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sum_by_feature(values_NK: Array, indices_NK: Array, y_ND: Array, num_features: int) -> Array:
    """`scatter_rows` over entries sorted by feature: each row is written once, from rows of y, which the cache holds.

    The first few entries of all features form one gather, which fuses into a single parallel pass; only what features that fire more
    often have left goes through a loop, as many entries a turn. (Adding entry after entry reads and writes a row of `out` for each of
    them, on one core, and takes several times as long.)
    """
    entries, K = indices_NK.size, indices_NK.shape[1]
    lanes = min(max(2 ** math.ceil(math.log2(max(1.5 * entries / num_features, 1))), 1), 16)
    order = _sort_entries(indices_NK.reshape(-1), num_features)
    sorted_values, sorted_tokens = values_NK.reshape(-1)[order], order // K
    counts_F = jnp.zeros((num_features,), jnp.int32).at[indices_NK.reshape(-1)].add(1)
    ends_F = jnp.cumsum(counts_F, dtype=jnp.int32)
    starts_F = ends_F - counts_F

    def take(start: Array, end: Array) -> tuple[Array, Array]:
        """Values and tokens of `lanes` entries from `start`, those at or past `end` being 0."""
        entry = start[..., None] + jnp.arange(lanes, dtype=jnp.int32)
        inside = jnp.minimum(entry, entries - 1)
        return jnp.where(entry < end[..., None], sorted_values[inside], 0), sorted_tokens[inside]

    first_values, first_tokens = take(starts_F, ends_F)
    out_FD = sum(first_values[:, lane, None] * y_ND[first_tokens[:, lane]] for lane in range(lanes))

    turns_F = jnp.maximum((counts_F + lanes - 1) // lanes - 1, 0)
    turns_done_F = jnp.cumsum(turns_F, dtype=jnp.int32)
    # Each turn stands for `lanes` entries that are there, so there are at most entries // lanes turns.
    feature_of_turn = jnp.repeat(jnp.arange(num_features, dtype=jnp.int32), turns_F, total_repeat_length=max(entries // lanes, 1))

    def add(turn: Array, out_FD: Array) -> Array:
        feature = feature_of_turn[turn]
        earlier = turn - (turns_done_F[feature] - turns_F[feature])
        lane_values, lane_tokens = take(starts_F[feature] + lanes * (1 + earlier), ends_F[feature])
        row_D = jax.lax.dynamic_index_in_dim(out_FD, feature, keepdims=False)
        row_D += sum(lane_values[lane] * y_ND[lane_tokens[lane]] for lane in range(lanes))
        return jax.lax.dynamic_update_index_in_dim(out_FD, row_D, feature, 0)

    return jax.lax.fori_loop(0, turns_done_F[-1], add, out_FD)


def _sum_forward(values_NK: Array, indices_NK: Array, y_ND: Array, num_features: int) -> tuple[Array, tuple[Array, Array, Array]]:
    return _sum_by_feature(values_NK, indices_NK, y_ND, num_features), (values_NK, indices_NK, y_ND)


def _sum_backward(num_features: int, saved: tuple[Array, Array, Array], g_FD: Array) -> tuple[Array, None, Array]:
    values_NK, indices_NK, y_ND = saved
    return dot_rows(y_ND, indices_NK, g_FD), None, combine_rows(values_NK, indices_NK, g_FD)


_sum_by_feature.defvjp(_sum_forward, _sum_backward)


def _sort_entries(features: Array, num_features: int) -> Array:
    """Positions of entries in order of their feature, those of one feature as they come."""
    entries = features.shape[0]
    if num_features * entries < 2**31:  # one key of both sorts four times faster than two arrays
        return jnp.sort(features.astype(jnp.int32) * entries + jnp.arange(entries, dtype=jnp.int32)) % entries
    return jnp.argsort(features, stable=True).astype(jnp.int32)


def scatter_scalars(values_NK: Float[Array, "N K"], indices_NK: Int[Array, "N K"], num_features: int) -> Float[Array, " F"]:
    """`out[f] = sum of values[n, k] over indices[n, k] = f`: the gradient of the encoder bias, and firing counts."""
    return jnp.zeros((num_features,), values_NK.dtype).at[indices_NK.reshape(-1)].add(values_NK.reshape(-1))


def _densify(values_NK: Array, indices_NK: Array, num_features: int) -> Array:
    rows = jnp.arange(values_NK.shape[0], dtype=indices_NK.dtype)[:, None]
    return jnp.zeros((values_NK.shape[0], num_features), values_NK.dtype).at[rows, indices_NK].add(values_NK)


@jax.custom_vjp
def sparse_decode(values_NK: Float[Array, "N K"], indices_NK: Int[Array, "N K"], W_FD: Float[Array, "F D"]) -> Float[Array, "N D"]:
    """`combine_rows` with a backward pass that stays sparse."""
    return combine_rows(values_NK, indices_NK, W_FD)


def _decode_forward(values_NK: Array, indices_NK: Array, W_FD: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return combine_rows(values_NK, indices_NK, W_FD), (values_NK, indices_NK, W_FD)


def _decode_backward(saved: tuple[Array, Array, Array], g_ND: Array) -> tuple[Array, None, Array]:
    values_NK, indices_NK, W_FD = saved
    return dot_rows(g_ND, indices_NK, W_FD), None, scatter_rows(values_NK, indices_NK, g_ND, W_FD.shape[0])


sparse_decode.defvjp(_decode_forward, _decode_backward)


@jax.custom_vjp
def chosen_pre_activations(
    z_NK: Float[Array, "N K"],
    indices_NK: Int[Array, "N K"],
    x_ND: Float[Array, "N D"],
    W_FD: Float[Array, "F D"],
    b_F: Float[Array, " F"],
) -> Float[Array, "N K"]:
    """`z` itself, entries `indices` of `x W^T + b` computed before, now differentiable in x, W and b.

    No gradient reaches the array of all pre-activations that they were chosen from: nothing of shape [N, F] is kept for, or made in, the
    backward pass.
    """
    return z_NK


def _chosen_forward(z_NK: Array, indices_NK: Array, x_ND: Array, W_FD: Array, b_F: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return z_NK, (indices_NK, x_ND, W_FD)


def _chosen_backward(saved: tuple[Array, Array, Array], g_NK: Array) -> tuple[None, None, Array, Array, Array]:
    indices_NK, x_ND, W_FD = saved
    features = W_FD.shape[0]
    return (
        None,
        None,
        combine_rows(g_NK, indices_NK, W_FD),
        scatter_rows(g_NK, indices_NK, x_ND, features),
        scatter_scalars(g_NK, indices_NK, features),
    )


chosen_pre_activations.defvjp(_chosen_forward, _chosen_backward)
