"""Rotary position embedding (Su et al. 2021), in the half-split layout of the Hugging Face checkpoints."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qscope_jax.models.config import Llama3Scaling


def rotary_tables(
    positions_BT: Int[Array, "B T"], width: int, theta: float, scaling: Llama3Scaling | None = None
) -> tuple[Float[Array, "B T 1 W"], Float[Array, "B T 1 W"]]:
    """Cosine and signed sine of every position and each of `width` rotary channels, in float32.

    bfloat16 angles would turn position 257 into 256. The sine carries the sign of the rotation's first half, so that applying it
    is two products and one rotation of the channels.
    """
    half = width // 2
    # By the host, in double precision: an error in a frequency is multiplied by the position, and accelerators' powers are approximate.
    frequencies = theta ** (-np.arange(half) / half)
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling)
    frequencies = jnp.asarray(frequencies, jnp.float32)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def scale_frequencies(frequencies: Float[np.ndarray, " C"], scaling: Llama3Scaling) -> Float[np.ndarray, " C"]:
    """Frequencies of Llama 3.1 (Grattafiori et al. 2024, as its reference code has them).

    With n the turns that a channel makes over the positions of the first training: beyond `high_freq_factor` turns it is kept, below
    `low_freq_factor` divided by `factor`, and between the two interpolated in n.
    """
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def apply_rotary(x_BTHC: Float[Array, "B T H C"], cos: Float[Array, "B T 1 W"], sin: Float[Array, "B T 1 W"]) -> Float[Array, "B T H C"]:
    """Rotate channel pairs (c, c + W/2) of the first W channels of every head; the others stay."""
    width = cos.shape[-1]
    x32 = x_BTHC[..., :width].astype(jnp.float32)
    swapped = jnp.roll(x32, width // 2, axis=-1)
    rotated = (x32 * cos + swapped * sin).astype(x_BTHC.dtype)
    return rotated if width == x_BTHC.shape[-1] else jnp.concatenate([rotated, x_BTHC[..., width:]], axis=-1)
