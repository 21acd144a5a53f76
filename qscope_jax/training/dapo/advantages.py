"""Advantages: how much better an answer is than the others to the same prompt. On the host, in float64.

In float32 eight equal rewards of 0.2 have an advantage of -0.015, by the rounding of their mean; here equal rewards give exactly 0.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from qscope_jax.errors import ConfigError, ShapeError

SCALES = ("group", "batch", "none")
_LARGEST = 1e30
"""Beyond this a reward counts as not finite: squares and differences of the rest stay inside their types."""


class GroupAdvantages(NamedTuple):
    """Advantages of N completions.

    Attributes:
        advantages_N: float32, the same for every token of a completion.
        counts: `groups`; `zero_variance`, groups whose rewards are all equal; `unscorable`, rewards that are not finite; `too_few`, groups with
            fewer than two finite ones. Completions of the last three have advantage 0.
    """

    advantages_N: Float[np.ndarray, " N"]
    counts: Mapping[str, int]


def group_advantages(
    rewards_N: Float[np.ndarray, " N"], group_size: int, *, scale_rewards: str = "group", advantage_eps: float = 1e-6
) -> GroupAdvantages:
    """A = (R - mean of the group) / (std + advantage_eps), with the unbiased std, as TRL, verl and tunix have it.

    Rewards that are not finite are left out of mean and std, and get A = 0.

    Args:
        rewards_N: Rewards; completions of a prompt stand next to each other.
        group_size: Completions of a prompt, 2 or more.
        scale_rewards: Std of the `group`, of the whole `batch`, or `none`: no division.
        advantage_eps: Added to the std.

    Raises:
        ConfigError: groups of fewer than 2, an unknown scale, or a negative epsilon.
        ShapeError: rewards that are not whole groups.
    """
    if group_size < 2:
        raise ConfigError(f"num_generations is {group_size}; expected 2 or more, an answer is compared with others to its prompt")
    if scale_rewards not in SCALES:
        raise ConfigError(f"scale_rewards is {scale_rewards!r}, expected one of {', '.join(SCALES)}")
    if not 0 <= advantage_eps < np.inf:
        raise ConfigError(f"advantage_eps is {advantage_eps}, expected 0 or more")
    if len(rewards_N) % group_size:
        raise ShapeError(f"{len(rewards_N)} rewards are not whole groups of {group_size}; give one for each completion")
    rewards_PG = rewards_N.astype(np.float64).reshape(-1, group_size)
    scored_PG = np.abs(rewards_PG) < _LARGEST
    found_P1 = scored_PG.sum(axis=1, keepdims=True)
    # By their extremes: a std of equal rewards may round to more than 0.
    varied_P1 = differs_inside(rewards_PG, scored_PG)[:, None]
    means_P1 = np.where(scored_PG, rewards_PG, 0).sum(axis=1, keepdims=True) / np.maximum(found_P1, 1)
    centred_PG = np.where(scored_PG & varied_P1, rewards_PG - means_P1, 0)
    if scale_rewards == "none":
        scale = np.ones((1, 1))
    elif scale_rewards == "group":
        scale = np.sqrt((centred_PG**2).sum(axis=1, keepdims=True) / np.maximum(found_P1 - 1, 1)) + advantage_eps
    else:
        scale = np.full((1, 1), np.std(rewards_PG[scored_PG], ddof=1) if found_P1.sum() > 1 else 0.0) + advantage_eps
    advantages_PG = np.divide(centred_PG, scale, out=np.zeros_like(centred_PG), where=scale > 0)
    counts = {
        "groups": len(rewards_PG),
        "zero_variance": int(((found_P1 > 1) & ~varied_P1).sum()),
        "unscorable": int((~scored_PG).sum()),
        "too_few": int((found_P1 < 2).sum()),
    }
    return GroupAdvantages(advantages_PG.astype(np.float32).reshape(-1), counts)


def differs_inside(values_PG: Float[np.ndarray, "P G"], counted_PG: Bool[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """Whether counted values differ inside each group; not where fewer than two count."""
    highest_P = np.where(counted_PG, values_PG, -np.inf).max(axis=1)
    lowest_P = np.where(counted_PG, values_PG, np.inf).min(axis=1)
    return highest_P > lowest_P
