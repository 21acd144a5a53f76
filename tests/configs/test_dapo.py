from pathlib import Path

import pytest

from qscope_jax.cli.dapo import Config, read_rewards
from qscope_jax.cli.options import parse
from qscope_jax.training.dapo.rewards import load_rewards

FILES = sorted((Path(__file__).parents[2] / "configs" / "dapo").glob("qwen3*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_run_is_read_its_rewards_are_known_and_its_header_says_the_three_arms(file):
    config = parse("dapo train", Config, ["--config", str(file)])
    assert config.num_steered == 0 and config.num_generations >= 4
    assert len(load_rewards(read_rewards(config.rewards), max_completion_len=config.max_completion_length)) == len(config.rewards)
    header = file.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert f"qscope dapo train --config configs/dapo/{file.name}" in header and "--steer-control random" in header and "--num-steered 1" in header
