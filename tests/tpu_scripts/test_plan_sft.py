import json
from collections.abc import Callable

import pytest
import yaml

from tests.tpu_scripts.planned import GIB, MATRICES, MODEL, Answer
from tpu_scripts.plan_sft import main

RUN = {
    "data": "nowhere.jsonl",
    "out": "runs/x",
    "method": "sasft",
    "features": "nowhere",
    "batch_size": 8,
    "length": 32,
    "micro_batches": 2,
    "head_chunk": 16,
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": str(tmp_path / "model"), **RUN}))
    return tmp_path / "run.yaml"


@pytest.fixture
def plan(capsys, abstract_arrays) -> Callable[..., Answer]:
    """Run the program in this process, on its virtual devices."""

    def run(*arguments: object) -> Answer:
        with abstract_arrays():
            status = main([str(argument) for argument in arguments])
        return Answer(status, *capsys.readouterr())

    return run


def test_a_plan_adds_up_weights_masters_moments_and_the_step(plan, config, tmp_path):
    done = plan("--config", config, "--topology", "cpu:4", "--mesh", "fsdp=4", "--memory", "0.0001", "--out", tmp_path / "plan.json")
    assert done.status == 2 and "do not fit into its 0.0001; try a larger slice, another mesh, more micro_batches" in done.err.splitlines()[-1]
    found = json.loads((tmp_path / "plan.json").read_text())
    gib = found["gib"]
    assert MATRICES * 2 / 4 <= gib["weights"] * GIB <= 1.05 * MATRICES * 2 / 4
    # Parameters and both moments in float32, split as the weights are.
    assert 3 * MATRICES * 4 / 4 <= gib["state"] * GIB <= 1.05 * 3 * MATRICES * 4 / 4
    assert gib["together"] == pytest.approx(gib["weights"] + gib["state"] + gib["step"])
    assert any(kind["kind"] == "all-gather" for kind in found["collectives"]["step"])
    for shown in ("sasft, all weights, 8 rows of 32 tokens in 2 parts, on cpu:4", "trained parameters and Adam's moments"):
        assert shown in done.out


def test_adapters_hold_a_small_state_and_no_second_copy(plan, config, tmp_path):
    done = plan("--config", config, "--topology", "cpu:1", "--lora-rank", 2, "--memory", 1, "--out", tmp_path / "plan.json")
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["gib"]["state"] < 0.5 * found["gib"]["weights"] and "adapters of rank 2" in done.out
    assert found["collectives"] == {"step": []}


def test_rows_that_the_mesh_does_not_divide_and_unknown_models_are_one_line(plan, config):
    done = plan("--config", config, "--topology", "cpu:8", "--mesh", "data=8")
    assert done.status == 2 and "4 rows does not lie over data and fsdp, 8 shards" in done.err
    done = plan("--config", config, "--topology", "cpu:1", "--model", "Qwen/Qwen9-1B")
    assert done.status == 2 and "no config is known here" in done.err
