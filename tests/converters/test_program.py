import pytest

from converters.program import run
from qscope_jax.errors import InputError


def fail(error: BaseException) -> None:
    raise error


def test_work_that_ends_well_is_status_0_and_silent(capsys):
    assert run("convert", lambda: 7) == 0 and capsys.readouterr() == ("", "")


def test_a_mistake_is_one_line_and_status_2(capsys):
    assert run("convert", lambda: fail(InputError("a.pt: is not\n  there"))) == 2
    assert capsys.readouterr().err == "convert: error: a.pt: is not there\n"


def test_an_interruption_is_one_line_and_130(capsys):
    assert run("convert", lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run("convert", lambda: 1 / 0)
