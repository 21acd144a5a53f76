"""Programs around a `Walk`: one that is killed again and again and resumed each time, run as `python -m tests.training.killed FOLDER`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from qscope_jax.training.loop import train
from tests.training.walk import Walk, settings

STEPS, WIDTH = 24, 300_000  # a save of 1.2 MB lasts several steps; one begins at every third
# The step in which it strikes, and after how many seconds: some in the middle of a save, some between two.
KILLS = [(4, 0.0), (5, 0.5), (10, 0.0), (13, 0.02), (19, 0.01), (23, 0.03)]


def main(folder: Path) -> None:
    """Run to the end at once in `whole`; then with kills in `killed`. Prints what lies in the folder of checkpoints after each."""
    assert in_child(lambda: finish(folder / "whole"))
    for step, pause in KILLS:
        assert not in_child(lambda at={step: lambda pause=pause: die(pause)}: finish(folder / "killed", at))
        print(json.dumps(sorted(path.name for path in (folder / "killed/checkpoints").iterdir())), flush=True)
    assert in_child(lambda: finish(folder / "killed"))


def finish(folder: Path, at=None) -> None:
    """Run or resume, and write the state's bytes."""
    state = train(Walk(WIDTH, at=at), settings(folder, steps=STEPS, resume=True, keep_best="held_out"))
    (folder / "state").write_bytes(np.asarray(state["sum"]).tobytes() + bytes([int(state["steps"])]))


def die(pause: float) -> None:
    time.sleep(pause)
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function) -> bool:
    """Call it in a copy of this process, which has imported everything and begun nothing; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    main(Path(sys.argv[1]))
