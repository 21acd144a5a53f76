from typing import NamedTuple

import numpy as np
import pytest

from qscope_jax.training.dapo.policy_batch import policy_batch
from qscope_jax.training.dapo.rewards import Scores
from qscope_jax.training.dapo.rollout_metrics import group_metrics, held_out_metrics, pass_at_k, token_metrics


class Drawn(NamedTuple):
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool = True
    steered: bool = False


LOOP = Drawn((4,) * 80, (-0.1,) * 80, stopped=False, steered=True)
GROUP = [Drawn((7, 1), (-1.0, -3.0)), Drawn((7, 8, 9, 1), (-2.0,) * 4), LOOP]


def scores(totals, outcome=None):
    totals = np.array(totals, float)
    return Scores(totals, {"exact": totals if outcome is None else np.array(outcome, float), "length": -np.ones(len(totals))}, {}, {})


def test_metrics_of_the_policy_leave_steered_members_out():
    given = scores([1.0, -1.0, -2.0], [1, -1, -1])
    found = group_metrics(GROUP, given, 3, given.components["exact"])
    assert (found["reward"], found["reward/exact"], found["accuracy"]) == (0.0, 0.0, 0.5)
    assert (found["length"], found["truncated"], found["repeating"], found["zero_std"]) == (3.0, 0.0, 0.0, 0.0)
    assert (found["steered/reward_gap"], found["steered/repeating"], found["steered/length"]) == (2.0, 1.0, 80.0)


def test_groups_of_equal_rewards_are_counted_and_unscorable_ones_are_not_averaged():
    given = scores([1.0, 1.0, 1.0, np.nan, 2.0, 3.0])
    found = group_metrics([GROUP[0]] * 6, given, 3, given.components["exact"])
    assert found["zero_std"] == 0.5 and found["reward"] == pytest.approx(8 / 5)
    assert "steered/reward_gap" not in found and group_metrics([], scores([]), 3, np.zeros(0)) == {}


def test_the_share_of_one_long_steered_answer_is_said():
    """Seven of 200 tokens at +0.353553 and a steered one of 2,048 at -2.474874: 91 % of |A| times tokens."""
    rows = [Drawn((2,) * 200, (0.0,) * 200)] * 7 + [Drawn((3,) * 2048, (0.0,) * 2048, stopped=False, steered=True)]
    advantages = np.array([0.353553] * 7 + [-2.474874], np.float32)
    found = token_metrics(policy_batch([[5]] * 8, rows, advantages, rows=8))
    assert found["tokens"] == 7 * 200 + 2048
    assert found["steered/token_share"] == pytest.approx(2048 / 3448) and found["steered/abs_adv_token_share"] == pytest.approx(0.911, abs=1e-3)
    assert set(token_metrics(policy_batch([[5]], rows[:1], advantages[:1], rows=1))) == {"tokens"}


def test_held_out_answers_are_counted_by_prompt():
    given = scores([1.0, -1.0, -1.0, -1.0])
    found = held_out_metrics([*GROUP[:2], GROUP[0], GROUP[0]], given, 2, given.components["exact"])
    assert (found["accuracy"], found["pass@2"]) == (0.25, 0.5)
    assert found["surprise"] == pytest.approx((1 + 3 + 8 + 4 + 4) / 10)


def test_pass_at_k_is_the_chance_of_drawing_a_right_one():
    assert pass_at_k(4, 0, 2) == 0 and pass_at_k(4, 4, 1) == 1 and pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
