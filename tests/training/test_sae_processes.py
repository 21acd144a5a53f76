"""SAEs are trained by two real processes as by one, with a stop in between, and by one that is killed as if it had not been."""

import json
import shutil

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


@pytest.fixture(scope="module", autouse=True)
def shared_programs(tmp_path_factory):
    """Compiled programs are kept for the processes that follow."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """State and metrics of one process that is never stopped, on data=4."""
    return run(tmp_path_factory.mktemp("whole"), "data=4", 1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folder of a run of two processes on another mesh that ended three steps early."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(folder, "data=2,tensor=2", 2, steps=STEPS - 3)
    return folder


def assert_near(state, expected):
    # Sums over processes are added up in another order than sums over devices of one process.
    assert state.keys() == expected.keys() and any("average" in name for name in state)
    for name, values in expected.items():
        np.testing.assert_allclose(state[name], values, rtol=1e-4, atol=2e-5, err_msg=name)


def test_two_processes_equal_one_also_after_a_stop(whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    state, metrics = run(tmp_path / "run", "data=2,tensor=2", 2)
    assert_near(state, whole[0])
    by_step = {line["step"]: line for line in metrics if "held_out" not in line}
    for line in whole[1]:
        if "held_out" not in line:
            np.testing.assert_allclose(by_step[line["step"]]["fvu"], line["fvu"], rtol=1e-5)
    held_out = [[line for line in lines if line.get("held_out") and line["step"] == STEPS][-1]["fvu"] for lines in (metrics, whole[1])]
    np.testing.assert_allclose(*held_out, rtol=1e-4)


def test_a_run_goes_on_with_another_number_of_processes_and_another_mesh(whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    assert_near(run(tmp_path / "run", "data=4", 1)[0], whole[0])


def test_a_run_that_is_killed_and_resumed_equals_the_one_that_never_was_to_the_bit(whole, tmp_path):
    killed = run_processes(PROGRAM, 1, tmp_path, "data=4", STEPS, 6, devices=4, timeout=200)[0]
    assert killed.status == -9 and not killed.out.strip()
    state, metrics = run(tmp_path, "data=4", 1)
    assert state == whole[0] and metrics == whole[1]
