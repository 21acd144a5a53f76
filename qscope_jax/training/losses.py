"""Losses of fine-tuning, as sums: whoever adds micro-batches and devices up divides once, by the count of the whole optimiser step.

So neither the size of micro-batches nor packing nor the mesh changes a gradient. All sums are float32.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.models.decoder import Decoder


class HeadLosses(NamedTuple):
    """What the vocabulary's scores give at each position, 0 where nothing is predicted; see `head_losses`."""

    cross_entropy_BT: Float[Array, "B T"]
    penalty_BT: Float[Array, "B T"]


def predicted_mask(trained_BT: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Positions whose next token is trained and of the same document: where cross-entropy counts. The last one never is."""
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return jnp.pad(trained_BT[:, 1:] & same, ((0, 0), (0, 1)))


def head_losses(
    decoder: Decoder,
    x_BTD: Float[Array, "B T D"],
    tokens_BT: Int[Array, "B T"],
    predicted_BT: Bool[Array, "B T"],
    unwanted_V: Bool[Array, " V"] | None = None,
    *,
    chunk: int = 0,
) -> HeadLosses:
    """Cross-entropy in nats at each predicting position, and the penalty on unwanted tokens there.

        cross-entropy = -log p(next token)
        penalty       = -log(1 - p_L), p_L the probability of all tokens marked in `unwanted_V`; 0 without them

    Args:
        decoder: Its final norm and head.
        x_BTD: Residual stream after the last layer.
        tokens_BT: Token ids; position t predicts token t + 1.
        predicted_BT: Where to compute, see `predicted_mask`.
        unwanted_V: Tokens to keep down.
        chunk: Positions whose scores are held at a time, in the backward pass too; must divide T. 0 holds all of them.
    """
    targets_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))

    def at(x: Array, targets: Array, predicted: Array) -> HeadLosses:
        logits = decoder.unembed(x)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        zero = jnp.zeros_like(normaliser)
        penalty = zero
        if unwanted_V is not None:  # the others' share, by its own sum: 1 - p_L would round to 0 or 1
            penalty = normaliser - jax.nn.logsumexp(jnp.where(unwanted_V, -jnp.inf, logits), axis=-1)
        return HeadLosses(jnp.where(predicted, normaliser - picked, zero), jnp.where(predicted, penalty, zero))

    return HeadLosses(*_by_chunks(at, (x_BTD, targets_BT, predicted_BT), chunk))


def token_logprobs(
    decoder: Decoder,
    x_BTD: Float[Array, "B T D"],
    tokens_BT: Int[Array, "B T"],
    predicted_BT: Bool[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = 0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of the next token at each predicting position, and the entropy of the distribution there, in nats; 0 elsewhere.

    Both are of softmax(logits / temperature), as rollouts draw. The entropy has no gradient.

    Args:
        decoder: Its final norm and head.
        x_BTD: Residual stream after the last layer.
        tokens_BT: Token ids; position t predicts token t + 1.
        predicted_BT: Where to compute, see `predicted_mask`.
        temperature: Of the draws; above 0.
        chunk: As in `head_losses`.
    """
    targets_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))

    def at(x: Array, targets: Array, predicted: Array) -> tuple[Array, Array]:
        logp = jax.nn.log_softmax(decoder.unembed(x) / temperature, axis=-1)
        picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        fixed = jax.lax.stop_gradient(logp)
        entropy = -jnp.sum(jnp.exp(fixed) * fixed, axis=-1)
        zero = jnp.zeros_like(picked)
        return jnp.where(predicted, picked, zero), jnp.where(predicted, entropy, zero)

    logp_BT, entropy_BT = _by_chunks(at, (x_BTD, targets_BT, predicted_BT), chunk)
    return logp_BT, entropy_BT


def _by_chunks(at: Callable[..., Sequence[Array]], arrays: Sequence[Array], chunk: int) -> list[Array]:
    """What `at` makes of arrays [B, T, ...], `chunk` positions at a time, each computed anew in the backward pass."""
    length = arrays[0].shape[1]
    if not chunk or chunk >= length:
        return list(at(*arrays))

    def parts(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], length // chunk, chunk, *x.shape[2:]), 1, 0)

    found = jax.lax.map(jax.checkpoint(lambda part: tuple(at(*part))), tuple(map(parts, arrays)))
    return [jnp.moveaxis(values, 0, 1).reshape(values.shape[1], length) for values in found]
