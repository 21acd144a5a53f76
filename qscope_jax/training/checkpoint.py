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
        arrays = {"state": _named(state), "stream": _named(stream.arrays)}
        place = {"cursor": dict(stream.cursor), **{item: _described(leaves) for item, leaves in arrays.items()}}
        items = {item: ocp.args.StandardSave(leaves) for item, leaves in arrays.items() if leaves}  # pyright: ignore[reportCallIssue]
        self._manager.save(step, args=ocp.args.Composite(place=ocp.args.JsonSave(place), **items), force=True)  # pyright: ignore[reportCallIssue]

    def restore(self, like_state: Any, like_stream: Any, step: int | None = None) -> tuple[Any, StreamState]:
        """Read a checkpoint back, the newest by default.

        Args:
            like_state: Tree of arrays, or of `abstract` ones, whose structure, shapes, dtypes and shardings the state takes.
            like_stream: The same for the stream's arrays.
            step: Which checkpoint.

        Raises:
            SourceError: there is none, it is damaged, or it is of another run.
        """
        step = self.latest if step is None else step
        if step is None:
            raise SourceError(f"{self._folder}: holds no whole checkpoint to resume from")
        trees = {"state": like_state, "stream": like_stream}
        try:
            place = self._manager.restore(step, args=ocp.args.Composite(place=ocp.args.JsonRestore()))["place"]  # pyright: ignore[reportCallIssue]
            for item, tree in trees.items():
                # Compared here, before anything is read: Orbax would cast other dtypes, and its errors do not name what differs.
                _check_same(place[item], _described(_named(tree)))
            wanted = {item: ocp.args.StandardRestore(abstract(_named(tree))) for item, tree in trees.items() if _named(tree)}  # pyright: ignore[reportCallIssue]
            found = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        except (ValueError, KeyError, OSError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise SourceError(
                f"{self._folder}: checkpoint {step} does not fit this run ({reason}); use another folder or the run's own config"
            ) from error
        restored = {item: jax.tree.unflatten(jax.tree.structure(tree), [found[item][name] for name in _named(tree)]) for item, tree in trees.items()}
        return restored["state"], StreamState(restored["stream"], place["cursor"])

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by their path: what is on disk does not depend on how the containers are implemented."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _described(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in leaves.items()}


def _check_same(saved: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for name in sorted({*saved, *expected}):
        if saved.get(name) != expected.get(name):
            raise ValueError(f"{name} is {saved.get(name, 'not there')}, this run has {expected.get(name, 'none')}")
