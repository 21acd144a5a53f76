"""How well logits predict tokens, as (sum, weight): divided once, globally, so that micro-batching and sharding change nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def next_token_loss(
    logits_BTV: Float[Array, "B T V"], tokens_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of every token given those before it in its document, in nats.

    Returns:
        Its sum over tokens that have a predecessor in the same document, and their number.
    """
    losses_BT, mask_BT = token_losses(logits_BTV, tokens_BT, segment_ids)
    return jnp.sum(losses_BT), jnp.sum(mask_BT, dtype=jnp.float32)


def token_losses(
    logits_BTV: Float[Array, "B T V"], tokens_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B T-1"], Bool[Array, "B T-1"]]:
    """Cross-entropy of tokens 1 to T-1, 0 where the token begins a document or is padding, and the mask of those that count."""
    targets, logits = tokens_BT[:, 1:], logits_BTV[:, :-1]
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(mask, losses, jnp.float32(0)), mask


def token_divergences(
    logits_BTV: Float[Array, "B T V"], reference_BTV: Float[Array, "B T V"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T-1"]:
    """KL(reference || logits) of the predictions that `token_losses` scores, in nats; 0 where none is scored."""
    p, q = jax.nn.log_softmax(reference_BTV[:, :-1], axis=-1), jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return jnp.where(mask, jnp.sum(jnp.exp(p) * (p - q), axis=-1), jnp.float32(0))
