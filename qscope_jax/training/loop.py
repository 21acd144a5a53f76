"""The only training loop.

A recipe says what is trained; the loop owns progress, metrics, evaluation, checkpoints, interruption and resume. A resumed run equals
the uninterrupted one bit for bit.
"""

import json
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qscope_jax.data.files import atomic_path, plain
from qscope_jax.errors import ConfigError, SourceError
from qscope_jax.training.checkpoint import Checkpoints, StreamState


@runtime_checkable
class Stream(Protocol):
    """An endless source of batches that can say, and be told, where it stands."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def get_state(self) -> StreamState:
        """Everything needed to continue."""
        ...

    def set_state(self, state: StreamState) -> None:
        """Continue from a saved state."""
        ...


@runtime_checkable
class Recipe(Protocol):
    """What is trained."""

    name: str
    unit: str
    """What the progress bar counts, such as `tokens`."""

    def init(self) -> Any:
        """The first state, a pytree of arrays."""
        ...

    def stream(self) -> Stream:
        """Batches from the beginning."""
        ...

    def step(self, state: Any, batch: Any) -> tuple[Any, Mapping[str, Any]]:
        """One optimiser step; metrics are device arrays, read only when they are logged."""
        ...

    def units(self, batch: Any) -> int:
        """How many units a batch holds."""
        ...

    def evaluate(self, state: Any) -> Mapping[str, float]:
        """Held-out metrics; empty if the recipe has none."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """How long to train and what to keep."""

    steps: int
    """Optimiser steps in all."""
    run_dir: str = ""
    """Folder for metrics and checkpoints; empty keeps nothing."""
    log_every: int = 20
    """Steps between lines of `metrics.jsonl`."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    resume: bool = False
    """Continue from the newest checkpoint in `run_dir`, if there is one."""
    progress: bool = True
    """Show a progress bar with rate and time left."""

    def __post_init__(self):
        """Check ranges."""
        if self.steps < 1 or self.log_every < 1:
            raise ConfigError(f"steps is {self.steps} and log_every {self.log_every}, expected positive integers")
        if self.resume and not self.run_dir:
            raise ConfigError("resume needs run_dir, the folder of the run to continue")


def train(recipe: Recipe, config: LoopConfig) -> Any:
    """Run a recipe to its last step, or until SIGTERM, and return the state that it reached.

    Raises:
        SourceError: `run_dir` holds another run and `resume` was not asked for.
    """
    if not config.run_dir:
        return _run(recipe, config, None, None)
    folder = Path(config.run_dir)
    with closing(Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints)) as checkpoints:
        if checkpoints.latest is not None and not config.resume:
            raise SourceError(f"{folder}: already holds a run at step {checkpoints.latest}; resume it, or choose another run_dir")
        return _run(recipe, config, checkpoints, folder / "metrics.jsonl")


def _run(recipe: Recipe, config: LoopConfig, checkpoints: Checkpoints | None, metrics_file: Path | None) -> Any:
    state, stream, step, saved = recipe.init(), recipe.stream(), 0, -1
    if checkpoints and checkpoints.latest is not None:
        step = saved = checkpoints.latest
        state, position = checkpoints.restore(state, stream.get_state().arrays)
        stream.set_state(position)
    log = MetricsLog(metrics_file, first_step=step)
    with _progress(recipe, config, step) as advance, _terminated() as stop:
        while step < config.steps and not stop.is_set():
            batch = next(stream)
            state, metrics = recipe.step(state, batch)
            step += 1
            if step % config.log_every == 0 or step == config.steps:
                log.write(step, {name: _number(value) for name, value in metrics.items()})
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                log.write(step, recipe.evaluate(state))
            if checkpoints and config.checkpoint_every and step % config.checkpoint_every == 0 and step < config.steps:
                checkpoints.save(step, state, stream.get_state())
                saved = step
            advance(recipe.units(batch), log.last)
    if checkpoints and saved != step:
        checkpoints.save(step, state, stream.get_state())
    if step == config.steps:
        log.write(step, recipe.evaluate(state))
    return state


class MetricsLog:
    """Metrics as JSON lines, one object a line with its step; a resumed run cuts what was written after its checkpoint."""

    def __init__(self, path: Path | None, first_step: int = 0):
        """Open the file; lines beyond `first_step` are dropped, and the one that an interruption tore."""
        self.last: dict[str, float] = {}
        self._path = path
        self._last_line = ""
        if path is not None:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= first_step]
            self._last_line = kept[-1] if kept else ""
            with atomic_path(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line, unless it is the last one already: a finished run that is resumed evaluates again."""
        if not metrics:
            return
        self.last = {**self.last, **{k: v for k, v in metrics.items() if isinstance(v, float)}}
        line = json.dumps(plain({"step": step, **metrics}))
        if self._path is not None and line != self._last_line:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._last_line = line


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _number(value: Any) -> float | list[float]:
    array = np.asarray(jax.device_get(value), np.float64)
    return array.item() if array.ndim == 0 else array.tolist()


@contextmanager
def _progress(recipe: Recipe, config: LoopConfig, step: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))  # fmt: skip
    with Progress(*columns, disable=not config.progress, transient=False) as bar:
        task = bar.add_task(recipe.name, total=config.steps, completed=step, rate="", loss="")
        done = 0

        def advance(units: int, metrics: Mapping[str, float]) -> None:
            nonlocal done
            done += units
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{done / elapsed:,.0f} {recipe.unit}/s" if elapsed > 0 else ""
            bar.update(task, advance=1, rate=rate, loss=f"loss {metrics['loss']:.3f}" if "loss" in metrics else "")

        yield advance


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that a preempted run saves before it goes; only the main thread can listen."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)
