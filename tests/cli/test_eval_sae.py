import json
import math

import pytest


@pytest.fixture(scope="module")
def pair(model, saes) -> list[str]:
    return ["--model", model, "--sae", saes]


def test_every_layer_is_measured_with_and_without_outliers(qscope, pair, tmp_path):
    answer = qscope("eval-sae", *pair, "--limit", 3, "--layers", "0,2", "--sequence-length", 12, "--out", tmp_path / "o.json")
    assert answer.status == 0 and not answer.err and "all tokens" in answer.out and "KL score" in answer.out
    saved = json.loads((tmp_path / "o.json").read_text())
    assert saved["texts"] == 3 and list(saved["layers"]) == ["0", "2"]
    for layer in saved["layers"].values():
        assert layer["tokens_all"] <= 36 and layer["tokens"] <= layer["tokens_all"] - 3
        assert layer["l0"] <= 4 and math.isclose(layer["fvu"] + layer["explained_variance"], 1) and "ce_loss_score" in layer


def test_without_splicing_there_are_no_scores(qscope, pair, tmp_path):
    (tmp_path / "t.txt").write_text("My grandmother made tea.\n\n \n\ntea in the garden\n")
    arguments = ["--data", tmp_path / "t.txt", "--no-splice", "--layers", 1, "--out", tmp_path / "o.json"]
    assert qscope("eval-sae", *pair, *arguments).status == 0
    saved = json.loads((tmp_path / "o.json").read_text())
    assert saved["texts"] == 2 and "ce_loss_score" not in saved["layers"]["1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "none.txt"], "none.txt: no such file"),
        (["--layers", "7"], "layer 7 is out of range"),
        (["--batch-size", "0"], "batch_size is 0, expected 1 or more"),
        (["--limit", "-1"], "limit is -1, expected 1 or more"),
    ],
)
def test_bad_requests_are_refused(refused, pair, arguments, said):
    assert said in refused("eval-sae", *pair, *arguments)


def test_saes_of_another_model_are_refused(refused, model, wide_saes):
    assert "32 wide" in refused("eval-sae", "--model", model, "--sae", wide_saes)
