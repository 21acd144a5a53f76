"""Two real processes train on one mesh, as two hosts of a pod do."""

import json

import numpy as np
import pytest

from qscope_jax.training.loop import train
from tests.processes import run_processes
from tests.training.distributed_walk import DistributedWalk
from tests.training.walk import lines, settings

PROGRAM = "tests.training.distributed_walk"


def arrays(finished):
    """Weights, moments of all rows, and the number of devices that each process saw."""
    found = [next(line for line in one.out.splitlines() if line.startswith("state")).split() for one in finished]
    weights = [np.frombuffer(bytes.fromhex(words[2]), np.float32) for words in found]
    moments = np.concatenate([np.frombuffer(bytes.fromhex(words[3]), np.float32) for words in found])
    for other in weights[1:]:
        np.testing.assert_array_equal(other, weights[0])
    assert all(one.status == 0 for one in finished)
    return weights[0], moments, {int(words[1]) for words in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    """The uninterrupted run of two processes with two devices each."""
    return run_processes(PROGRAM, 2, folder, "two", 0, devices=2)


@pytest.fixture(scope="module")
def stopped(folder):
    """The same, of which the second process gets SIGTERM in step 4."""
    return run_processes(PROGRAM, 2, folder, "stopped", 4, devices=2)


def test_two_processes_train_as_one_with_all_the_devices(folder, two):
    """To the last bits: sums over processes are in another order than sums over the devices of one."""
    alone = train(DistributedWalk(), settings(folder / "one"))
    weights, moments, devices = arrays(two)
    assert devices == {4}
    np.testing.assert_allclose(weights, alone["weights"], rtol=2e-6)
    np.testing.assert_allclose(moments, alone["moments"].reshape(-1), rtol=2e-5, atol=1e-6)
    mine, its = lines(folder / "two"), lines(folder / "one")
    assert [line["step"] for line in mine] == [line["step"] for line in its] == [2, 4, 4, 6, 8, 8, 10, 10]
    for line, other in zip(mine, its, strict=True):
        assert line == pytest.approx(other, rel=2e-6)


def test_only_the_first_shows_progress(two):
    assert "10/10" in two[0].out and "10/10" not in two[1].out and not two[1].err


def test_a_signal_to_one_stops_both_at_the_same_step(folder, stopped):
    assert {one.status for one in stopped} == {0}
    assert not stopped[0].err and stopped[1].err.startswith("SIGTERM: the run saves and stops")
    steps = [int(path.name) for path in (folder / "stopped/checkpoints").iterdir()]
    assert max(steps) == 6 and lines(folder / "stopped")[-1]["step"] == 6  # the answer of all is known two steps later


def test_a_resumed_run_passes_over_a_torn_checkpoint_and_equals_the_uninterrupted_one(folder, two, stopped):
    torn = folder / "stopped/checkpoints/6/state/_METADATA"
    torn.write_bytes(torn.read_bytes()[:-1])
    resumed = run_processes(PROGRAM, 2, folder, "stopped", 0, devices=2)
    for mine, other in zip(arrays(resumed), arrays(two), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert (folder / "stopped/metrics.jsonl").read_bytes() == (folder / "two/metrics.jsonl").read_bytes()
    assert "checkpoint 6 is torn (state/_METADATA has" in resumed[0].err and resumed[0].err.count("\n") == 1
    assert not resumed[1].err
    kept = {path.name for path in (folder / "stopped/checkpoints").iterdir()} - {"torn-6"}
    assert kept == {path.name for path in (folder / "two/checkpoints").iterdir()}
    assert "held_out" in json.dumps(lines(folder / "stopped"))


def test_a_folder_that_holds_a_run_is_refused_in_both(folder, two):
    for one in two:
        assert one.out.splitlines()[-1] == f"{folder}/two: already holds a run at step 10; resume it, or choose another run_dir"
