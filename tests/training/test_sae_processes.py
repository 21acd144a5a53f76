"""SAEs are trained by two real processes as by one, with a stop in between."""

import json

import numpy as np
import pytest

from tests.processes import run_processes
from tests.training.distributed_sae import STEPS

PROGRAM = "tests.training.distributed_sae"


def run(folder, axes, processes, steps=STEPS):
    """Final state and metrics of a run on four devices."""
    finished = run_processes(PROGRAM, processes, folder, axes, steps, devices=4 // processes, timeout=200)
    for process in finished:
        assert process.status == 0, process.err[-2000:]
    answers = [json.loads(process.out.splitlines()[-1]) for process in finished]
    assert all(answer["devices"] == 4 for answer in answers)
    return answers[0]["state"], [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("axes", ["data=4", "data=2,tensor=2"])
def test_two_processes_equal_one_also_after_a_stop(axes, tmp_path):
    expected, expected_metrics = run(tmp_path / "one", axes, 1)
    run(tmp_path / "two", axes, 2, steps=STEPS - 3)
    state, metrics = run(tmp_path / "two", axes, 2)
    assert state.keys() == expected.keys() and any("average" in name for name in state)
    for name, values in expected.items():
        # Sums over processes are added up in another order than sums over devices of one process.
        np.testing.assert_allclose(state[name], values, rtol=1e-4, atol=2e-5, err_msg=name)
    by_step = {line["step"]: line for line in metrics if "held_out" not in line}
    for line in expected_metrics:
        if "held_out" not in line:
            np.testing.assert_allclose(by_step[line["step"]]["fvu"], line["fvu"], rtol=1e-5)
    held_out = [line for line in metrics if line.get("held_out") and line["step"] == STEPS]
    assert held_out and np.isfinite(held_out[-1]["fvu"]).all()


def test_a_run_goes_on_with_another_number_of_processes_and_devices(tmp_path):
    expected, _ = run(tmp_path / "whole", "data=4", 1)
    run(tmp_path / "moved", "data=2,tensor=2", 2, steps=STEPS - 3)
    state, _ = run(tmp_path / "moved", "data=4", 1)
    for name, values in expected.items():
        np.testing.assert_allclose(state[name], values, rtol=1e-4, atol=2e-5, err_msg=name)
