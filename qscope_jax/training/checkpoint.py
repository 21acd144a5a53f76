"""Checkpoints: parameters, optimiser, counters, activation buffer and data position together, through Orbax.

A checkpoint is whole when every file in it is as its record says (see `integrity`); anything else is set aside when a run resumes.
"""

import errno
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from qscope_jax.data.files import plain
from qscope_jax.errors import SourceError
from qscope_jax.parallel.processes import from_first, is_first
from qscope_jax.training.integrity import damage, read_facts, write_record

_SPARE_BYTES = 1 << 20  # metadata of a checkpoint


@dataclass(frozen=True)
class StreamState:
    """Where a batch stream stands.

    Attributes:
        arrays: Pytree of arrays, such as the contents of an activation buffer; in a run of several processes, global ones.
        cursor: Small JSON-serialisable dict, such as a grain iterator's state; the same in every process, for the first one's is saved.
    """

    arrays: Any
    cursor: Mapping[str, Any]


class Checkpoints:
    """The numbered checkpoints of one run: saved in the background, appearing whole or not at all, checked before they are read.

    Orbax writes a checkpoint under another name and renames it. Then the first process, still in the background, records size and SHA-256 of
    each file; only now are older checkpoints deleted. A checkpoint that lacks its record (the run was killed in between), or differs from it
    by a byte, is never read: it is renamed to `torn-<step>`, a line on stderr says why, and the one before it is used. Every process of a run
    makes the same calls in the same order.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, best: str = "", mode: str = "min"):
        """Open (or make) the folder.

        Args:
            folder: Where the checkpoints are.
            keep: How many of the newest are kept; one more while a run is under way.
            best: Held-out metric whose best checkpoint is kept as well.
            mode: Whether the least (`min`) or the greatest (`max`) value is best.

        Raises:
            SourceError: the folder cannot be made or written to.
        """
        self._folder = Path(folder).resolve()
        self._keep, self._metric, self._sign = keep, best, 1 if mode == "min" else -1
        self._held_out = {int(step): facts for step, facts in from_first(self._begin).items()}
        self._checked: set[int] = set()
        self._recorder = ThreadPoolExecutor(1, "checkpoint_record")
        self._record: Future[None] | None = None
        logging.getLogger("absl").addFilter(_is_news)
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        """Nothing more to open."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Close; after an error, let the save under way come to its end, and delete nothing."""
        if kind is None:
            self.close()
            return
        with suppress(SourceError):  # the first error is the one to tell
            self.wait()
        self._shut()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, checked or not."""
        return max(self._held_out, default=None)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the checkpoint with the best value of the metric, the newest of equals; None if no checkpoint has one."""
        return self._best(self._held_out)

    def newest_whole(self) -> int | None:
        """Step of the newest checkpoint whose files are all as they were recorded; those after it are set aside.

        Reads the whole checkpoint once. One line on stderr for each that is set aside.
        """
        self.wait()
        torn = {int(step) for step in from_first(self._set_torn_aside)}
        self._forget(torn)
        if self.latest is not None:
            self._checked.add(self.latest)
        return self.latest

    def save(self, step: int, state: Any, stream: StreamState, held_out: Mapping[str, float] | None = None) -> None:
        """Begin to save; returns as soon as the arrays are copied, or, if the save before is not finished, after that.

        Args:
            step: Its number, greater than all before.
            state: Tree of arrays.
            stream: Where the stream stands.
            held_out: The evaluation at this step, if there was one.

        Raises:
            SourceError: this checkpoint or the one before cannot be written, such as to a full disk.
        """
        self.wait()
        arrays = {"state": _named(state), "stream": _named(stream.arrays)}
        place = {"cursor": dict(stream.cursor), **{item: _described(leaves) for item, leaves in arrays.items()}}
        items = {item: ocp.args.PyTreeSave(leaves) for item, leaves in arrays.items() if leaves}  # pyright: ignore[reportCallIssue]
        self._held_out[step] = plain(held_out or {})
        with self._writing(step):
            self._check(place["cursor"], sum(leaf.nbytes for leaves in arrays.values() for leaf in leaves.values()))
            self._manager.save(step, args=ocp.args.Composite(place=ocp.args.JsonSave(place), **items), force=True)  # pyright: ignore[reportCallIssue]
        if is_first():
            self._record = self._recorder.submit(self._finish, step)

    def wait(self) -> None:
        """Return when what was begun is saved and recorded.

        Raises:
            SourceError: it cannot be.
        """
        record, self._record = self._record, None
        with self._writing(self.latest):
            self._manager.wait_until_finished()
            if record is not None:
                record.result()

    def restore(self, like_state: Any, like_stream: Any, step: int | None = None) -> tuple[Any, StreamState]:
        """Read a checkpoint back, the newest whole one by default.

        Args:
            like_state: Tree of arrays, its `outline`, or a tree of `abstract` ones: whose structure, shapes, dtypes and shardings the state
                takes. The shardings, and the devices, may be others than those it was saved with.
            like_stream: The same for the stream's arrays.
            step: Which checkpoint.

        Raises:
            SourceError: there is none, it is torn, or it is of another run.
        """
        found, cursor = self._read(step, {"state": like_state, "stream": like_stream})
        return found["state"], StreamState(found["stream"], cursor)

    def restore_state(self, like_state: Any, step: int | None = None) -> Any:
        """The state alone; otherwise as `restore`."""
        return self._read(step, {"state": like_state})[0]["state"]

    def close(self) -> None:
        """Wait for the save under way and delete what is not to be kept.

        Raises:
            SourceError: the save failed.
        """
        try:
            self.wait()
            for step in [step for step in self._manager.all_steps() if step in self._held_out and step not in self._kept(self._keep)]:
                self._manager.delete(step)
                del self._held_out[step]
        finally:
            self._shut()

    def _begin(self) -> dict[int, Any]:
        """Make the folder and clear away what a killed run had not finished; evaluations by step."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
            self._clear_unfinished()
        except OSError as error:
            raise SourceError(f"{self._folder}: cannot be written ({error.strerror or error}); choose a folder that you may write to") from error
        return {step: _facts(self._folder / str(step)) for step in saved_steps(self._folder)}

    def _open(self) -> ocp.CheckpointManager:
        # Lightweight: opening reads nothing, so that what is torn can do no harm before it is found.
        options = ocp.CheckpointManagerOptions(preservation_policy=_Preserved(self), lightweight_initialize=True)
        # Weights hardly compress: as they are, they take a twelfth more room and are written more than twice as fast.
        handlers = {item: ocp.PyTreeCheckpointHandler(use_compression=False) for item in ("state", "stream")}
        return ocp.CheckpointManager(self._folder, options=options, item_handlers={"place": ocp.JsonCheckpointHandler(), **handlers})

    def _check(self, cursor: Mapping[str, Any], needed: int) -> None:
        """Whether there is room for `needed` bytes, and whether the first process can speak for all.

        Asked beforehand: where a disk fills up under Orbax, threads of its libraries print pages of their own.
        """
        (size, _, free), first = from_first(lambda: [list(shutil.disk_usage(self._folder)), cursor])
        if size and free < needed + _SPARE_BYTES:  # some network file systems have no size
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if json.dumps(first, sort_keys=True) != json.dumps(cursor, sort_keys=True):
            raise AssertionError(f"the stream stands at {cursor} here and at {first} in the first process; a cursor must be the same in all")

    def _clear_unfinished(self) -> None:
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        write_record(self._folder / str(step), self._held_out[step])

    def _set_torn_aside(self) -> list[int]:
        torn, earlier = [], list(self._folder.glob("torn-*"))
        for step in reversed(steps := saved_steps(self._folder)):
            reason = damage(self._folder / str(step))
            if reason is None:
                break
            torn.append(step)
            before = steps[: -len(torn)]
            self._set_aside(step, reason, f"the run goes on from step {before[-1]}" if before else "none is left, the run begins anew")
        if torn:
            for path in earlier:  # one set is enough to find out what happened, and they are large
                shutil.rmtree(path, ignore_errors=True)
        return torn

    def _set_aside(self, step: int, reason: str, consequence: str) -> None:
        target = self._folder / f"torn-{step}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self._folder / str(step), target)
        print(f"{self._folder}: checkpoint {step} is torn ({reason}) and set aside as {target.name}; {consequence}", file=sys.stderr)

    def _forget(self, torn: set[int]) -> None:
        if torn:
            self._held_out = {step: facts for step, facts in self._held_out.items() if step not in torn}
            self._manager.close()
            self._manager = self._open()

    def _best(self, steps: Mapping[int, Mapping[str, float]]) -> tuple[int, float] | None:
        values = {step: held_out[self._metric] for step, held_out in steps.items() if held_out.get(self._metric) is not None}
        step = min(values, key=lambda step: (self._sign * values[step], -step), default=None)
        return None if step is None else (step, values[step])

    def _kept(self, newest: int) -> set[int]:
        """The newest, and the best, the latter also among those that are certainly recorded: all but the last."""
        steps = sorted(self._held_out)
        bests = [self._best({step: self._held_out[step] for step in some}) for some in (steps, steps[:-1])]
        return {*steps[-newest:], *(best[0] for best in bests if best)}

    def _read(self, step: int | None, trees: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
        step = self._whole(step)
        likes = {item: tree if isinstance(tree, Outline) else outline(tree) for item, tree in trees.items()}
        try:
            place = self._manager.restore(step, args=ocp.args.Composite(place=ocp.args.JsonRestore()))["place"]  # pyright: ignore[reportCallIssue]
            for item, like in likes.items():
                # Compared here, before anything is read: Orbax would cast other dtypes, and its errors do not name what differs.
                _check_same(item, place[item], _described(like.leaves))
            wanted = {item: _reading(like.leaves) for item, like in likes.items() if like.leaves}
            found = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise SourceError(
                f"{self._folder}: checkpoint {step} does not fit this run ({_reason(error)}); use another folder or the run's own config"
            ) from error
        restored = {item: jax.tree.unflatten(like.structure, [found[item][name] for name in like.leaves]) for item, like in likes.items()}
        return restored, place["cursor"]

    def _whole(self, step: int | None) -> int:
        """The step to read, after a check of its files."""
        if step is None:
            step = self.newest_whole()
        if step is None or step not in self._held_out:
            raise SourceError(f"{self._folder}: holds no whole checkpoint{'' if step is None else f' {step}'} to resume from")
        if step not in self._checked:
            self.wait()
            if reason := from_first(lambda: damage(self._folder / str(step))):
                raise SourceError(f"{self._folder}: checkpoint {step} is torn ({reason}); use another one")
            self._checked.add(step)
        return step

    @contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        """Turn whatever Orbax says about a disk into one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError, SourceError) as error:
            with suppress(SourceError):
                if is_first():
                    self._clear_unfinished()
            if step is not None:
                self._held_out.pop(step, None)
            raise SourceError(
                f"{self._folder}: checkpoint {step} could not be written ({_reason(error)}); finished ones are untouched: "
                "free space there or keep fewer checkpoints, then resume the run"
            ) from error

    def _shut(self) -> None:
        self._recorder.shutdown()
        self._manager.close()
        logging.getLogger("absl").removeFilter(_is_news)


@dataclass(frozen=True)
class _Preserved:
    """Orbax's view of what is kept: one more of the newest than asked for, because the newest is not recorded yet."""

    checkpoints: Checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self.checkpoints._kept(self.checkpoints._keep + 1)
        return [checkpoint.step in kept for checkpoint in checkpoints]


def saved_steps(folder: Path) -> list[int]:
    """Steps of a folder's checkpoints, whole or not, in rising order."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()) if folder.is_dir() else []


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@dataclass(frozen=True)
class Outline:
    """What is needed of a tree of arrays to read another like it.

    Attributes:
        structure: Its containers.
        leaves: Shapes, dtypes and shardings by path.
    """

    structure: Any
    leaves: Mapping[str, jax.ShapeDtypeStruct]


def outline(tree: Any) -> Outline:
    """The outline of a tree, which may then be freed; unlike `abstract`, also for classes that hold nothing but arrays."""
    return Outline(jax.tree.structure(tree), {name: abstract(leaf) for name, leaf in _named(tree).items()})  # in the tree's order


def _reading(leaves: Mapping[str, Any]) -> Any:
    return ocp.args.PyTreeRestore(leaves, restore_args=ocp.checkpoint_utils.construct_restore_args(leaves))  # pyright: ignore[reportCallIssue]


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by their path: what is on disk does not depend on how the containers are implemented."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _described(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in leaves.items()}


def _check_same(item: str, saved: Mapping[str, str], expected: Mapping[str, str]) -> None:
    of, hint = ("the stream's ", ", which depends on batch, buffer and mesh") if item == "stream" else ("", "")
    for name in sorted({*saved, *expected}):
        if saved.get(name) != expected.get(name):
            raise ValueError(f"{of}{name} is {saved.get(name, 'not there')}, this run has {expected.get(name, 'none')}{hint}")


def _facts(folder: Path) -> dict[str, float]:
    try:
        return read_facts(folder)
    except (ValueError, OSError):
        return {}  # torn: found out, and said, when it is wanted


def _reason(error: BaseException) -> str:
    said = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):  # TensorStore wraps the system's words in pages of its own
        if os.strerror(number) in said:
            return os.strerror(number)
    return (said.splitlines() or [type(error).__name__])[0][:200]


def _is_news(record: logging.LogRecord) -> bool:
    """False for Orbax's reports of errors, with tracebacks: they are raised as well, and told in one line."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
