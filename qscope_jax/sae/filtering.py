"""Which tokens count: padding, first positions and outliers of the norm are left out of training, metrics and comparisons alike.

Qwen3 gives the first position of a text, and about one token in a thousand elsewhere, a residual norm 100 to 1,000 times the median.
The released SAEs were trained without them (Qwen-Scope report, section 2.2); the multiple is dictionary_learning's.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_NORM_MULTIPLE = 10.0


def ordinary_tokens(
    x: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"],
    *,
    max_norm_multiple: float = MAX_NORM_MULTIPLE,
    drop_first: bool = True,
) -> Bool[Array, "B T"]:
    """True at tokens that count.

    Args:
        x: Residual stream of one layer.
        segment_ids: Document of each token; 0 is padding.
        max_norm_multiple: Largest norm kept, as a multiple of the median norm of this batch; 0 keeps all.
        drop_first: Leave out the first token of every document.
    """
    mask = segment_ids > 0
    if drop_first:
        mask &= ~first_tokens(segment_ids)
    if max_norm_multiple:
        norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
        mask &= norms <= max_norm_multiple * median_norm(norms, segment_ids > 0)
    return mask


def first_tokens(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the first token of every document (and of every stretch of padding)."""
    return ~jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)))


def median_norm(norms: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Median of the norms of masked-in tokens; 0 when there is none."""
    return jnp.nan_to_num(jnp.nanmedian(jnp.where(mask, norms, jnp.nan)))
