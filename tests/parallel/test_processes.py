import json

import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.parallel.processes import from_all, from_first, is_first, join_processes
from tests.processes import run_processes

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def test_processes_that_join_see_each_others_devices_and_hear_the_first_and_all():
    finished = run_processes("tests.parallel.joined", 2, devices=2)
    assert [one.status for one in finished] == [0, 0], finished
    for index, one in enumerate(finished):
        assert json.loads(one.out.splitlines()[-1]) == [index, 2, 4, {"of": "first"}, [{"index": 0, "text": ""}, {"index": 1, "text": "ä"}]]


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


def test_a_run_of_one_process_asks_itself():
    value = {1: (2, 3)}
    assert is_first() and from_first(lambda: value) is value and from_all(value) == [value]


def test_errors_are_the_function_s_own():
    def fail():
        raise ConfigError("k is 0")

    with pytest.raises(ConfigError, match="k is 0"):
        from_first(fail)
