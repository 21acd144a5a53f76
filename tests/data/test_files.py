import errno
import json
import os
from pathlib import Path

import pytest

from qscope_jax.data.files import atomic_path, plain, read_json, write_json
from qscope_jax.errors import SourceError


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, SystemExit and the like: not an Exception."""


FAILURES = [ValueError, KeyboardInterrupt, Interrupted]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_plain_leaves_text_and_whole_numbers_alone():
    assert plain({"a": (1, "x", True, None, float("inf"))}) == {"a": [1, "x", True, None, None]}


def test_file_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "sub" / "result.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "half"
    assert names(target.parent) == ["result.txt"]


@pytest.mark.parametrize("failure", FAILURES)
def test_interrupted_write_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure), atomic_path(tmp_path / "result.txt") as temporary:
        temporary.write_text("half")
        raise failure
    assert names(tmp_path) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_interrupted_write_keeps_the_old_file(tmp_path, failure):
    target = tmp_path / "result.txt"
    target.write_text("old")
    with pytest.raises(failure), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise failure
    assert target.read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


def test_write_replaces_the_old_file(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_failed_write_is_reported_in_one_line_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("old")
    with pytest.raises(SourceError, match="No space left") as caught, atomic_path(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "\n" not in str(caught.value)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


def test_writer_that_already_moved_its_file_away_is_reported(tmp_path):
    with pytest.raises(SourceError, match="writing failed"), atomic_path(tmp_path / "result.txt") as temporary:
        temporary.unlink()
    assert names(tmp_path) == []


def test_folder_replaces_the_old_folder_as_a_whole(tmp_path):
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_path(target, directory=True) as temporary:
        (temporary / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["checkpoint"]


def test_new_folder_appears_only_when_it_is_complete(tmp_path):
    with atomic_path(tmp_path / "a" / "checkpoint", directory=True) as temporary:
        (temporary / "new").write_text("new")
        assert not (tmp_path / "a" / "checkpoint").exists()
    assert names(tmp_path / "a" / "checkpoint") == ["new"]


@pytest.mark.parametrize("failure", FAILURES)
def test_interrupted_folder_leaves_the_old_one_and_no_rest(tmp_path, failure):
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(failure), atomic_path(target, directory=True) as temporary:
        (temporary / "new").write_text("new")
        raise failure
    assert names(target) == ["old"]
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_folder_that_cannot_be_renamed_leaves_the_old_one_in_place(tmp_path, monkeypatch, failing_call):
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").write_text("old")
    calls, rename = [], os.replace

    def flaky(source, destination):
        calls.append(source)
        if len(calls) == failing_call:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", flaky)
    with pytest.raises(SourceError, match="nothing was changed"), atomic_path(target, directory=True) as temporary:
        (temporary / "new").write_text("new")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("directory", [False, True])
def test_parent_that_is_a_file_is_a_source_error(tmp_path, directory):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be written"), atomic_path(tmp_path / "file" / "result", directory=directory):
        pytest.fail("must not get here")


def test_unwritable_parent_is_a_source_error(tmp_path, monkeypatch):
    def refuse(*args, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)  # the superuser, who often runs tests, may write everywhere
    with pytest.raises(SourceError, match="Permission denied.*choose a folder"), atomic_path(tmp_path / "result.txt"):
        pytest.fail("must not get here")
    assert names(tmp_path) == []


@pytest.mark.parametrize("directory", [False, True])
def test_result_is_as_readable_as_the_umask_allows(tmp_path, directory):
    previous = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "result", directory=directory):
            pass
    finally:
        os.umask(previous)
    assert (tmp_path / "result").stat().st_mode & 0o777 == (0o750 if directory else 0o640)


def test_json_returns_as_it_was_written(tmp_path):
    value = {"name": "größe", "values": [1, 2.5, None, True], "nested": {"a": []}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert "größe" in (tmp_path / "value.json").read_text(encoding="utf-8")


def test_value_that_json_cannot_hold_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"a": object()})
    assert read_json(tmp_path / "value.json") == {"a": 1}
    assert names(tmp_path) == ["value.json"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
        (json.dumps([1, 2]).encode(), "JSON list, expected an object"),
    ],
)
def test_damaged_json_is_a_source_error_of_one_line(tmp_path, content, complaint):
    (tmp_path / "value.json").write_bytes(content)
    with pytest.raises(SourceError, match=complaint) as caught:
        read_json(tmp_path / "value.json")
    assert "value.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_json_is_a_source_error(tmp_path):
    with pytest.raises(SourceError, match=r"none\.json: cannot be read"):
        read_json(tmp_path / "none.json")
    with pytest.raises(SourceError, match="cannot be read"):
        read_json(tmp_path)
