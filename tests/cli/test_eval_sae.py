import json
import math
import shutil
from pathlib import Path

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
        histogram = layer["density_histogram"]
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1 and sum(histogram["counts"]) + histogram["silent"] == 40
        assert "decoder_max_cosine" not in layer and "saebench_explained_variance_all" in layer
        assert layer["tokens"] + layer["first_tokens"] + layer["outlier_tokens"] == layer["tokens_all"]
        assert layer["l0"] <= 4 and math.isclose(layer["fvu"] + layer["explained_variance"], 1) and "ce_loss_score" in layer


def test_without_splicing_there_are_no_scores(qscope, pair, tmp_path):
    (tmp_path / "t.txt").write_text("My grandmother made tea.\n\n \n\ntea in the garden\n")
    arguments = ["--data", tmp_path / "t.txt", "--no-splice", "--layers", 1, "--out", tmp_path / "o.json"]
    assert qscope("eval-sae", *pair, *arguments).status == 0
    saved = json.loads((tmp_path / "o.json").read_text())
    assert saved["texts"] == 2 and "ce_loss_score" not in saved["layers"]["1"] and "probing" not in saved


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    words = ["garden", "tea", "grandmother", "made", "the", "in"]
    rows = [{"body": f"My {words[i % 6]} {words[i % 5]} {words[i % 4]} {'奶奶' if i % 2 else 'tea'}", "topic": i % 2} for i in range(24)]
    path = tmp_path_factory.mktemp("labels") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labelled_texts_are_probed_and_a_page_shows_all(qscope, pair, labelled, tmp_path):
    columns = ["--column", "body", "--label-column", "topic", "--sequence-length", 12]
    files = ["--out", tmp_path / "o.json", "--page", tmp_path / "p.html"]
    answer = qscope("eval-sae", *pair, "--limit", 2, "--layers", "1", "--no-splice", "--geometry", "--probe", labelled, *columns, *files)
    assert answer.status == 0 and "Probes of 2 classes: accuracy on 4 texts held out" in answer.out and "p.html" in answer.out
    saved = json.loads((tmp_path / "o.json").read_text())
    probes = saved["probing"]["1"]["probes"]
    assert {(probe["label"], probe["source"], probe["k"]) for probe in probes} >= {("0", "sae", 1), ("1", "residual", 5), ("0", "dense", 16)}
    assert (saved["probing"]["1"]["repeated"], saved["probing"]["1"]["train"]) == (0, 20) and "decoder_max_cosine" in saved["layers"]["1"]
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.endswith("</html>\n") and all(part in page for part in ("FVU by layer", "Features by firing rate", "Directions", "Sparse probing"))


def test_the_page_of_a_run_s_saes_has_the_run_s_curves(qscope, pair, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pair[3], run / "saes")
    (run / "metrics.jsonl").write_text('{"step": 1, "fvu": [0.5, 0.6, 0.7]}\n')
    arguments = ["--model", pair[1], "--sae", run / "saes", "--limit", 2, "--layers", "1", "--no-splice", "--sequence-length", 12]
    assert qscope("eval-sae", *arguments, "--page", tmp_path / "p.html").status == 0
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "Training run run" in page and "FVU by layer" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "none.txt"], "none.txt: no such file"),
        (["--layers", "7"], "layer 7 is out of range"),
        (["--batch-size", "0"], "batch_size is 0, expected 1 or more"),
        (["--limit", "-1"], "limit is -1, expected 1 or more"),
        (["--probe", "none.jsonl"], "none.jsonl: no such file"),
        (["--probe", "none.txt"], "is no table; give a file of"),
        (["--page", "/dev/null/page.html"], "cannot be written"),
    ],
)
def test_bad_requests_are_refused(refused, pair, arguments, said):
    assert said in refused("eval-sae", *pair, *arguments)


def test_saes_of_another_model_are_refused(refused, model, wide_saes):
    assert "32 wide" in refused("eval-sae", "--model", model, "--sae", wide_saes)


def test_labels_that_cannot_be_probed_are_refused_before_the_model_is_loaded(refused, labelled, tmp_path):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": f"t{i}", "label": "same"}) + "\n" for i in range(6)))
    assert "have 1 class; a probe needs" in refused("eval-sae", "--model", "/no/model", "--probe", tmp_path / "few.jsonl")
    assert "has no column 'label'" in refused("eval-sae", "--model", "/no/model", "--probe", labelled, "--column", "body")
