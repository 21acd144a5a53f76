from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.training.dapo.policy_batch import policy_batch
from qscope_jax.training.losses import predicted_mask


class Drawn(NamedTuple):
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool = True
    steered: bool = False


PROMPTS = [[5, 6, 7], [8]]
DRAWN = [Drawn((9, 1), (-0.5, -0.25)), Drawn((2, 3, 4), (-1.0, -2.0, -3.0), stopped=False)]
ADVANTAGES = np.array([0.5, -0.5], np.float32)


def test_completions_stand_behind_their_prompts_and_the_mask_is_where_they_are_predicted():
    batch = policy_batch(PROMPTS, DRAWN, ADVANTAGES, rows=3)
    assert batch.tokens_BT.shape == (3, 16) and batch.tokens_BT[0, :5].tolist() == [5, 6, 7, 9, 1] and batch.tokens_BT[1, :4].tolist() == [8, 2, 3, 4]
    completion = np.zeros((3, 16), bool)
    completion[0, 3:5] = completion[1, 1:4] = True
    np.testing.assert_array_equal(batch.mask_BT, predicted_mask(jnp.asarray(completion), jnp.asarray(batch.segment_ids)))
    assert batch.sampled_BT[0, 2:4].tolist() == [-0.5, -0.25] and batch.sampled_BT[1, :3].tolist() == [-1, -2, -3]
    assert batch.real_B.tolist() == [True, True, False] and not batch.mask_BT[2].any() and not batch.segment_ids[2].any()
    assert batch.advantages_B.tolist() == [0.5, -0.5, 0]


def test_truncated_completions_are_masked_when_asked_for_unless_they_are_steered():
    batch = policy_batch(PROMPTS, DRAWN, ADVANTAGES, rows=2, mask_truncated=True)
    assert batch.mask_BT[0].sum() == 2 and not batch.mask_BT[1].any() and batch.advantages_B[1] == -0.5
    steered = [DRAWN[0], DRAWN[1]._replace(steered=True)]
    batch = policy_batch(PROMPTS, steered, ADVANTAGES, rows=2, mask_truncated=True)
    assert batch.mask_BT[1].sum() == 3 and batch.steered_B.tolist() == [False, True]


def test_steered_completions_are_learnt_from_up_to_a_length_and_others_whole():
    drawn = [DRAWN[0], DRAWN[1]._replace(steered=True)]
    batch = policy_batch(PROMPTS, drawn, ADVANTAGES, rows=2, max_steered_tokens=1)
    assert np.flatnonzero(batch.mask_BT[0]).tolist() == [2, 3] and np.flatnonzero(batch.mask_BT[1]).tolist() == [0]
    assert batch.tokens_BT[1, :4].tolist() == [8, 2, 3, 4]
    np.testing.assert_array_equal(policy_batch(PROMPTS, drawn, ADVANTAGES, rows=2, max_steered_tokens=5).mask_BT.sum(axis=1), [2, 3])


def test_an_empty_completion_counts_nothing():
    batch = policy_batch([[5]], [Drawn((), (), stopped=False)], np.zeros(1, np.float32), rows=1)
    assert not batch.mask_BT.any()


def test_lengths_are_rounded_as_asked_and_what_does_not_fit_is_refused():
    assert policy_batch(PROMPTS, DRAWN, ADVANTAGES, rows=2, multiple=12).tokens_BT.shape[1] == 24
    with pytest.raises(InputError, match="2 prompts, 2 completions and 2 advantages for 1 rows"):
        policy_batch(PROMPTS, DRAWN, ADVANTAGES, rows=1)
