import json

import pytest
import yaml

from tests.tpu_scripts.planned import GIB, MATRICES, MODEL, Answer
from tpu_scripts.plan_dapo import main

RUN = {
    "data": "nowhere.jsonl", "out": "runs/x", "num_prompts": 2, "num_generations": 4, "max_prompt_length": 16, "max_completion_length": 16,
    "micro_batches": 2, "head_chunk": 16, "rewards": ["exact_match"],
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": str(tmp_path / "model"), **RUN}))
    return tmp_path / "run.yaml"


@pytest.fixture
def plan(capsys, abstract_arrays):
    def run(*arguments: object) -> Answer:
        with abstract_arrays():
            status = main([str(argument) for argument in arguments])
        return Answer(status, *capsys.readouterr())

    return run


def test_rollouts_and_updates_are_planned_together(plan, config, tmp_path):
    done = plan("--config", config, "--topology", "cpu:4", "--mesh", "fsdp=4", "--memory", "0.0001", "--out", tmp_path / "plan.json")
    assert done.status == 2 and "do not fit into its 0.0001; try a larger slice" in done.err.splitlines()[-1]
    found = json.loads((tmp_path / "plan.json").read_text())
    gib = found["gib"]
    assert 3 * MATRICES * 4 / 4 <= gib["state"] * GIB <= 1.05 * 3 * MATRICES * 4 / 4
    # Keys and values of four layers: eight rows over four devices, two heads of 16, 32 slots, bfloat16.
    assert gib["rollout"] * GIB >= 4 * 2 * (8 / 4) * 2 * 16 * 32 * 2
    assert gib["together"] == pytest.approx(gib["weights"] + gib["state"] + max(gib["policy"] + gib["rollout"], gib["update"]))
    assert "8 answers of up to 16 tokens to prompts of up to 16, 8 drawn at a time" in done.out and found["collectives"]["update"]


def test_groups_of_one_are_one_line(plan, config):
    done = plan("--config", config, "--topology", "cpu:1", "--num-generations", 1)
    assert done.status == 2 and "num_generations is 1" in done.err
