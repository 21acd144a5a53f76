import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.parallel.startup import join_processes
from tests.processes import run_processes

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def test_processes_that_join_see_each_others_devices():
    finished = run_processes("tests.parallel.joined", 2, devices=2)
    assert [(one.status, one.out.split()) for one in finished] == [(0, ["0", "2", "4"]), (0, ["1", "2", "4"])], finished


@pytest.mark.parametrize(
    ("values", "message"),
    [(("localhost:1", "2", ""), "set, but not JAX_PROCESS_ID"), (("localhost:1", "2", "2"), "JAX_PROCESS_ID 2, expected"),
     (("localhost:1", "two", "0"), "JAX_NUM_PROCESSES is two"), (("", "", ""), "cannot be joined")],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_said_in_one_line(values, message, monkeypatch):
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        join_processes()
