import inspect

import pytest

from qscope_jax import errors
from qscope_jax.cli import main as program

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not errors.QscopeError]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_becomes_one_line_and_exit_code_2(kind, monkeypatch, capsys):
    def fail(arguments):
        raise kind("the file:\n  is torn")

    monkeypatch.setattr(program, "_run", fail)
    assert program.main(["demo"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "qscope: error: the file: is torn\n")


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(program, "_run", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        program.main(["demo"])


def test_a_hostile_file_is_caught_with_those_that_cannot_be_read():
    assert issubclass(errors.UnsafeFileError, errors.SourceError)
