from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.demo.dapo_study import ARMS, Answers, ask, cold_start, edits_of, repetition_features, run_arm
from qscope_jax.demo.repetition import sums
from qscope_jax.errors import InputError
from qscope_jax.models.rollouts import Rollout
from qscope_jax.sae.autoencoder import SparseAutoencoder
from qscope_jax.sae.layer_sae import LayerSAE
from tests.demo.conftest import SMALL_DAPO, some_repetition_features


@pytest.fixture(scope="module")
def saes():
    rng = np.random.default_rng(0)
    W = [jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for _ in range(2)]
    return [LayerSAE(SparseAutoencoder(w, w, jnp.zeros(64), jnp.zeros(32), k=4), layer) for layer, w in enumerate(W)]


def test_answers_are_counted_by_prompt():
    rows = sums(2)
    circle = tuple([7, 8] * 40)
    rollouts = [Rollout(0, 0, circle, (0.0,) * 80, False, False), Rollout(0, 1, (5,), (0.0,), True, False),
                Rollout(1, 0, circle[:40], (0.0,) * 40, False, False), Rollout(1, 1, circle, (0.0,) * 80, True, False)]  # fmt: skip
    answers = Answers(rows, rollouts, [": 1", f"1 , 2 : {rows[0].columns['answer']}", rows[1].columns["answer"], "none"])
    assert answers.repeating() == [1, 0] and answers.right() == [1, 1]


def test_arms_differ_in_what_the_steered_member_feels(small_model, saes):
    edits = {arm: edits_of(arm, small_model, saes, some_repetition_features(), SMALL_DAPO, seed=3) for arm in ARMS}
    assert edits["vanilla"] == [] and len(edits["steered"]) == len(edits["random"]) == 2
    for one, other in zip(edits["steered"], edits["random"], strict=True):
        added = [np.linalg.norm(np.asarray(edit.directions_WD), axis=1) * np.abs(np.asarray(edit.strengths_BW)[0]) for edit in (one, other)]
        assert added[0].shape == (2,) and np.ptp(added[0]) < 1e-3 * added[0][0]
        np.testing.assert_allclose(*added, rtol=1e-4)
    with pytest.raises(InputError, match="arm 'grpo' is not one of vanilla"):
        edits_of("grpo", small_model, saes, some_repetition_features(), SMALL_DAPO)


def test_arms_begin_alike_and_are_measured_every_so_often_and_at_the_end(small_model, saes):
    start = cold_start(small_model, SMALL_DAPO)
    edits = edits_of("steered", start, saes, some_repetition_features(), SMALL_DAPO)
    plain, steered = run_arm(start, SMALL_DAPO), run_arm(start, SMALL_DAPO, edits)
    assert plain.steps == steered.steps == [0, 2, 3] and len(plain.metrics) == 3
    assert plain.right[0] == steered.right[0] and plain.repeating["open"][0] == steered.repeating["open"][0]
    assert "steered/reward_gap" in steered.metrics[0] and "steered/reward_gap" not in plain.metrics[0]
    assert all(len(counts) == 3 for counts in plain.repeating.values())


def test_a_model_that_never_repeats_has_no_features_of_repetition(small_model, saes):
    with pytest.raises(InputError, match="0 of 32 samples end in endless repetition|0 of 0 samples"):
        repetition_features(small_model, saes, replace(SMALL_DAPO, prompts=16), 2)
    assert len(ask(small_model, sums(3), SMALL_DAPO, samples=1).texts) == 3
