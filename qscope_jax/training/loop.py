"""The only training loop.

A recipe says what is trained; the loop owns progress, metrics, evaluation, checkpoints, interruption and resume. A resumed run equals
the uninterrupted one bit for bit. In a run of several processes all of them call `train`; the first writes metrics and shows progress.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qscope_jax.data.files import atomic_path, plain
from qscope_jax.errors import ConfigError, SourceError
from qscope_jax.parallel.processes import is_first
from qscope_jax.training.checkpoint import Checkpoints, StreamState, outline
from qscope_jax.training.interruption import interruption
from qscope_jax.training.trackers import Tracker, check_installed, scalars, trackers


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
    """What is trained.

    An attribute `timings`, where a recipe has one, holds what its last step took, such as seconds by part; it is logged with the rates. An
    attribute `ended` says why the run should end after the last step, the same in every process; "" lets it go on.
    """

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
        """Held-out metrics, numbers or lists of them; empty if the recipe has none. The same in every process."""
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
    keep_best: str = ""
    """Held-out metric, such as `fvu`, whose best checkpoint is kept as well (a list counts by its mean); of the steps that are both
    evaluated and saved."""
    keep_best_mode: str = "min"
    """Whether the least (min) or the greatest (max) value is best."""
    resume: bool = False
    """Continue from the newest checkpoint in `run_dir`, if there is one."""
    progress: bool = True
    """Show a progress bar with rate and time left."""
    tensorboard: bool = False
    """Write metrics and rates to `tensorboard` in `run_dir` too; needs tensorboardX."""
    wandb: str = ""
    """Project of Weights & Biases that metrics and rates go to as well; needs wandb."""

    def __post_init__(self):
        """Check ranges."""
        if self.steps < 1 or self.log_every < 1:
            raise ConfigError(f"steps is {self.steps} and log_every {self.log_every}, expected positive integers")
        if self.keep_checkpoints < 1:
            raise ConfigError(f"keep_checkpoints is {self.keep_checkpoints}, expected at least 1")
        if self.keep_best_mode not in ("min", "max"):
            raise ConfigError(f"keep_best_mode is {self.keep_best_mode}, expected min or max")
        if self.resume and not self.run_dir:
            raise ConfigError("resume needs run_dir, the folder of the run to continue")
        for name in ("keep_best", "tensorboard", "wandb"):
            if getattr(self, name) and not self.run_dir:
                raise ConfigError(f"{name} needs run_dir, a folder for its files")


def train(recipe: Recipe, config: LoopConfig) -> Any:
    """Run a recipe to its last step, or until it has `ended`, or SIGTERM or SIGINT, and return the state reached; `best_state` gives the best.

    A signal saves a checkpoint and returns; see `interruption`. With `resume`, a torn checkpoint is passed over for the one before, as a
    line on stderr says.

    Raises:
        SourceError: `run_dir` holds another run and `resume` was not asked for, or its files cannot be written.
        ConfigError: a package that was asked for is missing, or the evaluation lacks the metric `keep_best`.
        KeyboardInterrupt: a second SIGINT.
    """
    check_installed(tensorboard=config.tensorboard, wandb=config.wandb)
    # Signals are heard until the last checkpoint is on disk.
    with interruption() as stop:
        if not config.run_dir:
            return _run(recipe, config, None, stop)
        with _checkpoints(config) as checkpoints:
            if checkpoints.latest is not None and not config.resume:
                raise SourceError(f"{config.run_dir}: already holds a run at step {checkpoints.latest}; resume it, or choose another run_dir")
            return _run(recipe, config, checkpoints, stop)


def best_state(recipe: Recipe, config: LoopConfig, like: Any = None) -> tuple[Any, int, float]:
    """State, step and value of the checkpoint in `run_dir` that is best by `keep_best`, after or between calls of `train`.

    Candidates are the checkpoints still kept whose step was evaluated: the newest, and the best that the run has had.

    Args:
        recipe: The run's recipe.
        config: The run's config.
        like: A state of the recipe, such as the one that `train` returned, for its shapes and shardings; by default the first one is made.

    Raises:
        SourceError: no checkpoint was evaluated by that metric, the best one is torn, or it is of another run.
        ConfigError: `keep_best` or `run_dir` is not set.
    """
    if not config.keep_best:
        raise ConfigError("keep_best is not set, expected the held-out metric to choose by")
    with _checkpoints(config) as checkpoints:
        if checkpoints.best is None:
            raise SourceError(f"{config.run_dir}: holds no checkpoint with an evaluation of {config.keep_best}; evaluate at steps that are saved")
        step, value = checkpoints.best
        like = outline(recipe.init() if like is None else like)
        return checkpoints.restore_state(like, step), step, value


def _checkpoints(config: LoopConfig) -> Checkpoints:
    return Checkpoints(Path(config.run_dir) / "checkpoints", keep=config.keep_checkpoints, best=config.keep_best, mode=config.keep_best_mode)


def _run(recipe: Recipe, config: LoopConfig, checkpoints: Checkpoints | None, stop: Callable[[], bool]) -> Any:
    state, stream, step, saved = recipe.init(), recipe.stream(), 0, -1
    if checkpoints and (found := checkpoints.newest_whole()) is not None:
        step = saved = found
        like, state = outline(state), None  # the first state makes room for the saved one
        state, position = checkpoints.restore(like, stream.get_state().arrays, step)
        stream.set_state(position)
    held_out: dict[str, float] = {}
    with _logs(config, step) as log, _progress(recipe, config, step) as advance:
        clock, last = _Clock(recipe.unit), config.steps
        while step < last and not stop():
            batch = next(stream)
            state, metrics = recipe.step(state, batch)
            step += 1
            if getattr(recipe, "ended", ""):
                last = step
            units = recipe.units(batch)
            clock.count(units)
            if is_first() and (step % config.log_every == 0 or step == last):
                log.write(step, {name: _number(value) for name, value in metrics.items()}, clock.read() | getattr(recipe, "timings", {}))
            held_out = {}
            if config.eval_every and step % config.eval_every == 0 and step < last:
                held_out = _evaluate(recipe, config, state, step, log)
            if checkpoints and config.checkpoint_every and step % config.checkpoint_every == 0 and step < last:
                checkpoints.save(step, state, stream.get_state(), held_out)
                saved = step
            advance(units, log.last)
        failure = None
        if step == last:
            try:
                held_out = _evaluate(recipe, config, state, step, log)
            except Exception as error:  # after the save: this may be the first evaluation, at the end of days
                failure = error
        if checkpoints and saved != step:
            checkpoints.save(step, state, stream.get_state(), held_out)
        if failure:
            raise failure
    return state


def _evaluate(recipe: Recipe, config: LoopConfig, state: Any, step: int, log: "MetricsLog") -> dict[str, float]:
    """Evaluate and log; the numbers, lists by their mean."""
    metrics = recipe.evaluate(state)
    log.write(step, metrics)
    numbers = {name: value for name, value in metrics.items() if not isinstance(value, bool | str)}
    if config.keep_best and config.keep_best not in numbers:
        raise ConfigError(f"keep_best is {config.keep_best}, but the evaluation gives {', '.join(numbers) or 'nothing'}; choose one of these")
    return {name: float(np.mean(value)) for name, value in numbers.items()}


class MetricsLog:
    """Metrics as JSON lines, one object a line with its step; a resumed run cuts what was written after its checkpoint."""

    def __init__(self, path: Path | None, first_step: int = 0, trackers: Sequence[Tracker] = ()):
        """Open the file; lines beyond `first_step` are dropped, and the one that an interruption tore.

        Args:
            path: The file; rates go to `rates.jsonl` beside it, so that the metrics of two equal runs are equal files. None writes nothing.
            first_step: Step that the run continues from.
            trackers: Where lines go as well.
        """
        self.last: dict[str, float] = {}
        self._path = path
        self._rates = None if path is None else path.with_name("rates.jsonl")
        self._trackers = trackers
        self._last_line = _cut(path, first_step) if path else ""
        if self._rates is not None:
            _cut(self._rates, first_step)

    def write(self, step: int, metrics: Mapping[str, Any], rates: Mapping[str, float] | None = None) -> None:
        """Append a line, unless it is the last one already: a finished run that is resumed evaluates again.

        Args:
            step: The step it is of.
            metrics: Numbers and lists of numbers.
            rates: What differs between equal runs, such as units a second.
        """
        if not metrics:
            return
        self.last = {**self.last, **{k: v for k, v in metrics.items() if isinstance(v, float)}}
        line = json.dumps(plain({"step": step, **metrics}))
        if line == self._last_line:
            return
        self._last_line = line
        _append(self._path, line)
        if rates:
            _append(self._rates, json.dumps(plain({"step": step, **rates})))
        for tracker in self._trackers:
            tracker.write(step, scalars({**metrics, **(rates or {})}))


def _cut(path: Path, first_step: int) -> str:
    """Drop the lines of steps after `first_step`, and return the last that stays."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= first_step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return kept[-1] if kept else ""


def _append(path: Path | None, line: str) -> None:
    if path is None:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise SourceError(f"{path}: cannot be written ({error.strerror or error}); free space there, then resume the run") from error


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, LookupError):
        return math.inf


def _number(value: Any) -> float | list[float]:
    array = np.asarray(jax.device_get(value), np.float64)
    return array.item() if array.ndim == 0 else array.tolist()


class _Clock:
    """Units a second between readings, by the wall's clock: evaluations and waits for a disk count."""

    def __init__(self, unit: str):
        self._name, self._units, self._began = f"{unit}_per_second", 0, time.monotonic()

    def count(self, units: int) -> None:
        self._units += units

    def read(self) -> dict[str, float]:
        now = time.monotonic()
        rate = self._units / max(now - self._began, 1e-9)
        self._units, self._began = 0, now
        return {self._name: rate}


@contextmanager
def _logs(config: LoopConfig, step: int) -> Iterator[MetricsLog]:
    """The log with its trackers, in the first process; elsewhere one that writes nothing."""
    if not config.run_dir or not is_first():
        yield MetricsLog(None)
        return
    folder = Path(config.run_dir)
    with trackers(folder, tensorboard=config.tensorboard, wandb=config.wandb, first_step=step) as opened:
        yield MetricsLog(folder / "metrics.jsonl", step, opened)


@contextmanager
def _progress(recipe: Recipe, config: LoopConfig, step: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))  # fmt: skip
    with Progress(*columns, disable=not (config.progress and is_first()), transient=False) as bar:
        task = bar.add_task(recipe.name, total=config.steps, completed=step, rate="", loss="")
        done = 0

        def advance(units: int, metrics: Mapping[str, float]) -> None:
            nonlocal done
            done += units
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{done / elapsed:,.0f} {recipe.unit}/s" if elapsed > 0 else ""
            bar.update(task, advance=1, rate=rate, loss=f"loss {metrics['loss']:.3f}" if "loss" in metrics else "")

        yield advance
