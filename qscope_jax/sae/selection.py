"""Pre-activations and the choice of the largest, a few tokens at a time: all pre-activations of a batch never exist at once on a CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.models.linear import precision_for
from qscope_jax.sae.topk import top_k

_CHUNK = 256


def largest_features(
    x_ND: Float[Array, "N D"],
    W_FD: Float[Array, "F D"],
    b_F: Float[Array, " F"],
    k: int,
    *,
    floor_F: Float[Array, " F"] | None = None,
    allowed_F: Bool[Array, " F"] | None = None,
) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """The k largest entries of `x W^T + b` in each row, descending, and their features; at most F of them.

    The product is taken in the dtype of W and added up in float32, in which the choice is made.

    Args:
        x_ND: What the encoder multiplies.
        W_FD: Encoder vectors.
        b_F: Encoder bias, float32.
        k: How many.
        floor_F: Only entries above it count; the others are -inf.
        allowed_F: Only these features count; the others are -inf.
    """

    def choose(x_ND: Array) -> tuple[Array, Array]:
        z_NF = pre_activations(x_ND, W_FD, b_F)
        if floor_F is not None:
            z_NF = jnp.where(z_NF > floor_F, z_NF, -jnp.inf)
        if allowed_F is not None:
            z_NF = jnp.where(allowed_F, z_NF, -jnp.inf)
        return top_k(z_NF, min(k, W_FD.shape[0]))

    return _in_chunks(choose, x_ND, W_FD.shape[0])


def pre_activations(x_ND: Float[Array, "N D"], W_FD: Float[Array, "F D"], b_F: Float[Array, " F"]) -> Float[Array, "N F"]:
    """`x W^T + b`: product in the dtype of W, sum in float32."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_ND.astype(W_FD.dtype), W_FD, contract, precision_for(W_FD.dtype), jnp.float32) + b_F


def _in_chunks(choose: Callable[[Array], tuple[Array, Array]], x_ND: Array, num_features: int) -> tuple[Array, Array]:
    """`choose` over groups of 256 tokens where the pre-activations of all at once would leave a CPU's caches."""
    tokens, width = x_ND.shape
    chunks = tokens // _CHUNK
    if jax.default_backend() != "cpu" or chunks < 2 or tokens * num_features < _CHUNK * 16384:
        return choose(x_ND)
    parts = [out.reshape(chunks * _CHUNK, -1) for out in jax.lax.map(choose, x_ND[: chunks * _CHUNK].reshape(chunks, _CHUNK, width))]
    if tokens % _CHUNK:
        parts = [jnp.concatenate(pair) for pair in zip(parts, choose(x_ND[chunks * _CHUNK :]), strict=True)]
    return parts[0], parts[1]
