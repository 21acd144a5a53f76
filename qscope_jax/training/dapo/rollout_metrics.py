"""What rollouts were like: rewards by part, lengths, repetition, how steered members differ, pass@k. On the host."""

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from qscope_jax.features.repetition.endless_repetition import endless_repetition
from qscope_jax.training.dapo.policy_batch import PolicyBatch, Sampled
from qscope_jax.training.dapo.rewards import Scores


def group_metrics(rollouts: Sequence[Sampled], scores: Scores, group_size: int, outcome_N: Float[np.ndarray, " N"]) -> dict[str, float]:
    """Metrics of a step's rollouts; those of the policy are of normal members alone.

    `reward` and `reward/NAME` (means; of each part unweighted), `accuracy` (share of outcomes above 0), `length` (tokens), `truncated`, `repeating`
    (shares), `zero_std` (share of groups whose rewards are all equal); and where members are steered `steered/reward_gap` (normal less steered),
    `steered/repeating` and `steered/length`.

    Args:
        rollouts: Whole groups behind each other.
        scores: Their rewards.
        group_size: Members of a group.
        outcome_N: The task's own outcome of each.
    """
    if not rollouts:
        return {}
    steered_N = np.array([one.steered for one in rollouts], bool)
    normal_N = ~steered_N
    totals_PG = scores.totals_N.reshape(-1, group_size)
    found = {
        "reward": _mean(scores.totals_N[normal_N]),
        **{f"reward/{name}": _mean(values[normal_N]) for name, values in scores.components.items()},
        **_answers(rollouts, outcome_N, normal_N),
        "zero_std": float(np.mean([_all_equal(group) for group in totals_PG])),
    }
    if steered_N.any():
        found["steered/reward_gap"] = found["reward"] - _mean(scores.totals_N[steered_N])
        found |= {f"steered/{name}": value for name, value in _answers(rollouts, outcome_N, steered_N).items() if name in ("repeating", "length")}
    return found


def token_metrics(batch: PolicyBatch) -> dict[str, float]:
    """How much of a step's tokens, and of their advantages, is the steered members'.

    `tokens` (that count), `steered/token_share` and `steered/abs_adv_token_share` (of the sum of |A| over tokens): one steered answer that never
    stops may outweigh all others.
    """
    tokens_B = batch.mask_BT.sum(axis=1)
    weights_B = tokens_B * np.abs(batch.advantages_B.astype(np.float64))
    found = {"tokens": float(tokens_B.sum())}
    if batch.steered_B.any():
        for name, values in (("token_share", tokens_B), ("abs_adv_token_share", weights_B)):
            total = float(values.sum())
            found[f"steered/{name}"] = float(values[batch.steered_B].sum()) / total if total else 0.0
    return found


def held_out_metrics(rollouts: Sequence[Sampled], scores: Scores, samples: int, outcome_N: Float[np.ndarray, " N"]) -> dict[str, Any]:
    """Metrics of unsteered answers to held-out prompts, `samples` of each behind each other.

    `reward` and its parts, `accuracy`, `length`, `truncated`, `repeating`, `surprise` (minus the mean log-probability of the tokens drawn, an
    estimate of the entropy), and `pass@k` for k = `samples`.
    """
    every = np.ones(len(rollouts), bool)
    logprobs = [value for one in rollouts for value in one.logprobs]
    right_P = (outcome_N.reshape(-1, samples) > 0).sum(axis=1)
    return {
        "reward": _mean(scores.totals_N),
        **{f"reward/{name}": _mean(values) for name, values in scores.components.items()},
        **_answers(rollouts, outcome_N, every),
        "surprise": -float(np.mean(logprobs)) if logprobs else 0.0,
        f"pass@{samples}": float(np.mean([pass_at_k(samples, int(right), samples) for right in right_P])),
    }


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k answers is right, from `samples` answers of which `right` are (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def _answers(rollouts: Sequence[Sampled], outcome_N: Float[np.ndarray, " N"], which_N: Bool[np.ndarray, " N"]) -> dict[str, float]:
    chosen = [one for one, keep in zip(rollouts, which_N, strict=True) if keep]
    return {
        "accuracy": _mean(np.where(np.isfinite(outcome_N[which_N]), outcome_N[which_N] > 0, np.nan)),
        "length": float(np.mean([len(one.token_ids) for one in chosen])),
        "truncated": float(np.mean([not one.stopped for one in chosen])),
        "repeating": float(np.mean([endless_repetition(one.token_ids, stopped=one.stopped) is not None for one in chosen])),
    }


def _all_equal(rewards_G: Float[np.ndarray, " G"]) -> bool:
    scored = rewards_G[np.isfinite(rewards_G)]
    return len(scored) < 2 or bool(scored.max() == scored.min())


def _mean(values: np.ndarray) -> float:
    """Over values that are finite; NaN where none is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
