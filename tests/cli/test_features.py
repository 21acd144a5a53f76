import json
from pathlib import Path

import pytest

TEXT = "My grandmother made tea in the garden."


@pytest.fixture(scope="module")
def pair(model, saes) -> list[str]:
    return ["--model", model, "--sae", saes]


def test_features_are_ranked_with_their_strongest_token(qscope, pair, tmp_path):
    answer = qscope("features", TEXT, *pair, "--layers", "2,0", "--top", 3, "--tokens", "--page", tmp_path / "p.html", "--out", tmp_path / "o.json")
    assert answer.status == 0 and not answer.err and answer.out.count(TEXT) >= 3
    (text,) = json.loads((tmp_path / "o.json").read_text())["texts"]
    assert text["text"] == TEXT and list(text["layers"]) == ["2", "0"]
    for layer in text["layers"].values():
        assert layer["counted_tokens"] == text["tokens"] - 1
        scores = [one["activation"] for one in layer["features"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True) and scores[-1] > 0
        assert all(one["position"] > 0 and TEXT.find(one["token"]) > 0 for one in layer["features"])
    strongest = text["layers"]["2"]["features"][0]["feature"]
    assert f"layer 2, feature {strongest}" in (tmp_path / "p.html").read_text() and f"layer 2, feature {strongest};" in answer.out


def test_tiny_is_the_embedded_pair(qscope, model, saes, monkeypatch, tmp_path):
    monkeypatch.setattr("qscope_jax.demo.embedded.TINY", Path(model))
    monkeypatch.setattr("qscope_jax.demo.embedded.tiny_saes", lambda say: say("Training.") or Path(saes))
    answer = qscope("features", TEXT, "--layers", 1, "--out", tmp_path / "o.json")
    assert answer.status == 0 and answer.err == "Training.\n"
    assert json.loads((tmp_path / "o.json").read_text())["config"]["model"] == "tiny"


def test_a_file_is_read_document_by_document_without_the_blank_ones(qscope, pair, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "tea in the garden"}\n{"text": " "}\n{"text": "the garden"}\n{"text": "made tea"}\n')
    arguments = ["--file", tmp_path / "texts.jsonl", "--limit", 3, "--by", "mean", "--keep-first", "--layers", 1, "--feature", 7]
    assert qscope("features", *arguments, *pair, "--out", tmp_path / "o.json").status == 0
    texts = json.loads((tmp_path / "o.json").read_text())["texts"]
    assert [one["text"] for one in texts] == ["tea in the garden", "the garden"]
    assert all(one["layers"]["1"]["counted_tokens"] == one["tokens"] for one in texts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either texts or --file"),
        ([""], "a text is empty"),
        ([TEXT, "--layers", "3"], "layer 3 is out of range"),
        ([TEXT, "--layers", "1,1"], "none of them twice"),
        ([TEXT, "--layers", "0", "--feature", "40"], "feature 40 is out of range; the SAE of layer 0 has features 0 to 39"),
        ([TEXT, "--top", "0"], "top is 0, expected 1 or more"),
        (["--file", "none.txt"], "none.txt: no such file"),
    ],
)
def test_bad_requests_are_refused(refused, pair, tmp_path, arguments, said):
    out = tmp_path / "o.json"
    assert said in refused("features", *arguments, *pair, "--out", out, "--page", tmp_path / "p.html")
    assert not list(tmp_path.iterdir())


def test_saes_of_another_model_are_refused(refused, model, wide_saes):
    assert "reads residual streams 32 wide" in refused("features", TEXT, "--model", model, "--sae", wide_saes)


def test_the_embedded_saes_are_not_tried_on_another_model(refused, model):
    assert "the SAEs of the embedded model" in refused("features", TEXT, "--model", model)


def test_the_embedded_saes_serve_what_was_fine_tuned_from_the_embedded_model(tmp_path, monkeypatch):
    from qscope_jax.cli import sources
    from qscope_jax.demo import embedded

    embedded.tiny_model().save(tmp_path / "tuned")
    monkeypatch.setattr(embedded, "tiny_saes", lambda say: tmp_path / "saes")
    assert sources._sae_source("tiny", sources.open_model(str(tmp_path / "tuned"))) == str(tmp_path / "saes")
