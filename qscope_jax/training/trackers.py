"""Metrics to where people watch them, when asked: TensorBoard and Weights & Biases."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from qscope_jax.data.files import atomic_path
from qscope_jax.errors import ConfigError

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@runtime_checkable
class Tracker(Protocol):
    """Somewhere metrics go."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        ...

    def close(self) -> None:
        """Send what has not been sent."""
        ...


@contextmanager
def trackers(folder: Path, *, tensorboard: bool, wandb: str, first_step: int) -> Iterator[Sequence[Tracker]]:
    """Open what was asked for, and close it at the end.

    Args:
        folder: The run's folder; TensorBoard's events go to `tensorboard` in it, files of Weights & Biases to `wandb`.
        tensorboard: Whether to write TensorBoard events.
        wandb: Project of Weights & Biases; empty for none.
        first_step: Step that the run continues from; what TensorBoard has beyond it is hidden.

    Raises:
        ConfigError: the package that one of them needs is not installed.
    """
    check_installed(tensorboard=tensorboard, wandb=wandb)
    with ExitStack() as stack:
        opened: list[Tracker] = []
        if tensorboard:
            opened.append(TensorBoard(folder / "tensorboard", first_step))
            stack.callback(opened[-1].close)
        if wandb:
            opened.append(WeightsAndBiases(folder, wandb))
            stack.callback(opened[-1].close)
        yield opened


def check_installed(*, tensorboard: bool, wandb: str) -> None:
    """Find out before long work that the packages are there.

    Raises:
        ConfigError: one is not.
    """
    for option, wanted in (("tensorboard", tensorboard), ("wandb", wandb)):
        if wanted:
            _package(option)


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among metrics, with those of a list as `name/index`."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        entries = {f"{name}/{index}": entry for index, entry in enumerate(value)} if isinstance(value, list | tuple) else {name: value}
        found |= {key: float(entry) for key, entry in entries.items() if isinstance(entry, int | float) and not isinstance(entry, bool)}
    return found


class TensorBoard:
    """Event files, written by tensorboardX."""

    def __init__(self, folder: Path, first_step: int):
        """Append to the folder's events; those after `first_step` are hidden."""
        self._writer = _package("tensorboard").SummaryWriter(logdir=str(folder), purge_step=first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project; a resumed run continues it."""

    def __init__(self, folder: Path, project: str):
        """Begin the run, or continue the one whose id is in the folder."""
        id_file = folder / "wandb_id"
        if not id_file.exists():
            with atomic_path(id_file) as temporary:
                temporary.write_text(uuid.uuid4().hex[:8], encoding="ascii")
        self._run = _package("wandb").init(
            project=project, name=folder.resolve().name, dir=str(folder), id=id_file.read_text(encoding="ascii").strip(), resume="allow"
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Send the rest and end."""
        self._run.finish()


def _package(option: str) -> Any:
    name = _PACKAGES[option]
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"{option}: the package {name} is not installed; pip install {name}, or leave {option} out") from None
