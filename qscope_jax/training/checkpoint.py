"""Checkpoints: parameters, optimiser, counters, activation buffer and data position together, through Orbax."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from qscope_jax.errors import SourceError


@dataclass(frozen=True)
class StreamState:
    """Where a batch stream stands.

    Attributes:
        arrays: Pytree of arrays, such as the contents of an activation buffer.
        cursor: Small JSON-serialisable dict, such as a grain iterator's state.
    """

    arrays: Any
    cursor: Mapping[str, Any]


class Checkpoints:
    """The numbered checkpoints of one run; saving is asynchronous and a checkpoint appears whole or not at all."""

    def __init__(self, folder: str | Path, *, keep: int = 2):
        """Open (or make) the folder; the newest `keep` checkpoints are kept."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder = Path(folder).resolve()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, stream: StreamState) -> None:
        """Begin to save; returns as soon as the arrays are copied."""
        items = {"state": ocp.args.StandardSave(state), "cursor": ocp.args.JsonSave(dict(stream.cursor))}  # pyright: ignore[reportCallIssue]
        if jax.tree.leaves(stream.arrays):
            items["stream"] = ocp.args.StandardSave(stream.arrays)  # pyright: ignore[reportCallIssue]
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, abstract_state: Any, abstract_stream: Any, step: int | None = None) -> tuple[Any, StreamState]:
        """Read a checkpoint back, the newest by default, into the shapes, dtypes and shardings of the abstract trees.

        Raises:
            SourceError: there is none, or it is of another run.
        """
        step = self.latest if step is None else step
        if step is None:
            raise SourceError(f"{self._folder}: holds no whole checkpoint to resume from")
        items = {"state": ocp.args.StandardRestore(abstract_state), "cursor": ocp.args.JsonRestore()}  # pyright: ignore[reportCallIssue]
        if jax.tree.leaves(abstract_stream):
            items["stream"] = ocp.args.StandardRestore(abstract_stream)  # pyright: ignore[reportCallIssue]
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise SourceError(f"{self._folder}: checkpoint {step} does not fit this run ({reason}); use another folder or the run's own config") from error
        return restored["state"], StreamState(restored.get("stream", abstract_stream), restored["cursor"])

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
