import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qscope_jax.data.resumable import MANIFEST_FILE, ResumableFolder, source_fingerprint, verify_manifest
from qscope_jax.errors import InputError, SourceError

UNITS = ["a.txt", "b", "deep/c.txt"]
PLAN = {"source": "hub/name", "to": "text", "numbers": (1, 2)}


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, SystemExit and the like: not an Exception."""


def opened(target, plan=PLAN, overwrite=False, replaceable=lambda path: True) -> ResumableFolder:
    return ResumableFolder(Path(target), plan, overwrite=overwrite, replaceable=replaceable)


def write(folder: ResumableFolder, name: str, text: str = "") -> None:
    with folder.unit(name) as path:
        if name == "b":
            (path / "inner").mkdir(parents=True)
            (path / "inner" / "x").write_text(f"x of {text}{name}")
            (path / "y").write_text(f"y of {text}{name}")
        else:
            path.write_text(f"{text}{name}")


def fill(target, text="", **settings) -> list[str]:
    """Write what is not finished; return the units written."""
    written = []
    with opened(target, **settings) as folder:
        for name in UNITS:
            if not folder.done(name):
                write(folder, name, text)
                written.append(name)
        assert folder.finish(units=3) == Path(target)
    return written


def tree(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != MANIFEST_FILE
    }


EXPECTED = {"a.txt": "a.txt", "b/inner/x": "x of b", "b/y": "y of b", "deep/c.txt": "deep/c.txt"}


def test_a_folder_appears_complete_with_a_manifest_of_its_files(tmp_path):
    target = tmp_path / "new" / "out"
    with opened(target) as folder:
        assert folder.resumed == []
        for name in UNITS:
            assert not folder.done(name)
            write(folder, name)
            assert folder.done(name) and not target.exists()
        folder.finish(note="x")
    assert tree(target) == EXPECTED and os.listdir(target.parent) == ["out"]
    manifest = json.loads((target / MANIFEST_FILE).read_text())
    assert manifest["plan"] == {"source": "hub/name", "to": "text", "numbers": [1, 2]} and (manifest["version"], manifest["note"]) == (1, "x")
    assert manifest["files"] == {name: {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()} for name, text in EXPECTED.items()}
    assert verify_manifest(target) == []


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("at", range(len(UNITS)))
def test_an_interruption_in_any_unit_loses_that_unit_alone(at, failure, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(failure), opened(target) as folder:
        for name in UNITS[:at]:
            write(folder, name)
        with folder.unit(UNITS[at]) as path:
            path.write_text("half")
            raise failure
    assert not target.exists() and os.listdir(tmp_path) == ([".out.partial"] if at else [])
    with opened(target) as folder:
        assert folder.resumed == sorted(UNITS[:at])
    assert fill(target) == UNITS[at:]
    assert tree(target) == EXPECTED and verify_manifest(target) == [] and os.listdir(tmp_path) == ["out"]


def test_a_killed_process_leaves_what_it_had_finished(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom qscope_jax.data.resumable import ResumableFolder\n"
        "with ResumableFolder(Path(sys.argv[1]), {'p': 1}, replaceable=lambda path: True) as folder:\n"
        "    with folder.unit('a.txt') as path:\n        path.write_text('a.txt')\n"
        "    with folder.unit('b') as path:\n        path.write_text('half')\n        os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "out"], timeout=60).returncode == -9
    assert fill(tmp_path / "out", plan={"p": 1}) == UNITS[1:]
    assert tree(tmp_path / "out") == EXPECTED


def partial(target, units=UNITS[:2]) -> Path:
    with opened(target) as folder:
        for name in units:
            write(folder, name)
    return folder.path


def test_another_plan_starts_clean(tmp_path):
    partial(tmp_path / "out")
    assert fill(tmp_path / "out", "new ", plan={**PLAN, "to": "other"}) == UNITS
    assert tree(tmp_path / "out")["a.txt"] == "new a.txt"


@pytest.mark.parametrize("damage", ["longer", "same length", "missing", "folder missing"])
def test_a_finished_unit_that_is_no_longer_what_it_was_is_written_anew(damage, tmp_path):
    folder = partial(tmp_path / "out")
    if damage == "folder missing":
        (folder / "b" / "y").unlink()
    elif damage == "missing":
        (folder / "a.txt").unlink()
    else:
        (folder / "a.txt").write_text("a.txt and more" if damage == "longer" else "b.txt")
    assert fill(tmp_path / "out")[:-1] == (["b"] if damage == "folder missing" else ["a.txt"])
    assert tree(tmp_path / "out") == EXPECTED


def test_what_no_unit_accounts_for_does_not_reach_the_destination(tmp_path):
    folder = partial(tmp_path / "out")
    (folder / "stray.txt").write_text("stray")
    (folder / ".new").mkdir(exist_ok=True)
    (folder / ".new" / "half").write_text("half")
    fill(tmp_path / "out")
    assert tree(tmp_path / "out") == EXPECTED


def test_a_destination_that_exists_is_replaced_only_when_asked_and_of_the_right_kind(tmp_path):
    target = tmp_path / "out"
    fill(target)
    with pytest.raises(SourceError, match="exists; pass --overwrite"):
        fill(target)
    with pytest.raises(SourceError, match="does not hold what would be written there"):
        fill(target, overwrite=True, replaceable=lambda path: path != target)
    assert tree(target) == EXPECTED
    fill(target, "new ", overwrite=True)
    assert tree(target)["a.txt"] == "new a.txt" and os.listdir(tmp_path) == ["out"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert fill(empty, replaceable=lambda path: False) == UNITS


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "out"
    fill(target)
    with pytest.raises(Interrupted), opened(target, overwrite=True) as folder:
        write(folder, "a.txt", "new ")
        assert tree(target) == EXPECTED
        raise Interrupted
    assert tree(target) == EXPECTED


def test_something_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(SourceError, match="exists"), opened(target) as folder:
        write(folder, "a.txt")
        target.mkdir()
        (target / "theirs").write_text("theirs")
        folder.finish()
    assert tree(target) == {"theirs": "theirs"}
    with opened(tmp_path / "out", overwrite=True) as folder:
        assert folder.resumed == ["a.txt"]


@pytest.mark.parametrize("place", ["in", "in/layer.pt", "in/deeper/layer.pt"])
def test_a_destination_that_holds_the_source_is_refused(place, tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for file in ("layer.pt", "deeper/layer.pt"):
        (tmp_path / "in" / file).write_text("weights")
    with pytest.raises(InputError, match="holds the source, which would be lost"):
        fill(tmp_path / "in", plan={"source": str(tmp_path / place)}, overwrite=True)
    with pytest.raises(InputError, match="holds the source"):
        fill(tmp_path, plan={"source": str(tmp_path / place)}, overwrite=True)
    assert (tmp_path / "in" / "layer.pt").read_text() == "weights"


def test_a_link_stands_for_what_it_points_to(tmp_path):
    fill(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", "new ", overwrite=True)
    assert (tmp_path / "link").is_symlink() and tree(tmp_path / "real")["a.txt"] == "new a.txt"


class FullDiskError(OSError):
    def __init__(self):
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [FullDiskError(), ValueError("RESOURCE_EXHAUSTED: No space left on device [OS error 28]")])
def test_a_full_disk_is_one_line_and_the_same_command_resumes(error, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(SourceError) as caught, opened(target) as folder:
        write(folder, "a.txt")
        with folder.unit("b"):
            try:
                raise error
            except Exception as cause:
                raise SourceError("b: writing failed") from cause
    assert str(caught.value) == (
        f"{target}: the disk is full; 1 finished units stay in {tmp_path / '.out.partial'}. Free some space, then the same command resumes"
    )
    assert fill(target) == UNITS[1:]
    assert tree(target) == EXPECTED


def test_a_disk_that_is_full_at_once_leaves_nothing(tmp_path):
    with pytest.raises(SourceError, match="the disk is full; nothing is left behind"), opened(tmp_path / "out") as folder, folder.unit("a.txt"):
        raise FullDiskError
    assert os.listdir(tmp_path) == []


def test_a_manifest_that_cannot_be_written_loses_one_unit(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="the disk is full"), opened(tmp_path / "out") as folder:
        write(folder, "a.txt")
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(FullDiskError()))
        write(folder, "b")
    monkeypatch.undo()
    assert fill(tmp_path / "out") == UNITS[1:]


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    with opened(tmp_path / "out") as first:
        write(first, "a.txt")
        with pytest.raises(SourceError, match="another process is writing it"), opened(tmp_path / "out"):
            pass
        assert first.done("a.txt") and (first.path / "a.txt").exists()


def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "letter").write_text("dear")
    with pytest.raises(SourceError, match="is in the way"):
        fill(tmp_path / "out")
    assert (tmp_path / ".out.partial" / "letter").read_text() == "dear"


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be written"):
        fill(tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/a", ".hidden", MANIFEST_FILE])
def test_names_that_would_leave_or_upset_the_folder_are_refused(name, tmp_path):
    with opened(tmp_path / "out") as folder, pytest.raises(ValueError, match="name of a unit"), folder.unit(name):
        pass


def test_verification_names_what_differs(tmp_path):
    fill(tmp_path / "out")
    (tmp_path / "out" / "a.txt").write_text("b.txt")
    (tmp_path / "out" / "b" / "y").unlink()
    (tmp_path / "out" / "new").write_text("not listed")
    assert verify_manifest(tmp_path / "out") == ["a.txt", "b/y"]
    with pytest.raises(SourceError, match=r"manifest\.json: cannot be read"):
        verify_manifest(tmp_path)


def test_a_fingerprint_changes_with_any_file_but_a_hidden_one(tmp_path):
    for name in ("a", "b/c", ".git/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = source_fingerprint(tmp_path)
    assert set(before) == {"a", "b/c"} and source_fingerprint(tmp_path / "nothing") == {}
    (tmp_path / ".git" / "x").write_text("changed")
    assert source_fingerprint(tmp_path) == before
    os.utime(tmp_path / "b" / "c", ns=(1, 1))
    assert source_fingerprint(tmp_path) != before
    assert list(source_fingerprint(tmp_path / "a")) == ["."]
