import pytest

from qscope_jax.demo.switching_study import ARMS, auxiliary_of
from qscope_jax.errors import InputError
from qscope_jax.training.auxiliary import FeatureCeiling, ScriptPenalty
from tests.training.test_sasft import features  # noqa: F401


def test_arms_differ_in_their_auxiliary_loss_alone(small_model, features):  # noqa: F811
    losses = {arm: auxiliary_of(arm, small_model, "zh", 0.5, features) for arm in ARMS}
    assert losses["sft"] is None and isinstance(losses["penalty"], ScriptPenalty)
    assert isinstance(losses["sasft"], FeatureCeiling) and losses["sasft"].weight == losses["random"].weight == 0.5
    marked = losses["penalty"].unwanted
    assert 0 < int(marked.sum()) < len(marked)


def test_an_unknown_arm_and_features_that_are_missing_are_refused(small_model):
    with pytest.raises(InputError, match="arm 'grpo' is not one of sft"):
        auxiliary_of("grpo", small_model, "zh", 0.5)
    with pytest.raises(InputError, match="arm sasft holds features down"):
        auxiliary_of("sasft", small_model, "zh", 0.5)
