import json

import pytest

from qscope_jax.features.store.feature_store import read_store

SMALL = ("--layers", "0,2", "--shard-tokens", 60, "--max-length", 16, "--batch-size", 4, "--no-progress")
ROWS = [
    {"body": "My mother made tea.", "lang": "en", "n": 1},
    {"body": " ", "lang": "en", "n": 2},
    {"body": "奶奶在花园里泡茶。", "lang": "zh", "n": 3},
] * 4


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_a_store_of_the_layers_asked_for_is_written_and_described(qscope, refused, model, saes, data, tmp_path):
    options = ("store", "--model", model, "--sae", saes, "--data", data, "--column", "body", "--out", tmp_path / "s", *SMALL)
    answer = qscope(*options)
    assert answer.status == 0 and not answer.err
    store = read_store(tmp_path / "s")
    assert store.layers == (0, 2) and store.columns == ("lang", "n") and store.model == model and store.sae == str(saes)
    assert store.texts == [row["body"] for row in ROWS if row["body"].strip()] and store.column("lang") == ["en", "zh"] * 4
    assert store.rows == [0, 2, 3, 5, 6, 8, 9, 11] and store.facts["total"]["blank"] == 4
    for said in (f"{store.num_tokens:,}", "lang, n", "counted tokens"):
        assert said in answer.out
    assert "exists; pass --overwrite" in refused(*options)
    assert qscope(*options, "--overwrite", "--columns", "lang", "--limit", 3).status == 0
    assert read_store(tmp_path / "s").columns == ("lang",) and read_store(tmp_path / "s").num_texts == 2


def test_plain_texts_and_the_embedded_corpus_are_read_too(qscope, model, saes, tmp_path):
    (tmp_path / "t.txt").write_text("One text.\n\nAnother one.\n")
    assert qscope("store", "--model", model, "--sae", saes, "--data", tmp_path / "t.txt", "--out", tmp_path / "a", *SMALL).status == 0
    assert read_store(tmp_path / "a").texts == ["One text.", "Another one."] and read_store(tmp_path / "a").columns == ()
    assert qscope("store", "--model", model, "--sae", saes, "--data", "tiny", "--limit", 5, "--out", tmp_path / "b", *SMALL).status == 0
    assert read_store(tmp_path / "b").column("language") == ["en"] * 5


def test_mistakes_get_one_line(refused, model, saes, data, tmp_path):
    def refusal(*options):
        return refused("store", "--model", model, "--sae", saes, "--out", tmp_path / "s", *SMALL, *options)

    assert "has no column 'text'; the columns there are 'body', 'lang', 'n'" in refusal("--data", data)
    assert "the corpus has no column 'label' to keep" in refusal("--data", data, "--column", "body", "--columns", "label")
    assert "no such file" in refusal("--data", tmp_path / "none.jsonl")
    assert "layer 9 is out of range" in refusal("--data", data, "--column", "body", "--layers", "9")
    assert "shard_tokens is 0" in refusal("--data", data, "--column", "body", "--shard-tokens", 0)
    assert not (tmp_path / "s").exists()
