"""Stopping a run from outside: one SIGTERM or SIGINT saves and stops, a second stops at once; all processes stop at the same step."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAG = 2  # steps


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Listen for SIGTERM and SIGINT, and yield a function that says whether to stop before the next step.

    The first signal is a request, answered by a line on stderr. A second SIGINT raises KeyboardInterrupt wherever the program is, and nothing
    more is saved than what is being saved already; a second SIGTERM ends the process as if nobody listened. Only the main thread can listen;
    elsewhere nothing stops the run.

    In a run of several processes the function is called by all of them once a step. A signal to any one of them stops all before the same
    step, the third from then: each call starts the sum of everyone's answers on the devices and reads the sum that was started two calls ago,
    so the host never waits for the step under way, only for the last but one.
    """
    asked = threading.Event()
    stop = asked.is_set
    if jax.process_count() > 1:
        agreement = _Agreement()

        def stop() -> bool:
            return agreement(asked.is_set())

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not asked.is_set():
            asked.set()
            # The plain system call: a signal may arrive in the middle of a print.
            os.write(2, f"{name}: the run saves and stops after this step; a second {name} stops it at once\n".encode())
            return
        signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os.kill(os.getpid(), number)

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            # None is a handler that was not installed from Python (jax.distributed has one): it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Agreement:
    """Whether any process wants to stop, the same answer in all of them, `_LAG` calls late."""

    def __init__(self):
        mesh = Mesh(np.asarray(jax.devices()), ("devices",), axis_types=(AxisType.Auto,))
        self._split = NamedSharding(mesh, PartitionSpec("devices"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._started: deque[jax.Array] = deque()

    def __call__(self, wanted: bool) -> bool:
        flags = np.full(jax.local_device_count(), wanted, np.int32)
        self._started.append(self._largest(jax.make_array_from_process_local_data(self._split, flags)))
        return len(self._started) > _LAG and bool(self._started.popleft())
