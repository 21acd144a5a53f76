"""Runs of several real processes on this machine, as on a pod: a launcher for tests, and what their programs call first."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[1]
_COORDINATOR, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


class Finished(NamedTuple):
    """What one process left."""

    status: int
    out: str
    err: str


def run_processes(
    module: str, count: int, *arguments: object, devices: int = 1, timeout: float = 100, rounds_as_for_users: bool = False
) -> list[Finished]:
    """Run `python -m module arguments` in `count` processes at once, of `devices` virtual CPU devices each.

    The module calls `join` before anything else of JAX. If one is not done after `timeout` seconds, or fails while others wait for it, all are
    killed, and what they wrote is in the error or in the answer.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as files:
        # Into files: a pipe that nobody reads yet holds 64 KB, and then its writer.
        written = [tuple(files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)) for _ in range(count)]
        compiler = {"XLA_FLAGS": ""} if rounds_as_for_users else {}
        names = [{_COORDINATOR: coordinator, _COUNT: str(count), _INDEX: str(i), **compiler} for i in range(count)]
        started = [_start(module, arguments, own, devices, *streams) for own, streams in zip(names, written, strict=True)]
        try:
            while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{module}: not done after {timeout} s")
                time.sleep(0.05)
            _await(started, seconds=5)
        finally:
            for process in started:
                process.kill()
        return [Finished(process.wait(), *map(_read, streams)) for process, streams in zip(started, written, strict=True)]


def run_program(module: str, *arguments: object, devices: int = 1, timeout: float = 100, rounds_as_for_users: bool = False) -> Finished:
    """The same for one process by itself; `rounds_as_for_users`: without the flags of XLA in `tests/conftest.py`."""
    return run_processes(module, 1, *arguments, devices=devices, timeout=timeout, rounds_as_for_users=rounds_as_for_users)[0]


def join() -> None:
    """Join the other processes of the test, if there are any; then every device of all of them is there."""
    import jax

    from qscope_jax.parallel.processes import join_processes

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if int(os.environ[_COUNT]) > 1:
        join_processes()


def _start(module: str, arguments: Sequence[object], names: dict[str, str], devices: int, out: IO[str], err: IO[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, **names, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _await(started: Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Let the others end by themselves when one has failed."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        time.sleep(0.05)
