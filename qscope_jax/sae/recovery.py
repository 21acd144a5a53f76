"""Planted directions: streams whose features are known, and how many of them an SAE finds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from qscope_jax.errors import InputError
from qscope_jax.sae.geometry import largest_cosines
from qscope_jax.sae.sparse import combine_rows

RECOVERED_COSINE = 0.9

_WEAKEST, _STRONGEST = 0.5, 1.5


def planted_directions(key: PRNGKeyArray, num: int, width: int) -> Float[Array, "G D"]:
    """`num` unit directions, uniform on the sphere."""
    directions = jax.random.normal(key, (num, width), jnp.float32)
    return directions / jnp.linalg.norm(directions, axis=1, keepdims=True)


def planted_streams(key: PRNGKeyArray, directions_GD: Float[Array, "G D"], *, active: int, tokens: int, noise: float = 0.0) -> Float[Array, "N D"]:
    """Streams that are sums of few directions: each token has `active` of them, drawn without replacement and evenly.

    Their strengths are uniform on [0.5, 1.5), so that every one present is worth finding. Draws [tokens, num] numbers on the way.

    Args:
        key: Random key.
        directions_GD: Unit directions.
        active: Directions in a token.
        tokens: N.
        noise: Expected norm of Gaussian noise added to each token.

    Raises:
        InputError: `active` is not 1 to the number of directions, or `tokens` is below 1.
    """
    if not 1 <= active <= len(directions_GD) or tokens < 1:
        raise InputError(f"{active} active directions of {len(directions_GD)} in {tokens} tokens; give 1 to {len(directions_GD)}, in 1 token or more")
    return _draw(key, directions_GD, active, tokens, jnp.float32(noise))


def recovered(
    directions_GD: Shaped[Array | np.ndarray, "G D"], W_dec_FD: Shaped[Array | np.ndarray, "F D"], threshold: float = RECOVERED_COSINE
) -> tuple[float, Float[np.ndarray, " G"]]:
    """Share of directions that some decoder row meets with a cosine above `threshold`, and the largest cosine of each direction.

    Cosines have a sign: a row that points the other way has not found the direction, whose coefficients are never negative.
    """
    cosines_G = largest_cosines(jnp.asarray(directions_GD, jnp.float32), jnp.asarray(W_dec_FD, jnp.float32))
    return float(np.mean(cosines_G > threshold)), cosines_G


@partial(jax.jit, static_argnames=("active", "tokens"))
def _draw(key: Array, directions_GD: Array, active: int, tokens: int, noise: Array) -> Array:
    which, strength, off = jax.random.split(key, 3)
    num, width = directions_GD.shape
    # The largest of independent uniform numbers are a subset drawn without replacement.
    _, indices_NK = jax.lax.top_k(jax.random.uniform(which, (tokens, num)), active)
    values_NK = jax.random.uniform(strength, (tokens, active), jnp.float32, _WEAKEST, _STRONGEST)
    x_ND = combine_rows(values_NK, indices_NK, directions_GD)
    return x_ND + noise / jnp.sqrt(jnp.float32(width)) * jax.random.normal(off, (tokens, width), jnp.float32)
