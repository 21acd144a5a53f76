import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from qscope_jax.data.texts import load_texts
from qscope_jax.errors import InputError, QscopeError, SourceError


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    """No hub, no progress bars, and a cache of this test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds one dataset of three rows, and the requests made to it."""
    requests = []

    def load_dataset(path, name, *, split, streaming):
        requests.append((path, name, split, streaming))
        if split != "train":
            raise ValueError(f"Unknown split {split}. Should be one of ['train'].\nSecond line")
        dataset = datasets.Dataset.from_dict({"text": ["a", None, "c"], "id": [1, 2, 3]})
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return requests


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path: Path, *rows: object) -> Path:
    return write(path, "\n".join(json.dumps(row) for row in rows))


def write_parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def one_line(error: pytest.ExceptionInfo[QscopeError], *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_blank_lines_separate_the_documents_of_a_text_file(tmp_path):
    texts = load_texts(write(tmp_path / "a.txt", "\n \none\nline\n\n \t\n\ntwö\n\nthree"))
    assert list(texts) == ["one\nline", "twö", "three"]


def test_windows_text_file_reads_as_any_other(tmp_path):
    texts = load_texts(write(tmp_path / "a.txt", "\ufeffone\r\nline\r\n\r\ntwo\r\n"))
    assert list(texts) == ["one\nline", "two"]


def test_json_lines_give_their_column(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "a\\nb", "body": "x"}\r\n\n{"body": "y", "text": "é"}\n')
    assert list(load_texts(file)) == ["a\nb", "é"]
    assert list(load_texts(str(file), column="body")) == ["x", "y"]


def test_json_suffix_means_json_lines_too(tmp_path):
    assert list(load_texts(write_rows(tmp_path / "a.json", {"text": "a"}, {"text": "b"}))) == ["a", "b"]


def test_parquet_gives_its_column(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", text=["a", "b"], body=["x", "y"])
    assert list(load_texts(file)) == ["a", "b"]
    assert list(load_texts(file, column="body")) == ["x", "y"]


def test_folder_joins_its_files_by_name(tmp_path):
    write(tmp_path / "b.txt", "three\n\nfour")
    write_rows(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    write_parquet(tmp_path / "c.parquet", text=["five"])
    write(tmp_path / "sub" / "d.txt", "six")
    write(tmp_path / "README.md", "not a document")
    write(tmp_path / ".cache" / "e.txt", "hidden")
    texts = load_texts(tmp_path)
    assert list(texts) == ["one", "two", "three", "four", "five", "six"]
    assert texts[3] == "four" and texts[4] == "five" and texts[1:4] == ["two", "three", "four"]


def test_documents_are_read_by_any_index(tmp_path):
    texts = load_texts(write(tmp_path / "a.txt", "\n\n".join(f"document {i}" for i in range(20))))
    assert len(texts) == 20
    assert texts[13] == "document 13" and texts[-1] == "document 19" and texts[17:] == ["document 17", "document 18", "document 19"]
    assert texts[::-9] == ["document 19", "document 10", "document 1"]
    for index in (20, -21):
        with pytest.raises(IndexError):
            texts[index]


def test_only_offsets_are_kept_of_a_text_file(tmp_path):
    file = write(tmp_path / "a.txt", "aaa\n\nbbb\n\nccc")
    texts = load_texts(file)
    write(file, "AAA\n\nBBB\n\nCCC")
    assert texts[1] == "BBB"


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.parquet", "."])
def test_limit_stops_after_so_many_documents(tmp_path, name):
    write(tmp_path / "a.txt", "1\n\n2\n\n3")
    write_rows(tmp_path / "b.jsonl", *({"text": text} for text in "123"))
    write_parquet(tmp_path / "c.parquet", text=["1", "2", "3"])
    assert list(load_texts(tmp_path / name, limit=2)) == ["1", "2"]
    assert list(load_texts(tmp_path / name, limit=3)) == ["1", "2", "3"]
    assert len(load_texts(tmp_path / name, limit=100)) == (9 if name == "." else 3)


def test_limit_reaches_into_the_next_file_of_a_folder(tmp_path):
    write(tmp_path / "a.txt", "1\n\n2")
    write(tmp_path / "b.txt", "3\n\n4")
    write(tmp_path / "c.txt", b"\xff is never read")
    assert list(load_texts(tmp_path, limit=3)) == ["1", "2", "3"]
    assert list(load_texts(tmp_path, limit=4)) == ["1", "2", "3", "4"]


def test_limit_below_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="limit is 0") as error:
        load_texts(write(tmp_path / "a.txt", "a"), limit=0)
    one_line(error)


def test_blank_and_null_rows_keep_their_index(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", {"text": None}, {"text": " "}, {"text": "a"})
    assert list(load_texts(file)) == ["", " ", "a"]
    assert list(load_texts(write_parquet(tmp_path / "a.parquet", text=[None, " ", "a"]))) == ["", " ", "a"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_empty_file_is_a_source_error(tmp_path, name):
    with pytest.raises(SourceError, match="is an empty file") as error:
        load_texts(write(tmp_path / name, ""))
    one_line(error, tmp_path / name)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.parquet", "no/such/folder", "./none", "../none"])
def test_missing_file_is_a_source_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no such file or folder") as error:
        load_texts(name)
    one_line(error, name)


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name_is_refused(name):
    with pytest.raises(InputError, match="source is empty"):
        load_texts(name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf_8_are_a_source_error_with_the_line(tmp_path, name):
    with pytest.raises(SourceError, match="line 2: is not UTF-8 .byte 0xff.") as error:
        load_texts(write(tmp_path / name, b'{"text": "a"}\nb\xff\n'))
    one_line(error, tmp_path / name)


def test_parquet_bytes_that_are_not_utf_8_are_a_source_error(tmp_path):
    wrong = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b" ", b"\xffa"]).buffers())
    with pytest.raises(SourceError, match="row 1 is not UTF-8") as error:
        load_texts(write_parquet(tmp_path / "a.parquet", text=wrong))
    one_line(error, tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", " \n\n\t\n"),
        ("a.jsonl", "\n\n"),
        ("a.jsonl", '{"text": " "}\n{"text": null}'),
    ],
)
def test_source_without_any_text_is_a_source_error(tmp_path, name, content):
    with pytest.raises(SourceError, match="holds no") as error:
        load_texts(write(tmp_path / name, content))
    one_line(error, tmp_path / name)


def test_blank_parquet_is_a_source_error(tmp_path):
    with pytest.raises(SourceError, match="holds no text"):
        load_texts(write_parquet(tmp_path / "a.parquet", text=["", " "]))
    with pytest.raises(SourceError, match="holds no documents"):
        load_texts(write_parquet(tmp_path / "b.parquet", text=pyarrow.array([], pyarrow.string())))


def test_missing_column_names_the_columns_there_are(tmp_path):
    files = [write_rows(tmp_path / "a.jsonl", {"body": "x", "id": 1}), write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])]
    for file in files:
        with pytest.raises(InputError, match="has no column 'text'; the columns there are 'body', 'id'") as error:
            load_texts(file)
        one_line(error, file)


def test_column_of_numbers_is_refused(tmp_path):
    for file in (write_rows(tmp_path / "a.jsonl", {"id": 1}), write_parquet(tmp_path / "a.parquet", id=[1])):
        with pytest.raises(InputError, match="column id holds int.*expected text") as error:
            load_texts(file, column="id")
        one_line(error, file)


def test_column_of_messages_is_refused(tmp_path):
    for file in (write_rows(tmp_path / "a.jsonl", {"text": [{"a": "b"}]}), write_parquet(tmp_path / "a.parquet", text=[[{"a": "b"}]])):
        with pytest.raises(InputError, match="expected text"):
            load_texts(file)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "b"', "line 2: is not JSON"),
        ("[" * 100_000, "line 2: is not JSON"),
        ('["b"]', "line 2: holds a JSON list"),
        ('"b"', "line 2: holds a JSON str"),
        ('{"text": "\\ud800"}', "line 2: column text holds '.ud800', which is not a character"),
        ('{"body": "b"}', "line 2: has no column 'text'"),
    ],
)
def test_damaged_line_is_found_at_once_and_numbered(tmp_path, line, complaint):
    with pytest.raises(QscopeError, match=complaint) as error:
        load_texts(write(tmp_path / "a.jsonl", '{"text": "a"}\n' + line))
    one_line(error, tmp_path / "a.jsonl")


def test_damaged_parquet_is_a_source_error(tmp_path):
    whole = write_parquet(tmp_path / "a.parquet", text=["a" * 50, "b" * 50]).read_bytes()
    contents = {"cut": whole[:-20], "no": b"no parquet at all", "torn": whole[:4] + bytes(100) + whole[104:]}
    for name, content in contents.items():
        with pytest.raises(SourceError, match="is not a complete Parquet file") as error:
            load_texts(write(tmp_path / f"{name}.parquet", content))
        one_line(error, name)


def test_other_kinds_of_files_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"neither a folder nor one of \.txt, \.jsonl, \.json, \.parquet"):
        load_texts(write(tmp_path / "a.csv", "text\na"))
    with pytest.raises(SourceError, match=r"has no \.txt"):
        load_texts(tmp_path)


def test_file_that_vanishes_while_in_use_is_a_source_error(tmp_path):
    file = write(tmp_path / "a.txt", "one\n\ntwo")
    texts = load_texts(file)
    file.unlink()
    with pytest.raises(SourceError, match="changed or vanished while in use") as error:
        texts[1]
    one_line(error, file)


def test_hub_dataset_gives_its_column(hub):
    texts = load_texts("owner/name")
    assert list(texts) == ["a", "", "c"] and texts[-1] == "c"
    assert hub == [("owner/name", None, "train", False)]


def test_hub_configuration_follows_a_colon(hub):
    load_texts("owner/name:english")
    load_texts("name")
    assert [request[:2] for request in hub] == [("owner/name", "english"), ("name", None)]


def test_limited_hub_dataset_is_streamed(hub):
    assert list(load_texts("owner/name", limit=2)) == ["a", ""]
    assert hub == [("owner/name", None, "train", True)]


def test_limited_hub_dataset_comes_from_the_cache_when_offline(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert list(load_texts("owner/name", limit=2)) == ["a", ""]
    assert hub == [("owner/name", None, "train", False)]


@pytest.mark.parametrize("limit", [None, 2])
def test_column_of_a_hub_dataset_is_checked(hub, limit):
    with pytest.raises(InputError, match="owner/name: has no column 'body'; the columns there are 'text', 'id'") as error:
        load_texts("owner/name", column="body", limit=limit)
    one_line(error)
    with pytest.raises(InputError, match="column id holds int.*expected text"):
        load_texts("owner/name", column="id", limit=limit)


def test_errors_of_the_hub_become_one_line(hub):
    with pytest.raises(SourceError, match="split test cannot be loaded.*Should be one of") as error:
        load_texts("owner/name", split="test")
    one_line(error)


def test_missing_dataset_is_a_source_error_offline():
    with pytest.raises(SourceError, match="owner/nothing: no such file or folder, and split train cannot be loaded from the hub") as error:
        load_texts("owner/nothing")
    one_line(error)


def test_text_and_json_lines_do_not_import_datasets(tmp_path):
    write(tmp_path / "a.txt", "a")
    write_rows(tmp_path / "b.jsonl", {"text": "b"})
    program = (
        "import sys; from qscope_jax.data.texts import load_texts; "
        f"assert list(load_texts({str(tmp_path)!r})) == ['a', 'b']; "
        "assert not {'datasets', 'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
