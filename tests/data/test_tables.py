import json

import datasets
import huggingface_hub
import pytest

from qscope_jax.data.tables import load_table
from qscope_jax.errors import InputError, SourceError

ROWS = [{"text": "a,b", "label": 1, "more": [1, 2]}, {"text": "c", "label": 0, "more": None}]


@pytest.fixture(params=["jsonl", "parquet", "csv"])
def table_file(tmp_path, request):
    path = tmp_path / f"t.{request.param}"
    if request.param == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    elif request.param == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text('\ufefftext,label\r\n"a,b",1\r\nc,0\r\n', encoding="utf-8")
    return path


def test_every_kind_of_file_gives_the_same_rows(table_file):
    table = load_table(table_file)
    assert table.texts("text") == ["a,b", "c"] and table.classes("label") == ["1", "0"]
    assert len(load_table(table_file, limit=1)) == 1
    assert table.select([1, 0]).texts("text") == ["c", "a,b"]
    with pytest.raises(InputError, match="has no column 'nothing'; the columns there are 'text', 'label'"):
        table.column("nothing")


def test_a_json_file_may_be_one_list_or_an_object_a_line(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("\ufeff \n" + json.dumps(ROWS, indent=1), encoding="utf-8")
    table = load_table(path)
    assert table.texts("text") == ["a,b", "c"] and table.places == ("item 0", "item 1")
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert load_table(path).places == ("line 1", "line 2")


def test_a_folder_is_its_files_by_name_and_places_say_which(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.csv").write_text("text\nthree\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / ".hidden.jsonl").write_text("[")
    (tmp_path / "read.me").write_text("no rows")
    table = load_table(tmp_path)
    assert table.texts("text") == ["one", "two", "three"] and table.places == ("a.jsonl line 1", "a.jsonl line 2", "sub/b.csv row 0")
    assert load_table(tmp_path, limit=1).texts("text") == ["one"]
    with pytest.raises(InputError, match="sub/b.csv row 0: has no column 'label'"):
        table.select([2]).column("label")
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match=r"none: has no .jsonl, .json, .parquet, .csv files"):
        load_table(tmp_path / "none")


def test_a_hub_dataset_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="no-such-owner/none: no such file or folder, and split test cannot be loaded from the hub"):
        load_table("no-such-owner/none", split="test")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.jsonl", b'{"a": 1}\n[1]\n', "line 2: holds a JSON list; expected one JSON object a line"),
        ("t.jsonl", b"", "holds no rows"),
        ("t.csv", b"a,b\n1,2,3\n", "row 0: has another number of cells"),
        ("t.csv", b"a,b\n\xff\n", "is not CSV in UTF-8"),
        ("t.json", b'[{"a": 1}, 2]', "item 1: holds a JSON int; expected an object"),
        ("t.json", b'[{"a": 1}', "is not JSON .*; expected a list of objects, or one object a line"),
        ("t.parquet", b"PAR1", "is not a complete Parquet file"),
        ("t.txt", b"words", "is no table"),
    ],
)
def test_damaged_files_get_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=said):
        load_table(tmp_path / name)


def test_what_is_no_text_is_refused_by_its_place(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 3: column text holds int, expected text"):
        load_table(tmp_path / "t.jsonl").texts("text")
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud800"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 1: column text holds .* which is not a character"):
        load_table(tmp_path / "t.jsonl").texts("text")
