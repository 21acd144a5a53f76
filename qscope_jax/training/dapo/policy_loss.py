"""The clipped policy loss of DAPO and its relatives, from log-probabilities of the sampled tokens.

    r    = exp(log p - log p_old)                              of each token, or of a completion's mean
    loss = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) with r capped at `delta` in the first term (dual clip)
           + beta * (exp(d) - d - 1), d = log p_ref - log p    estimate of the divergence from a reference policy

A micro-batch contributes sums that are already divided by counts of the whole optimiser step, so that neither micro-batches nor the mesh nor
padding changes the gradient. Options have TRL's names. The value of the loss does not measure progress.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qscope_jax.errors import ConfigError, InputError

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "bnpo")
LEVELS = ("token", "sequence")
MAX_LOG_RATIO = 20.0
"""Log-ratios are cut to this on either side, before `exp`."""


@dataclass(frozen=True)
class PolicyLossConfig:
    """Clipping and aggregation."""

    loss_type: str = "dapo"
    """How token losses are added up. `dapo`: mean over all tokens of the step; `grpo`: mean over completions of their token means; `dr_grpo`: sum /
    (completions * longest completion); `bnpo`: token mean of each micro-batch, which depends on how the step is split."""
    epsilon: float = 0.2
    """A ratio below 1 - epsilon has no gradient where the advantage is negative."""
    epsilon_high: float = 0.28
    """A ratio above 1 + epsilon_high has none where it is positive."""
    delta: float | None = None
    """Dual clip: a ratio above has no gradient where the advantage is negative. None: no such cap."""
    importance_sampling_level: str = "token"
    """`token`, or `sequence`: one ratio for a completion, from the mean over its tokens; meant for `grpo`."""
    beta: float = 0.0
    """Weight of the divergence from the reference policy; 0 needs none."""

    def __post_init__(self):
        """Check ranges."""
        for name, known in (("loss_type", LOSS_TYPES), ("importance_sampling_level", LEVELS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if not 0 <= self.epsilon < 1:
            raise ConfigError(f"epsilon is {self.epsilon}, expected 0 or more and below 1")
        if not self.epsilon <= self.epsilon_high < float("inf"):
            raise ConfigError(f"epsilon_high is {self.epsilon_high}, expected at least epsilon, which is {self.epsilon}")
        if self.delta is not None and not 1 + self.epsilon_high <= self.delta < float("inf"):
            raise ConfigError(f"delta is {self.delta}, expected at least 1 + epsilon_high, {1 + self.epsilon_high:g}: below it would clip gains too")
        if not 0 <= self.beta < float("inf"):
            raise ConfigError(f"beta is {self.beta}, expected 0 or more")

    @property
    def advice(self) -> str:
        """What is unusual about the settings, to be shown once; empty where nothing is."""
        if self.importance_sampling_level == "sequence" and self.loss_type != "grpo":
            return (
                f"importance_sampling_level sequence is meant for loss_type grpo; with {self.loss_type} long answers weigh more than their ratio says"
            )
        if self.loss_type == "bnpo":
            return "loss_type bnpo depends on the size of micro-batches; dapo is the same mean without that"
        return ""


class PolicyCounts(NamedTuple):
    """What sums are divided by, of the whole optimiser step: all its micro-batches, all devices.

    Attributes:
        tokens: Active tokens.
        rows: Completions, fully masked ones included.
    """

    tokens: Float[Array, ""]
    rows: Float[Array, ""]


def policy_counts(mask_BT: Bool[Array, "B T"], real_B: Bool[Array, " B"] | None = None) -> PolicyCounts:
    """Counts of an optimiser step from the mask of all its rows.

    Args:
        mask_BT: Active tokens.
        real_B: Rows that are completions; the others fill a batch up and are not counted. By default all are.
    """
    rows = jnp.float32(mask_BT.shape[0]) if real_B is None else jnp.sum(real_B, dtype=jnp.float32)
    return PolicyCounts(jnp.sum(mask_BT, dtype=jnp.float32), rows)


def policy_loss(
    logp_BT: Float[Array, "B T"],
    old_logp_BT: Float[Array, "B T"],
    advantages_B: Float[Array, " B"],
    mask_BT: Bool[Array, "B T"],
    counts: PolicyCounts,
    config: PolicyLossConfig,
    *,
    width: int,
    reference_logp_BT: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What a micro-batch adds to the loss of its optimiser step, in float32; masked positions may hold anything, NaN included.

    Args:
        logp_BT: Log-probability of each sampled token under the policy that learns; the gradient flows here alone.
        old_logp_BT: The same under the policy before the step's first update, never a steered or otherwise changed one; with one update to a
            rollout it is `logp_BT` itself, for which r = 1 and the gradient is that of -A log p.
        advantages_B: Advantages.
        mask_BT: Tokens that count: those of the completion, its first stop token included.
        counts: Of the whole optimiser step, see `policy_counts`.
        config: Clipping and aggregation.
        width: Longest completion that could be sampled, what `dr_grpo` divides by; not the padded T.
        reference_logp_BT: Log-probabilities under the reference policy, where `beta` is above 0.

    Returns:
        The loss, and sums over active tokens, to be divided by `counts.tokens` once all micro-batches are added up: `clip_low` (A < 0 and
        r < 1 - epsilon) and `clip_high` (A > 0 and r > 1 + epsilon_high), in number; `clip_dual` (A < 0 and r > delta) with `delta`; `ratio`;
        `old_kl`, estimate of the divergence from the policy before; `kl` with `beta`, that from the reference.

    Raises:
        InputError: reference log-probabilities are missing, or given without `beta`; a width below 1.
    """
    if (config.beta > 0) != (reference_logp_BT is not None):
        said = "missing" if reference_logp_BT is None else "given for nothing"
        raise InputError(f"beta is {config.beta:g} and the reference's log-probabilities are {said}; they belong together")
    if width < 1:
        raise InputError(f"the longest completion has {width} tokens, expected 1 or more")
    logp, old = logp_BT.astype(jnp.float32), jax.lax.stop_gradient(old_logp_BT.astype(jnp.float32))
    A_B1 = jax.lax.stop_gradient(advantages_B.astype(jnp.float32))[:, None]
    log_ratio = _log_ratio(logp, old, mask_BT)
    if config.importance_sampling_level == "sequence":
        log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True, dtype=jnp.float32), 1)
    log_ratio = jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    capped = ratio if config.delta is None else jnp.minimum(ratio, config.delta)
    loss_BT = -jnp.minimum(capped * A_B1, jnp.clip(ratio, 1 - config.epsilon, 1 + config.epsilon_high) * A_B1)
    measured = {
        "clip_low": (A_B1 < 0) & (ratio < 1 - config.epsilon),
        "clip_high": (A_B1 > 0) & (ratio > 1 + config.epsilon_high),
        "ratio": ratio,
        "old_kl": jnp.expm1(log_ratio) - log_ratio,
    }
    if config.delta is not None:
        measured["clip_dual"] = (A_B1 < 0) & (ratio > config.delta)
    if reference_logp_BT is not None:
        reference = jax.lax.stop_gradient(reference_logp_BT.astype(jnp.float32))
        d_BT = jnp.clip(_log_ratio(reference, logp, mask_BT), -MAX_LOG_RATIO, MAX_LOG_RATIO)
        measured["kl"] = jnp.expm1(d_BT) - d_BT  # as exp(d) - d - 1, which would round to 0 or below near d = 0
        loss_BT += config.beta * measured["kl"]
    sums = {name: jax.lax.stop_gradient(_masked_sum(values.astype(jnp.float32), mask_BT)) for name, values in measured.items()}
    return _aggregated(loss_BT, mask_BT, counts, config.loss_type, width), sums


def _log_ratio(logp_BT: Array, other_BT: Array, mask_BT: Array) -> Array:
    """Their difference where the mask is; both are replaced elsewhere, before anything that could turn them into NaN in the backward pass."""
    return jnp.where(mask_BT, logp_BT, 0.0) - jnp.where(mask_BT, other_BT, 0.0)


def _masked_sum(values: Array, mask_BT: Array, axis: int | None = None) -> Array:
    """Sum over active tokens; a value for a row counts at each of its tokens."""
    return jnp.sum(jnp.where(mask_BT, values, 0.0), axis=axis)


def _aggregated(loss_BT: Array, mask_BT: Array, counts: PolicyCounts, loss_type: str, width: int) -> Array:
    rows = jnp.maximum(counts.rows, 1)
    if loss_type == "dapo":
        return _masked_sum(loss_BT, mask_BT) / jnp.maximum(counts.tokens, 1)
    if loss_type == "dr_grpo":
        return _masked_sum(loss_BT, mask_BT) / (rows * width)
    if loss_type == "grpo":
        return jnp.sum(_masked_sum(loss_BT, mask_BT, axis=1) / jnp.maximum(jnp.sum(mask_BT, axis=1, dtype=jnp.float32), 1)) / rows
    # A micro-batch's share of the step's rows, so that its means add up to the mean of means.
    share = mask_BT.shape[0] / rows
    return share * _masked_sum(loss_BT, mask_BT) / jnp.maximum(jnp.sum(mask_BT, dtype=jnp.float32), 1)
