"""Several processes in one run: the first one looks at files and tells the others what it found."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qscope_jax.errors import QscopeError, SourceError


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


def _broadcast(message: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.zeros(size, np.int32)
    if is_first():
        padded[:] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()
