"""The only training loop.

A recipe says what is trained; the loop owns progress, metrics, evaluation, checkpoints, interruption and resume. A resumed run equals
the uninterrupted one bit for bit.
"""

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qscope_jax.errors import ConfigError, SourceError
from qscope_jax.training.checkpoint import Checkpoints, StreamState, abstract


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
    """Run a recipe to its last step, or until SIGTERM, and return the final state.

    Raises:
        SourceError: `run_dir` holds another run and `resume` was not asked for.
    """
    folder = Path(config.run_dir) if config.run_dir else None
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints) if folder else None
    if checkpoints and checkpoints.latest is not None and not config.resume:
        raise SourceError(f"{folder}: already holds a run at step {checkpoints.latest}; resume it, or choose another run_dir")
    state, stream, step = recipe.init(), recipe.stream(), 0
    if checkpoints and config.resume and checkpoints.latest is not None:
        step = checkpoints.latest
        state, position = checkpoints.restore(abstract(state), abstract(stream.get_state().arrays))
        stream.set_state(position)
    log = MetricsLog(folder / "metrics.jsonl" if folder else None, first_step=step)
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
            advance(recipe.units(batch), log.last)
    if checkpoints:
        checkpoints.save(step, state, stream.get_state())
        checkpoints.close()
    if step == config.steps:
        log.write(step, recipe.evaluate(state))
    return state


class MetricsLog:
    """Metrics as JSON lines, one object a line with its step; a resumed run cuts what was written after its checkpoint."""

    def __init__(self, path: Path | None, first_step: int = 0):
        """Open the file; lines beyond `first_step` are dropped."""
        self.last: dict[str, float] = {}
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= first_step]
            path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line."""
        if not metrics:
            return
        self.last = {**self.last, **{k: v for k, v in metrics.items() if isinstance(v, float)}}
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")


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
