import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.tpu_scripts.planned import GIB, MODEL, Answer
from tpu_scripts.plan import main

ROOT = Path(__file__).parents[2]
RUN = {"out": "runs/x", "num_features": 512, "k": 8, "batch_tokens": 256, "buffer_batches": 4, "lanes": 4, "sequence_length": 32, "model_batch": 8}
libtpu_only = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture
def config(tmp_path) -> Path:
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


@pytest.fixture
def plan_alone(tmp_path) -> Callable[..., Answer]:
    """Run it in a process of its own, as libtpu needs it."""

    def run(*arguments: object) -> Answer:
        command = [sys.executable, "-m", "tpu_scripts.plan", *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "XLA_"))}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**environment, "COLUMNS": "120"}, timeout=240)
        return Answer(done.returncode, done.stdout, done.stderr)

    return run


def said(answer: Answer) -> str:
    """The program's own error line; libtpu may log others."""
    assert answer.status == 2 and "Traceback" not in answer.err, answer.err
    (line,) = [line for line in answer.err.splitlines() if line.startswith("plan: error: ")]
    return line


def test_a_plan_adds_up_what_a_device_holds_and_says_what_does_not_fit(plan, config, tmp_path):
    done = plan("--config", config, "--topology", "cpu:4", "--mesh", "data=2,fsdp=2", "--memory", "0.001", "--out", tmp_path / "plan.json")
    assert "do not fit into its 0.001" in said(done)
    found = json.loads((tmp_path / "plan.json").read_text())
    gib = found["gib"]
    # 4 layers over 2 of fsdp; 4 lanes over 2 of data, each with its share of 4 batches of 256 and of a model batch of 8 rows of 32; bfloat16.
    assert gib["buffer"] * GIB == 2 * 2 * (4 * 256 + 8 * 32) / 4 * 64 * 2
    # Parameters and both moments in float32, a counter a feature; two SAEs a device.
    state = 2 * (3 * (2 * 512 * 64 + 512 + 64) * 4 + 512 * 4)
    assert state <= gib["state"] * GIB <= 1.02 * state
    # All matrices are split by fsdp.
    weights = (256 * 64 + 4 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128)) * 2 / 2
    assert weights <= gib["weights"] * GIB <= 1.02 * weights
    parts = gib["weights"] + gib["state"] + gib["buffer"]
    assert gib["together"] == pytest.approx(parts + max(gib["refill"], gib["sae"]))
    assert found["mesh"] == {"data": 2, "fsdp": 2} and found["saes"] == 4
    assert found["flops"]["device"] == (found["flops"]["model"] + found["flops"]["saes"]) / 4
    # Gradients of data shards are summed.
    assert any(kind["kind"] == "all-reduce" for kind in found["collectives"]["sae"])
    for shown in ("4 SAEs of 512 features, 8 active, on cpu:4 (4 chips), data=2,fsdp=2", "activation buffer", "all-reduce", "a device has 0.001 GiB"):
        assert shown in done.out


def test_flags_of_the_verb_change_the_plan(plan, config, tmp_path):
    done = plan("--config", config, "--topology", "cpu:1", "--layers", "1", "--buffer-batches", "2", "--memory", "1", "--out", tmp_path / "plan.json")
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["saes"] == 1 and found["gib"]["buffer"] * GIB == (2 * 256 + 8 * 32) * 64 * 2
    assert found["collectives"] == {"model": [], "sae": []} and "no collectives" in done.out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--topology", "v0z:2x2"), "topology 'v0z:2x2': expected a chip and its grid"),
        (("--topology", "cpu:4", "--mesh", "data=3,fsdp=2"), "mesh 'data=3,fsdp=2': needs 6 devices"),
        (("--topology", "cpu:8", "--mesh", "data=8"), "lanes is 4, expected a multiple of 8 on this mesh"),
        (("--topology", "cpu:8", "--mesh", "fsdp=8"), "layers is 4, expected a multiple of 8 on this mesh"),
        (("--topology", "cpu:4", "--mesh", "fsdp=4", "--model-batch", "6"), "model_batch is 6, expected a multiple of 4"),
        (("--topology", "cpu:1", "--layers", "4"), "layer 4 is out of range"),
        (("--topology", "cpu:1", "--model", "Qwen/Qwen9-1B"), "model Qwen/Qwen9-1B: no such folder, and no config is known here"),
        (("--topology", "cpu:1", "--activations", "cache"), "activations is cache; only runs that make their activations are planned"),
        (("--topology", "cpu:1", "--modle", "x"), "unrecognized arguments: --modle"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(plan, config, arguments, line):
    done = plan("--config", config, *arguments)
    assert line in said(done) and not done.out


def test_a_config_that_is_not_there_is_one_line_and_status_2(plan, tmp_path):
    assert "nothing.yaml: cannot be read" in said(plan("--config", tmp_path / "nothing.yaml", "--topology", "cpu:1"))


@libtpu_only
def test_a_run_is_planned_for_chips_that_are_not_there(plan_alone, config):
    done = plan_alone("--config", config, "--topology", "v5e:2x2", "--mesh", "data=2,tensor=2")
    assert done.status == 0, done.err
    assert "on v5e:2x2 (4 chips, v5litepod-4), data=2,tensor=2" in done.out and "a device has 15.75 GiB" in done.out


@libtpu_only
def test_what_the_compiler_cannot_fit_is_one_line_and_status_2(plan_alone, config):
    done = plan_alone("--config", config, "--topology", "v5e:1x1", "--batch-tokens", "4096", "--num-features", "4194304")
    assert "v5e:1x1: the SAE step does not fit or compile (RESOURCE_EXHAUSTED" in said(done)
