import threading

import numpy as np
import pytest

from qscope_jax.data.record_log import RecordLog
from qscope_jax.errors import SourceError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "log.jsonl"


def test_records_are_there_when_the_file_is_opened_again(path):
    log = RecordLog(path, "id", "record")
    assert not path.parent.exists()
    log.add("a", {"number": np.int64(3), "text": "é\u2028\n"})
    log.add("b", {})
    log.add("a", {"number": 4})
    again = RecordLog(path, "id", "record")
    assert list(again) == list(log) == [{"id": "a", "number": 4}, {"id": "b"}]
    assert len(again) == 2 and again.get("c") is None


@pytest.mark.parametrize("cut", [1, 3, 9, 14])
def test_a_line_that_was_cut_is_skipped_now_and_later(path, cut):
    log = RecordLog(path, "id", "record")
    log.add("a", {"n": 1})
    log.add("b", {"n": 2})
    path.write_text(path.read_text()[:-cut])
    log = RecordLog(path, "id", "record")
    assert log.get("a") == {"id": "a", "n": 1}
    log.add("c", {"n": 3})
    assert [record["id"] for record in RecordLog(path, "id", "record")] == (["a", "b", "c"] if cut == 1 else ["a", "c"])


def test_threads_do_not_mix_their_lines(path):
    log = RecordLog(path, "id", "record")
    threads = [threading.Thread(target=lambda i=i: [log.add(f"{i} {j}", {"text": "x" * 999}) for j in range(20)]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(RecordLog(path, "id", "record")) == 80


@pytest.mark.parametrize("content", ["a text\n", '{"text": "row"}\n', "[1]\n", '{"text": "row without an end'])
def test_a_file_of_another_kind_is_not_added_to(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(SourceError, match="line 1: is no finished reply"):
        RecordLog(path, "id", "finished reply")
    assert path.read_text() == content


def test_what_cannot_be_read_or_written_is_reported(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        RecordLog(tmp_path, "id", "record")
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="writing failed"):
        RecordLog(tmp_path / "file" / "log", "id", "record").add("a", {})
