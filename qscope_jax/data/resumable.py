"""Folders written unit by unit: an interruption loses one unit, the same command resumes, and nothing half-written is ever in place.

A manifest inside says what the folder was made from and gives every file's size and SHA-256.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from qscope_jax.data.files import atomic_path, plain, read_json, replace_folder
from qscope_jax.errors import InputError, SourceError

MANIFEST_FILE = "manifest.json"
"""Lists the files of a finished folder, or the units of an unfinished one."""

VERSION = 1

_NEW = ".new"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ResumableFolder:
    """A destination folder that is filled unit by unit in a hidden sibling (`.{name}.partial`) and renamed into place when complete.

    A unit is one file or one sub-folder. Finished units are recorded with size and SHA-256 in `manifest.json` inside, after fsync; a later run
    with the same plan finds them and does not write them again; with another plan it starts clean.

        with ResumableFolder(target, {"source": source, "to": "sae_lens"}, replaceable=holds_saes) as folder:
            for layer in layers:
                if not folder.done(f"layer{layer}"):
                    with folder.unit(f"layer{layer}") as path:
                        write(path)
            folder.finish(layers=layers)
    """

    def __init__(self, target: Path, plan: Mapping[str, Any], *, overwrite: bool = False, replaceable: Callable[[Path], bool]):
        """Say what will be written; nothing is touched yet.

        Args:
            target: The folder that appears in the end; a link stands for what it points to.
            plan: What is made from what, in JSON's terms: identity of the source, format, options. Where `plan["source"]` is a local path, a
                target that is or contains it is refused.
            overwrite: Whether to replace a folder that is there.
            replaceable: Whether what is there is of the right kind to be replaced.
        """
        self.target = Path(target)
        self._plan: dict[str, Any] = json.loads(json.dumps(plain(plan)))
        self._overwrite, self._replaceable = overwrite, replaceable
        self._final = self.target.expanduser().resolve()
        self._units: dict[str, dict[str, Any]] = {}
        self._resumed: list[str] = []
        self._lock: int | None = None
        self.path = self._final.parent / f".{self._final.name}.partial"
        """The hidden folder that is being filled; its finished units can be read there."""

    def __enter__(self) -> "ResumableFolder":
        """Check the destination, then find the units that an earlier run with the same plan finished.

        Raises:
            SourceError: the destination exists and may not be replaced, cannot be written, or another process is writing it.
            InputError: the destination is or contains the source.
        """
        self._check_target()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise SourceError(f"{self.target}: cannot be written ({error.strerror or error}); choose a folder that you may write to") from error
        try:
            self._lock_folder()
            self._recover()
            return self
        except BaseException:
            self._unlock()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave finished units for a later run; where there are none, leave nothing."""
        if not self._units and self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    @property
    def resumed(self) -> list[str]:
        """Units that an earlier run finished and that are still as they were written (sizes and checksums were compared)."""
        return list(self._resumed)

    def done(self, unit: str) -> bool:
        """Whether a unit is finished, by this run or an earlier one."""
        return unit in self._units

    def discard(self, unit: str) -> None:
        """Forget a finished unit that turned out to be wrong: it will be written anew."""
        if self._units.pop(unit, None) is not None:
            _remove(self.path / unit)
            self._write_manifest()

    @contextlib.contextmanager
    def unit(self, name: str) -> Iterator[Path]:
        """The path at which to write a file or folder `name`; recorded when the block ends, removed when it fails.

        Args:
            name: Path of the unit inside the folder, with `/` between its parts.

        Raises:
            SourceError: the disk is full or writing failed; what was finished before stays.
        """
        _check_name(name)
        temporary = self.path / _NEW / name
        try:
            temporary.parent.mkdir(parents=True)
            yield temporary
            files = {str(PurePosixPath(name, file)): facts for file, facts in _record(temporary).items()}
            final = self.path / name
            _remove(final)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, final)
            _sync(final.parent)
            self._units[name] = files
            self._write_manifest()
        except Exception as error:
            if explained := self._explained(error):
                raise explained from error
            raise
        finally:
            _remove(self.path / _NEW)

    def finish(self, **extra: Any) -> Path:
        """Put the folder in its place, with a manifest of format version, plan, `extra` and every file; returns the target.

        Raises:
            SourceError: something has appeared at the destination meanwhile, or it cannot be put in place; everything written stays.
        """
        self._check_target()
        try:
            self._write_manifest(extra)
            if self._final.exists() and (not self._final.is_dir() or any(self._final.iterdir())):
                replace_folder(self.path, self._final)
            else:
                os.replace(self.path, self._final)
            _sync(self._final.parent)
        except Exception as error:
            if explained := self._explained(error):
                raise explained from error
            raise
        return self.target

    def _check_target(self) -> None:
        source = self._plan.get("source")
        if (
            isinstance(source, str)
            and (origin := Path(source).expanduser()).exists()
            and self._final in (origin.resolve(), *origin.resolve().parents)
        ):
            raise InputError(f"{self.target}: holds the source, which would be lost; choose another folder")
        if not self._final.exists() or (self._final.is_dir() and not any(self._final.iterdir())):
            return
        if not self._overwrite:
            raise SourceError(f"{self.target}: exists; pass --overwrite to replace it, or choose another folder")
        if not self._replaceable(self._final):
            raise SourceError(f"{self.target}: does not hold what would be written there, so it is not replaced; choose another folder")

    def _lock_folder(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SourceError(f"{self.target}: another process is writing it; wait for it or choose another folder") from error
        except OSError:
            pass  # some network file systems have no locks

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _recover(self) -> None:
        """Take over the intact units of an unfinished run with the same plan; remove everything else that it left."""
        manifest = self.path / MANIFEST_FILE
        if not manifest.is_file() and any(not file.name.startswith(".") for file in self.path.iterdir()):
            raise SourceError(f"{self.path}: is in the way and was not left by an interrupted run; move it elsewhere")
        found: dict[str, Any] = {}
        if manifest.is_file():
            with contextlib.suppress(SourceError):
                found = read_json(manifest)
        if found.get("version") == VERSION and found.get("plan") == self._plan:
            files = found["files"]
            units = {unit: {name: facts for name, facts in files.items() if PurePosixPath(name).is_relative_to(unit)} for unit in found["units"]}
            self._units = {unit: files for unit, files in units.items() if files and not _differing(self.path, files)}
        self._resumed = sorted(self._units)
        kept = {PurePosixPath(name).parts[0] for name in self._units}
        try:
            for file in list(self.path.iterdir()):
                if file.name not in kept:
                    _remove(file)
            self._write_manifest()
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be written ({error.strerror or error}); choose a folder that you may write to") from error

    def _write_manifest(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write down what is finished; the form is the same before and after the end, so that neither is ever misread."""
        files = {name: facts for _, found in sorted(self._units.items()) for name, facts in found.items()}
        content = {"version": VERSION, "plan": self._plan, **plain(extra or {}), "units": sorted(self._units), "files": files}
        text = json.dumps(content, ensure_ascii=False, indent=2)
        with atomic_path(self.path / MANIFEST_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        _sync(self.path)

    def _explained(self, error: Exception) -> SourceError | None:
        """The one line for a full disk or another failure of the file system; None where the error is something else."""
        kept = f"{len(self._units)} finished units stay in {self.path}" if self._units else "nothing is left behind"
        if _is_full(error):
            return SourceError(f"{self.target}: the disk is full; {kept}. Free some space, then the same command resumes")
        if isinstance(error, OSError):
            return SourceError(f"{self.target}: writing failed ({error.strerror or error}); {kept}, and the same command resumes")
        return None


def verify_manifest(folder: Path, names: Collection[str] | None = None) -> list[str]:
    """Files of a finished folder that are missing or whose size or checksum is not what its manifest says, sorted.

    Args:
        folder: The folder.
        names: Look at these files only.

    Raises:
        SourceError: there is no manifest, or it does not list files.
    """
    path = Path(folder) / MANIFEST_FILE
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise SourceError(f"{path}: does not list files; expected the manifest of a finished folder")
    return _differing(Path(folder), files if names is None else {name: files.get(name) for name in names})


def source_fingerprint(path: Path) -> dict[str, list[int]]:
    """Size and time of change of a file, or of every file of a folder, hidden ones aside: what tells that a source is still the same.

    Meant for a plan; empty for what is not a local path.
    """
    path = Path(path).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    found = {file.relative_to(path).as_posix(): file.stat() for file in files}
    return {
        name: [facts.st_size, facts.st_mtime_ns]
        for name, facts in found.items()
        if not any(part.startswith(".") for part in PurePosixPath(name).parts)
    }


def _check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] in ("/", MANIFEST_FILE) or ".." in parts or parts[0].startswith("."):
        raise ValueError(f"{name!r} cannot be the name of a unit")


def _record(unit: Path) -> dict[str, dict[str, Any]]:
    """Make what was written durable and describe it: file inside the unit ("." where the unit is a file) -> size and SHA-256."""
    files = sorted(file for file in unit.rglob("*") if file.is_file()) if unit.is_dir() else [unit]
    for file in files:
        _sync(file)
    for folder in sorted(folder for folder in (unit, *unit.rglob("*")) if folder.is_dir()) if unit.is_dir() else []:
        _sync(folder)
    return {file.relative_to(unit).as_posix(): _facts(file) for file in files}


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _differing(root: Path, files: Mapping[str, Any]) -> list[str]:
    """Files below `root` that are not as described; sizes are compared first, as they cost nothing."""

    def same(file: Path, facts: Any) -> bool:
        return isinstance(facts, dict) and file.is_file() and file.stat().st_size == facts.get("bytes") and _facts(file) == facts

    return sorted(name for name, facts in files.items() if not same(root / name, facts))


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk; libraries written in other languages say so in words only."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
