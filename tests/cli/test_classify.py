import io
import json
import re
import shutil

import numpy as np
import pytest

RULE = ("--k", 2, "--samples", 50, "--batch-size", 8)


@pytest.fixture(scope="module")
def pair(model, saes) -> list[str]:
    return ["--model", model, "--sae", saes]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences with tea or garden in them, in two languages, some of them twice."""
    rng = np.random.default_rng(0)
    words = {"en": ("My", "in", "the", "made", "grandmother"), "zh": ("奶奶", "在", "里", "泡", "花")}
    marks = {"tea": {"en": "tea", "zh": "茶"}, "garden": {"en": "garden", "zh": "园"}}
    rows = []
    for i in range(120):
        language, label = ("en", "zh")[i % 2], ("tea", "garden")[i // 2 % 2]
        inside = [words[language][j] for j in rng.integers(0, 5, 4)]
        inside.insert(int(rng.integers(1, 4)), marks[label][language])
        rows.append({"text": (" " if language == "en" else "").join(inside), "label": label, "lang": language, "half": "train" if i < 80 else "test"})
    path = tmp_path_factory.mktemp("labelled") / "texts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*rows, *rows[:3]]), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["top_k", "pre_activation"])
def classifier(request, pair, data, tmp_path_factory):
    from qscope_jax.cli.main import main

    out = tmp_path_factory.mktemp("classifier") / request.param
    options = [*pair, *RULE, "--out", out, "--reading", request.param, "--language-column", "lang", "--languages", "en", "--thresholds", "f1"]
    assert main(["classify", "fit", str(data), *map(str, options)]) == 0
    return out


def test_a_classifier_is_fitted_scored_and_answers(classifier, qscope, tmp_path):
    facts = json.loads((classifier / "classifier.json").read_text())
    assert facts["positive"] == "tea" and len(facts["terms"]) == 2 and facts["facts"]["evaluation_texts"] < facts["facts"]["discovery_texts"] < 60
    answer = qscope("classify", "predict", classifier, "My grandmother made tea", "the garden")
    assert answer.status == 0 and not answer.err and "My grandmother made tea" in answer.out and "score" in answer.out
    assert re.search(r"2 texts", answer.out)


def test_a_file_is_answered_in_lines_and_scored_where_classes_are_known(classifier, qscope, data, tmp_path):
    answer = qscope("classify", "predict", classifier, "--file", data, "--label-column", "label", "--out", tmp_path / "answers.jsonl")
    assert answer.status == 0 and "the first 20" in answer.out and "auc" in answer.out
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 123 and {line["label"] for line in lines} <= {"tea", "garden"}
    assert all((line["score"] > 0) == (line["label"] == "tea") == bool(line["firings"]) for line in lines)


def test_standard_input_is_answered_line_by_line(classifier, qscope, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("My grandmother\n\nmade tea\n"))
    answer = qscope("classify", "predict", classifier, "--file", "-", "--batch-size", 1)
    assert [json.loads(line)["text"] for line in answer.out.splitlines()] == ["My grandmother", "made tea"]


def test_a_report_covers_languages_layers_and_little_data(qscope, pair, data, tmp_path):
    files = ["--page", tmp_path / "p.html", "--out", tmp_path / "o.json"]
    options = ["--language-column", "lang", "--split-column", "half", "--ks", "1,3", "--shares", "0.2,1", "--draws", 2]
    answer = qscope("classify", "report", data, *pair, *RULE, *options, *files)
    assert answer.status == 0 and not answer.err
    saved = json.loads((tmp_path / "o.json").read_text())
    assert saved["verb"] == "classify report" and saved["left_out"]["repeated"] >= 3 and list(saved["languages"]) == ["en", "zh"]
    english = saved["languages"]["en"]
    assert english["layers"] == [0, 1, 2] and np.shape(english["evaluation_f1"]) == (3, 2)
    names = [one["name"] for one in english["methods"]]
    assert names[0] == "OR rule" and {"difference of means", "logistic regression", "bag of words", "best feature of 3 layers"} <= set(names)
    words = next(one for one in english["methods"] if one["name"] == "bag of words")
    assert words["f1"]["value"] > 0.9 and words["f1"]["low"] <= words["f1"]["value"] <= words["f1"]["high"]
    assert np.shape(saved["transfer"]["f1"]) == (2, 2) and np.shape(saved["jaccard"]["1"]) == (2, 2)
    assert np.shape(saved["efficiency"]["layer_chosen"]) == (2, 2)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "Between languages" in page and "With fewer texts" in page and 'class="heat"' in page and "found: layer" in page


def test_a_store_says_the_same_as_the_model(qscope, pair, data, tmp_path):
    pytest.importorskip("qscope_jax.features.store.store_writer")
    written = ("--shard-tokens", 300, "--batch-size", 8, "--max-length", 64, "--no-progress", "--streams", "--max-norm-multiple", 0)
    assert qscope("store", *pair, "--data", data, "--out", tmp_path / "store", *written).status == 0
    common = (*RULE, "--language-column", "lang", "--shares", "0.5,1", "--draws", 1, "--max-norm-multiple", 0)
    assert (
        qscope("classify", "report", "--store", tmp_path / "store", *common, "--out", tmp_path / "a.json", "--page", tmp_path / "a.html").status == 0
    )
    assert qscope("classify", "report", data, *pair, *common, "--out", tmp_path / "b.json").status == 0
    stored, read = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    for one, other in zip(*(found["languages"].values() for found in (stored, read)), strict=True):
        assert one["features"] == other["features"] and one["evaluation_f1"] == pytest.approx(np.array(other["evaluation_f1"]))
        assert [method["name"] for method in one["methods"]] == [method["name"] for method in other["methods"]]
    assert 'class="heat"' in (tmp_path / "a.html").read_text(encoding="utf-8")
    answer = qscope("classify", "fit", "--store", tmp_path / "store", *RULE, "--per-class", 40, "--out", tmp_path / "c")
    assert answer.status == 0 and qscope("classify", "predict", tmp_path / "c", "My tea").status == 0


def test_a_store_is_fitted_with_the_saes_given(qscope, refused, pair, saes, wide_saes, data, tmp_path):
    written = ("--shard-tokens", 10_000, "--batch-size", 8, "--max-length", 64, "--no-progress")
    assert qscope("store", *pair, "--data", data, "--out", tmp_path / "store", *written).status == 0
    shutil.copytree(saes, tmp_path / "moved")
    assert qscope("classify", "fit", "--store", tmp_path / "store", *RULE, "--sae", tmp_path / "moved", "--out", tmp_path / "c").status == 0
    assert json.loads((tmp_path / "c" / "classifier.json").read_text())["sae"] == str(tmp_path / "moved")
    said = refused("classify", "fit", "--store", tmp_path / "store", *RULE, "--sae", wide_saes, "--out", tmp_path / "d")
    assert f"{tmp_path / 'store'} was read with" in said


@pytest.mark.parametrize("keep_first", [False, True])
def test_marked_tokens_are_those_that_count(pair, data, keep_first):
    from qscope_jax.cli.classify import ReportConfig
    from qscope_jax.cli.labelled import mark_tokens, read_activations, read_labelled

    config = ReportConfig(data=str(data), model=pair[1], sae=pair[3], layers=(1,), keep_first=keep_first, batch_size=8)
    labelled, _ = read_labelled(config)
    found = read_activations(config, labelled, None)
    maxima = found.tables[1].maxima[:12].toarray()
    wanted = [(row, 1, int(feature)) for row in range(len(maxima)) for feature in np.flatnonzero(maxima[row])[:6]]
    marked = mark_tokens(found, labelled, None, wanted)
    largest = [activation.max() for _, activation in marked]
    np.testing.assert_allclose(largest, [maxima[row, feature] for row, _, feature in wanted], rtol=1e-4)
    assert any(activation[0] > 0 for _, activation in marked) == keep_first


def test_each_split_of_a_hub_dataset_names_a_language(qscope, pair, data, tmp_path, monkeypatch):
    from qscope_jax.data import tables

    whole = tables.load_table(data)

    def load(source, *, split="train", limit=None):
        return whole.select([i for i, row in enumerate(whole.rows) if row["lang"] == split])

    monkeypatch.setattr(tables, "load_table", load)
    few = ("--no-baselines", "--shares", "1", "--draws", 1, "--layers", 1, "--out", tmp_path / "o.json")
    assert qscope("classify", "report", "owner/texts", "--splits", "en", "zh", "--per-class", 20, *pair, *RULE, *few).status == 0
    saved = json.loads((tmp_path / "o.json").read_text())
    assert list(saved["languages"]) == ["en", "zh"] and saved["texts"]["discovery"] + saved["texts"]["evaluation"] <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--out", "c"], "give either DATA"),
        (["fit", "DATA", "--store", "s", "--out", "c"], "give either DATA"),
        (["fit", "DATA"], "--out is missing"),
        (["fit", "DATA", "--out", "c", "--label-column", "class"], "has no column 'class'"),
        (["fit", "DATA", "--out", "c", "--positive", "coffee"], "positive class 'coffee': texts are of 'garden', 'tea'"),
        (["fit", "DATA", "--out", "c", "--label-column", "text"], "classes ("),
        (["fit", "DATA", "--out", "c", "--languages", "fr"], "no text is of language 'fr'"),
        (["fit", "DATA", "--out", "c", "--split-column", "lang"], "the column of halves names 'en', 'zh'"),
        (["fit", "DATA", "--out", "c", "--per-class", "2"], "expected 5 or more"),
        (["fit", "DATA", "--out", "c", "--share", "1"], "share is 1"),
        (["fit", "DATA", "--out", "c", "--layers", "9"], "layer 9 is out of range"),
        (["report", "DATA", "--ks", "0"], "ks is (0,)"),
        (["report", "DATA", "--shares", "0.5,0.9"], "expected shares that ascend"),
        (["report", "--store", "none"], "none: holds no feature store"),
        (["predict", "nowhere", "tea"], "nowhere: holds no classifier"),
        (["predict"], "CLASSIFIER is missing"),
        (["guess"], "unknown action 'guess'; qscope classify has fit, predict, report"),
    ],
)
def test_bad_requests_are_refused(refused, pair, data, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    arguments = [str(data) if one == "DATA" else one for one in arguments]
    assert said in refused("classify", *arguments, *(pair if arguments[0] in ("fit", "report") else []))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_refused_before_anything_is_read(refused, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "exists and is no classifier" in refused("classify", "fit", "no-such-data.jsonl", "--out", tmp_path)


def test_a_classifier_of_another_model_or_unknown_classes_is_refused(classifier, refused, data, tmp_path):
    assert "classes are 'en', 'zh'; expected 'tea' and another" in refused(
        "classify", "predict", classifier, "--file", data, "--label-column", "lang"
    )
    assert "has width" in refused("classify", "predict", classifier, "tea", "--model", "tiny")
    assert "a column of --file" in refused("classify", "predict", classifier, "tea", "--label-column", "label")
