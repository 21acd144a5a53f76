import json

import pyarrow
import pyarrow.parquet
import pytest

from qscope_jax.data.labels import load_labelled_texts
from qscope_jax.errors import InputError, SourceError


def write_json(path, rows):
    path.write_text("".join((json.dumps(row) if row is not None else "") + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_json_lines_keep_text_and_class_together_past_blank_ones(tmp_path):
    rows = [{"text": "a\rb", "label": "x"}, None, {"text": " ", "label": None}, {"label": 3, "text": "c"}, {"text": "d", "label": False}]
    found = load_labelled_texts(write_json(tmp_path / "t.jsonl", rows))
    assert found.texts == ("a\rb", "c", "d") and found.labels == ("x", "3", "False")
    assert load_labelled_texts(tmp_path / "t.jsonl", limit=3).labels == ("x", "3")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "t.json").write_bytes(b'\xef\xbb\xbf{"text": "a", "label": 1}\n')
    assert load_labelled_texts(tmp_path / "t.json").labels == ("1",)


def test_parquet_columns_may_have_any_names(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", body=["a", "", "c"], topic=[7, None, 8], other=[1.0, 2.0, 3.0])
    found = load_labelled_texts(path, column="body", label_column="topic")
    assert found.texts == ("a", "c") and found.labels == ("7", "8")
    assert load_labelled_texts(path, column="body", label_column="topic", limit=2).labels == ("7",)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("labels", "column", "said"),
    [
        (["x", None], "label", "column label holds nothing, expected a class"),
        (["x", " "], "label", "column label holds nothing, expected a class"),
        ([0.5, 0.5], "label", "column label holds float, expected a class"),
        (["x", "y"], "topic", "has no column 'topic'; the columns there are 'text', 'label'"),
    ],
)
def test_rows_without_a_class_are_refused(tmp_path, kind, labels, column, said):
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        write_json(path, [{"text": "a", "label": label} for label in labels])
    else:
        write_parquet(path, text=["a", "a"], label=labels)
    with pytest.raises(InputError, match=said) as caught:
        load_labelled_texts(path, label_column=column)
    assert str(path) in str(caught.value)


def test_a_source_that_can_hold_no_labels_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(SourceError, match="is no table; give a file of"):
        load_labelled_texts(tmp_path / "t.txt")
    with pytest.raises(SourceError, match="has no .jsonl, .json, .parquet, .csv files"):
        load_labelled_texts(tmp_path)
    with pytest.raises(SourceError, match="no such file"):
        load_labelled_texts(tmp_path / "none.jsonl")
    with pytest.raises(SourceError, match="all rows are blank"):
        load_labelled_texts(write_json(tmp_path / "blank.jsonl", [{"text": " ", "label": "x"}]))
