"""Rollouts as the arrays that the policy learns from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from qscope_jax.data.buckets import bucket_length
from qscope_jax.errors import InputError


@runtime_checkable
class Sampled(Protocol):
    """What is needed of a rollout: `models.rollouts.Rollout`."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens drawn."""
        ...

    @property
    def logprobs(self) -> tuple[float, ...]:
        """What the sampler saw of each."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether a stop token ended it."""
        ...

    @property
    def steered(self) -> bool:
        """Whether it felt edits."""
        ...


@dataclass(frozen=True, eq=False)
class PolicyBatch:
    """N completions behind their prompts, padded on the right to T.

    Attributes:
        tokens_BT: Token ids.
        segment_ids: 1 at tokens, 0 at padding.
        mask_BT: Positions whose next token is one of the completion's that counts; see `losses.predicted_mask`.
        sampled_BT: Log-probability that the sampler saw there.
        advantages_B: Advantages.
        steered_B: Rows that were sampled under edits.
        real_B: Rows that are completions; others fill the batch up.
    """

    tokens_BT: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]
    mask_BT: Bool[np.ndarray, "B T"]
    sampled_BT: Float[np.ndarray, "B T"]
    advantages_B: Float[np.ndarray, " B"]
    steered_B: Bool[np.ndarray, " B"]
    real_B: Bool[np.ndarray, " B"]


def policy_batch(
    prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Sampled],
    advantages_N: Float[np.ndarray, " N"],
    *,
    rows: int,
    mask_truncated: bool = False,
    max_steered_tokens: int = 0,
    multiple: int = 1,
) -> PolicyBatch:
    """Lay completions out.

    Args:
        prompts: Token ids of each completion's prompt.
        rollouts: The completions.
        advantages_N: Their advantages.
        rows: B; missing rows are padding, fully masked.
        mask_truncated: Leave out completions that met no stop token: their tokens do not count, though their rewards did. Steered ones stay, as they
            rarely stop and would all go.
        max_steered_tokens: Of a steered completion so many tokens count, from its first on; 0 is all.
        multiple: T is a multiple of it.

    Raises:
        InputError: more completions than rows, or not one prompt and advantage for each.
    """
    count = len(rollouts)
    if not len(prompts) == count == len(advantages_N) or count > rows:
        raise InputError(f"{len(prompts)} prompts, {count} completions and {len(advantages_N)} advantages for {rows} rows; expected one of each")
    longest = max((len(prompt) + len(one.token_ids) for prompt, one in zip(prompts, rollouts, strict=True)), default=1)
    length = -(-bucket_length(longest) // multiple) * multiple
    tokens_BT, segments = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    mask_BT, sampled_BT = np.zeros((rows, length), bool), np.zeros((rows, length), np.float32)
    for row, (prompt, one) in enumerate(zip(prompts, rollouts, strict=True)):
        end = len(prompt) + len(one.token_ids)
        tokens_BT[row, :end] = (*prompt, *one.token_ids)
        segments[row, :end] = 1
        sampled_BT[row, len(prompt) - 1 : end - 1] = one.logprobs
        counted = min(len(one.token_ids), max_steered_tokens) if one.steered and max_steered_tokens else len(one.token_ids)
        mask_BT[row, len(prompt) - 1 : len(prompt) - 1 + counted] = one.stopped or one.steered or not mask_truncated
    advantages_B, steered_B = np.zeros(rows, np.float32), np.zeros(rows, bool)
    advantages_B[:count], steered_B[:count] = advantages_N, [one.steered for one in rollouts]
    return PolicyBatch(tokens_BT, segments, mask_BT, sampled_BT, advantages_B, steered_B, np.arange(rows) < count)
