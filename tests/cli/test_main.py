import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import qscope_jax
from qscope_jax.cli import main as program

ROOT = Path(__file__).parents[2]


def test_help_fits_a_terminal_and_names_every_verb(qscope):
    answer = qscope("--help")
    lines = answer.out.splitlines()
    assert answer.status == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80
    assert all(verb in answer.out for verb in program.VERBS)
    assert qscope().out == answer.out


def test_version_is_the_package_s(qscope):
    assert qscope("--version").out == f"qscope {qscope_jax.__version__}\n"


def test_help_of_every_verb_imports_nothing_heavy():
    code = (
        "import sys; from qscope_jax.cli.main import VERBS, main\n"
        "assert all(main([verb, '--help']) == 0 for verb in VERBS) and main(['--help']) == 0\n"
        "sys.exit(' '.join({'jax', 'transformers', 'datasets', 'torch', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_unknown_verbs_are_refused_with_the_list(refused):
    line = refused("zork")
    assert "'zork'" in line and "train-sae" in line


def test_an_interrupt_ends_quietly(qscope, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("qscope_jax.cli.demo"), "run", interrupt)
    assert qscope("demo") == (130, "", "")


def test_a_defect_keeps_its_traceback(qscope, monkeypatch):
    def fail(config):
        raise ZeroDivisionError

    monkeypatch.setattr(import_module("qscope_jax.cli.demo"), "run", fail)
    with pytest.raises(ZeroDivisionError):
        qscope("demo")


def test_messages_of_several_lines_become_one(refused, monkeypatch):
    def fail(config):
        raise qscope_jax.QscopeError("first\n  second")

    monkeypatch.setattr(import_module("qscope_jax.cli.demo"), "run", fail)
    assert refused("demo").endswith("error: first second")


@pytest.mark.skipif(os.name == "nt", reason="pipes differ")
def test_a_closed_pipe_ends_quietly():
    done = subprocess.run(
        f"{sys.executable} -m qscope_jax.cli.main train-sae --help | true", shell=True, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.stderr == ""
