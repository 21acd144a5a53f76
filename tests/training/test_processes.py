import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.training.processes import from_first, is_first


def test_a_run_of_one_process_asks_itself():
    value = {1: (2, 3)}
    assert is_first() and from_first(lambda: value) is value


def test_errors_are_the_function_s_own():
    def fail():
        raise ConfigError("k is 0")

    with pytest.raises(ConfigError, match="k is 0"):
        from_first(fail)
