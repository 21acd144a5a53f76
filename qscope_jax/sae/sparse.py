"""Products with a sparse code of N tokens and K features each, without an array of [N, F].

Three primitives serve decoding, encoding's gradient and decoding's gradient. Each has a `dense` form (scatter to [N, F], one matmul), a
`gather` form ([N, K, D] at once) and a `scan` form (K or N*K small steps, no temporary memory). `strategy` chooses by backend and shape;
tests hold the forms equal.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


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
        return jnp.matmul(_densify(values_NK, indices_NK, W_FD.shape[0]), W_FD, precision=_HIGHEST)
    if how == "gather":
        return jnp.einsum("nk,nkd->nd", values_NK, W_FD[indices_NK], precision=_HIGHEST)

    def add(total_ND: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
        value_N, index_N = column
        return total_ND + value_N[:, None] * W_FD[index_N], None

    start = jnp.zeros((values_NK.shape[0], W_FD.shape[1]), W_FD.dtype)
    return jax.lax.scan(add, start, (values_NK.T, indices_NK.T))[0]


def dot_rows(y_ND: Float[Array, "N D"], indices_NK: Int[Array, "N K"], W_FD: Float[Array, "F D"], how: str | None = None) -> Float[Array, "N K"]:
    """`y[n] . W[indices[n, k]]`: the gradient of decoding with respect to the values."""
    how = how or strategy(W_FD.shape[0], W_FD.shape[1], indices_NK.shape[1])
    if how == "dense":
        return jnp.take_along_axis(jnp.matmul(y_ND, W_FD.T, precision=_HIGHEST), indices_NK, axis=1)
    if how == "gather":
        return jnp.einsum("nd,nkd->nk", y_ND, W_FD[indices_NK], precision=_HIGHEST)
    return jax.lax.map(lambda index_N: jnp.sum(W_FD[index_N] * y_ND, axis=-1), indices_NK.T).T


def scatter_rows(
    values_NK: Float[Array, "N K"], indices_NK: Int[Array, "N K"], y_ND: Float[Array, "N D"], num_features: int, how: str | None = None
) -> Float[Array, "F D"]:
    """`out[f] = sum of values[n, k] * y[n] over indices[n, k] = f`: the gradient of either matrix."""
    how = how or strategy(num_features, y_ND.shape[1], indices_NK.shape[1])
    if how == "dense":
        return jnp.matmul(_densify(values_NK, indices_NK, num_features).T, y_ND, precision=_HIGHEST)
    zeros_FD = jnp.zeros((num_features, y_ND.shape[1]), y_ND.dtype)
    if how == "gather":
        return zeros_FD.at[indices_NK].add(values_NK[..., None] * y_ND[:, None])
    width = values_NK.shape[1]

    def add_row(position: Array, out_FD: Array) -> Array:
        n, k = position // width, position % width
        row = jax.lax.dynamic_slice(out_FD, (indices_NK[n, k], 0), (1, out_FD.shape[1]))
        return jax.lax.dynamic_update_slice(out_FD, row + values_NK[n, k] * y_ND[n], (indices_NK[n, k], 0))

    return jax.lax.fori_loop(0, values_NK.size, add_row, zeros_FD)


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
def select_pre_activations(
    z_NF: Float[Array, "N F"],
    indices_NK: Int[Array, "N K"],
    x_ND: Float[Array, "N D"],
    W_FD: Float[Array, "F D"],
    b_F: Float[Array, " F"],
) -> Float[Array, "N K"]:
    """Chosen entries of `z = x W^T + b`, differentiable in x, W and b through those entries alone.

    `z` is computed once outside and may serve several selections (the main code, AuxK, 4K features); no gradient reaches it, so that
    nothing of shape [N, F] is kept for, or made in, the backward pass.
    """
    return jnp.take_along_axis(z_NF, indices_NK, axis=1)


def _select_forward(z_NF: Array, indices_NK: Array, x_ND: Array, W_FD: Array, b_F: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return jnp.take_along_axis(z_NF, indices_NK, axis=1), (indices_NK, x_ND, W_FD)


def _select_backward(saved: tuple[Array, Array, Array], g_NK: Array) -> tuple[None, None, Array, Array, Array]:
    indices_NK, x_ND, W_FD = saved
    features = W_FD.shape[0]
    return (
        None,
        None,
        combine_rows(g_NK, indices_NK, W_FD),
        scatter_rows(g_NK, indices_NK, x_ND, features),
        scatter_scalars(g_NK, indices_NK, features),
    )


select_pre_activations.defvjp(_select_forward, _select_backward)
