"""Several processes in one run: how they join, what the first finds and tells the others, and what each tells all."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qscope_jax.errors import ConfigError, QscopeError, SourceError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes() -> None:
    """Join the other processes of the run.

    On TPU pods, Slurm, Open MPI and GKE JAX finds them by itself. Elsewhere the environment must have JAX_COORDINATOR_ADDRESS (host:port of the
    first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID, from 0.

    Raises:
        ConfigError: the variables are wrong, or the others cannot be found.
    """
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if given and len(given) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in given)
        raise ConfigError(f"{', '.join(given)} set, but not {missing}: set all three, or none where the cluster tells JAX")
    try:
        if given:
            address, count, index = (given[name] for name in _VARIABLES)
            if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
                raise ConfigError(f"JAX_NUM_PROCESSES is {count} and JAX_PROCESS_ID {index}, expected a number of processes and one below it")
            jax.distributed.initialize(address, int(count), int(index))
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the other processes cannot be joined ({reason}); set {', '.join(_VARIABLES)}, or leave --distributed out") from error


def is_first() -> bool:
    """Whether this process writes small files and shows progress."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """What `function` returns in the first process, in every process; all of them call this, at the same point of the program.

    Args:
        function: Called in the first process only; its value must be what JSON can hold.

    Raises:
        QscopeError: the function raised one: the same in the first process, a SourceError with its words in the others.
    """
    if jax.process_count() == 1:
        return function()
    answer, raised = {}, None
    if is_first():
        try:
            answer = {"value": function()}
        except QscopeError as error:
            answer, raised = {"error": str(error)}, error
    answer = json.loads(_broadcast(json.dumps(answer).encode()))
    if raised is not None:
        raised.add_note("raised in every process")
        raise raised
    if "error" in answer:
        raise SourceError(answer["error"])
    return answer["value"]


def from_all(value: Any) -> list[Any]:
    """Every process's value, in their order, in all of them; each calls this at the same point of the program, with what JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    message = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(message.size))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: message.size] = message
    return [json.loads(row[:size].tobytes()) for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)]


def _broadcast(message: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.zeros(size, np.int32)
    if is_first():
        padded[:] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()
