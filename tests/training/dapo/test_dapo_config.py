from dataclasses import replace

import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.training.dapo.dapo_config import DAPOConfig

SETTINGS = DAPOConfig(steps=4, num_prompts=2, num_generations=4)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num_generations": 1}, "num_generations is 1"), ({"num_steered": 4}, "num_steered is 4"), ({"temperature": 0.0}, "greedy"),
     ({"scale_rewards": "all"}, "scale_rewards is all"), ({"epsilon_high": 0.1}, "epsilon_high is 0.1"), ({"num_mini_batches": 3}, "8 answers"),
     ({"num_steered": 3, "dynamic_sampling": True}, "two of them"), ({"max_steered_tokens": -1}, "max_steered_tokens is -1"),
     ({"min_entropy": 2.0, "max_entropy": 1.0}, "the first below the second"), ({"min_entropy": -1.0}, "min_entropy is -1")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        replace(SETTINGS, **change)


def test_the_last_members_are_steered_and_every_update_counts_for_the_schedule():
    config = replace(SETTINGS, num_steered=2, num_iterations=3, num_mini_batches=2)
    assert config.steered_members == (2, 3) and config.num_rows == 8 and config.drawn_prompts == 2
    assert config.updates == 4 * 3 * 2 and replace(config, gen_batch_size=5).drawn_prompts == 5
