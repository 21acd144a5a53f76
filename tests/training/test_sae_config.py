import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.training.sae_config import SAEConfig


def test_the_rate_follows_the_width_and_warms_up_and_decays():
    for thousands, expected in ((16, 2e-4), (32, 1.41e-4), (64, 1e-4), (80, 0.89e-4), (128, 0.71e-4)):
        assert SAEConfig(thousands * 1024, 50, 100_000).schedule()(50_000) == pytest.approx(expected, rel=0.01)
    schedule = SAEConfig(16384, 50, 10_000, learning_rate=1.0).schedule()
    steps = {0: 0, 500: 0.5, 1000: 1, 7999: 1, 9000: 0.5, 9999: 0.0005, 10_000: 0}
    assert {step: float(schedule(step)) for step in steps} == pytest.approx(steps, abs=1e-6)
    assert SAEConfig(16384, 50, 100, learning_rate=1.0).schedule()(10) == 1
    assert SAEConfig(16384, 50, 100, learning_rate=0.0).schedule()(50) == 0


@pytest.mark.parametrize(
    "changes",
    [{"k": 0}, {"k": 41}, {"steps": 0}, {"decay_share": 1.5}, {"dead_after_tokens": 0}, {"aux_k": 0},
     {"activation": "relu"}, {"compute_dtype": "float16"}, {"max_active": 3}, {"max_active": 41}, {"ema": 1.0}, {"bandwidth": 0.0},
     {"micro_batches": 0}, {"num_seeds": 0}, {"activation": "jumprelu", "multi_topk_weight": 0.1}],
)  # fmt: skip
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        SAEConfig(**{"num_features": 40, "k": 4, "steps": 10, **changes})


def test_a_code_has_k_slots_or_room_for_tokens_with_more():
    assert SAEConfig(64, 4, 10).slots == 4
    assert SAEConfig(64, 4, 10, activation="batch_topk").slots == 16
    assert SAEConfig(10, 4, 10, activation="jumprelu").slots == 10
    assert SAEConfig(64, 4, 10, activation="jumprelu", max_active=9).slots == 9


def test_the_penalty_of_jumprelu_warms_up():
    schedule = SAEConfig(64, 4, 10_000, activation="jumprelu", sparsity_weight=3.0, sparsity_warmup_steps=500).sparsity_schedule()
    assert [float(schedule(step)) for step in (0, 250, 500, 9000)] == [0, 1.5, 3, 3]
