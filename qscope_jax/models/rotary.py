"""Rotary position embedding (Su et al. 2021), in the half-split layout of the Hugging Face checkpoints."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary_tables(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Float[Array, "B T 1 C"], Float[Array, "B T 1 C"]]:
    """Cosine and signed sine of every position and channel, in float32.

    bfloat16 angles would turn position 257 into 256. The sine carries the sign of the rotation's first half, so that applying it
    is two products and one rotation of the channels.
    """
    half = head_dim // 2
    # By the host, in double precision: an error in a frequency is multiplied by the position, and accelerators' powers are approximate.
    frequencies = jnp.asarray(theta ** (-np.arange(half) / half), jnp.float32)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def apply_rotary(x_BTHC: Float[Array, "B T H C"], cos: Float[Array, "B T 1 C"], sin: Float[Array, "B T 1 C"]) -> Float[Array, "B T H C"]:
    """Rotate channel pairs (c, c + C/2) of every head."""
    x32 = x_BTHC.astype(jnp.float32)
    swapped = jnp.roll(x32, x32.shape[-1] // 2, axis=-1)
    return (x32 * cos + swapped * sin).astype(x_BTHC.dtype)
