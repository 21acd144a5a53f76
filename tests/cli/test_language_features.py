import json

import numpy as np
import pytest

from qscope_jax.cli.language_features import Config, run
from qscope_jax.cli.options import parse
from qscope_jax.data.chat_data import load_conversations
from qscope_jax.data.chat_tokens import ChatFormat, chat_rows
from qscope_jax.demo.corpus import LANGUAGES, sentences
from qscope_jax.errors import InputError, QscopeError
from qscope_jax.features.switching.find_language_features import find_language_features
from qscope_jax.features.switching.language_corpus import CorpusConfig
from qscope_jax.features.switching.language_features import LanguageFeatures
from qscope_jax.features.switching.language_levels import estimate_levels
from qscope_jax.models.language_model import load_model
from qscope_jax.sae.layer_sae import load_sae

TEXTS = {"en": "My grandmother made tea in the garden.", "zh": "奶奶在花园里泡茶。", "fr": "the tea made my garden"}
FEW = CorpusConfig(min_tokens=10, max_tokens=16)


@pytest.fixture
def data(tmp_path) -> str:
    rows = [{"body": text[i:], "lang": code} for i in range(6) for code, text in TEXTS.items()] + [{"body": " ", "lang": None}]
    return _written(tmp_path / "data.jsonl", rows)


@pytest.fixture
def features(model, saes, data, tmp_path):
    def find(*arguments: object) -> LanguageFeatures:
        given = ("--model", model, "--sae", saes, "--data", data, "--column", "body", "--language-column", "lang", "--language", "zh")
        options = (*given, "--out", tmp_path / "out", "--min-tokens", 10, "--max-tokens", 16, "--no-progress", *arguments)
        run(parse("sft features", Config, [str(option) for option in options]))
        return LanguageFeatures.load(tmp_path / "out")

    return find


def _written(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def corpus() -> dict[str, list[str]]:
    return {code: [text[i:] for i in range(6)] for code, text in TEXTS.items()}


def test_features_of_the_last_two_layers_are_found_saved_and_shown(features, model, saes, tmp_path, capsys):
    found = features()
    shown = capsys.readouterr().out
    expected = find_language_features(load_model(model), [load_sae(saes, layer) for layer in (1, 2)], corpus(), "zh", config=FEW)
    assert found.layers == (1, 2) and found.languages == ("en", "zh", "fr") and (found.model, found.sae) == (model, saes)
    for name in ("features_MS", "scores_MS", "alpha_MKS", "tokens_K"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["verb"] == "sft features" and summary["config"]["language"] == "zh"
    assert [row["feature"] for row in summary["features"]] == found.features_MS.reshape(-1).tolist()
    assert [row["tokens"] for row in summary["levels"]] == found.tokens_K.tolist()
    assert "Features of language zh" in shown and f"1/{found.features_MS[0, 0]}" in shown and str(found.facts["runner_up"][0][0]) in shown
    assert "Features of language zh" in (tmp_path / "out" / "report.html").read_text()


def test_layers_features_by_hand_controls_and_the_number_can_be_chosen(features, tmp_path):
    assert features("--layers", "0,2", "--count", 3).features_MS.shape == (2, 3)
    by_hand = features("--features", "2:7,4", "0:1,9")
    assert by_hand.layers == (0, 2) and by_hand.features_MS.tolist() == [[1, 9], [7, 4]] and by_hand.facts["chosen"] == "given"
    assert features("--random-seed", 5, "--count", 1, "--layers", 1).facts["random_seed"] == 5


def test_so_many_texts_of_each_language_are_drawn(features):
    some, same, others = (features("--per-language", 4, "--seed", seed, "--layers", 1) for seed in (0, 0, 1))
    assert some.tokens_K.sum() < features("--layers", 1).tokens_K.sum()
    np.testing.assert_array_equal(some.alpha_MKS, same.alpha_MKS)
    assert not np.array_equal(some.alpha_MKS, others.alpha_MKS)


def test_levels_can_be_measured_on_other_texts(features, model, tmp_path):
    other = _written(tmp_path / "other.jsonl", [{"body": TEXTS[code], "lang": code} for code in ("fr", "en") for _ in range(2)])
    found = features("--alpha-data", other, "--layers", 2)
    assert found.languages == ("zh", "fr", "en")
    alpha, _ = estimate_levels(load_model(model), found.rows, [2], {"fr": [TEXTS["fr"]] * 2, "en": [TEXTS["en"]] * 2}, FEW)
    np.testing.assert_allclose(found.alpha_MKS[:, 1:], alpha, rtol=1e-5, atol=1e-5)


def test_levels_can_be_measured_on_conversations_as_they_are_trained_on(features, model, tmp_path, capsys):
    rows = [{"prompt": "tea?", "response": TEXTS[code], "lang": code} for code in TEXTS for _ in range(2)] + [
        {"prompt": "", "response": "", "lang": "fr"}
    ]
    chat = _written(tmp_path / "chat.jsonl", rows)
    found = features("--alpha-data", chat, "--alpha-kind", "chat", "--template", "plain", "--layers", 2, "--max-refused-share", 0.5)
    assert "left out 1: " in capsys.readouterr().err
    held = load_model(model)
    conversations = load_conversations(chat, language_column="lang")
    tokens = chat_rows(conversations, held.tokenizer, ChatFormat("plain", max_refused_share=0.5), length=16)
    by_language = {code: [row.tokens for row in tokens if row.language == code] for code in TEXTS}
    alpha, counts = estimate_levels(held, found.rows, [2], by_language, FEW)
    np.testing.assert_array_equal(found.alpha_MKS, alpha)
    np.testing.assert_array_equal(found.tokens_K, counts)


def test_the_embedded_corpus_is_read_in_its_six_languages_and_without_held_out_sentences(monkeypatch, features):
    def watch(model, saes, texts, language, **settings):
        assert texts == {code: sentences(code) for code in LANGUAGES}
        raise InputError("seen")

    monkeypatch.setattr("qscope_jax.features.switching.find_language_features.find_language_features", watch)
    with pytest.raises(InputError, match="seen"):
        features("--data", "tiny")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--language", "de"], "no text of language 'de'; there are en, zh, fr"),
        (["--language-column", "none"], "has no column 'none'; the columns there are 'body', 'lang'"),
        (["--min-tokens", "1000"], "language en has"),
        (["--features", "5"], "features has '5', expected layer:features such as 26:104,77"),
        (["--features", "1:3", "1:4"], "each layer once"),
        (["--features", "1:3", "--layers", "2"], "layers is 2, but features are given for 1"),
        (["--features", "1:40"], "feature 40 is out of range"),
        (["--features", "1:4", "--random-seed", "0"], "choose one"),
        (["--layers", "9"], "layer 9 is out of range"),
        (["--count", "0"], "count is 0"),
        (["--max-norm-multiple", "-1"], "max_norm_multiple is -1"),
        (["--alpha-kind", "chat"], "needs --alpha-data"),
        (["--alpha-kind", "chat", "--alpha-data", "none.jsonl"], "none.jsonl: no such file"),
        (["--out", "/proc/none/o"], "cannot be written"),
    ],
)
def test_bad_requests_are_refused_in_one_line(features, arguments, said):
    with pytest.raises(QscopeError) as caught:
        features(*arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_saes_of_another_model_unlabelled_rows_and_a_taken_folder_are_refused(features, wide_saes, tmp_path):
    with pytest.raises(QscopeError, match="the SAE is of another model"):
        features("--sae", wide_saes)
    unlabelled = _written(tmp_path / "u.jsonl", [{"body": "tea", "lang": "en"}, {"body": "tea", "lang": ""}])
    with pytest.raises(QscopeError, match="u.jsonl line 2: column lang holds nothing, expected a class"):
        features("--data", unlabelled)
    chat = _written(tmp_path / "c.jsonl", [{"prompt": "tea?", "response": "tea", "lang": "en"}, {"prompt": "tea?", "response": "tea"}])
    with pytest.raises(QscopeError, match="c.jsonl line 2: has no language in column lang"):
        features("--alpha-data", chat, "--alpha-kind", "chat", "--template", "plain")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    with pytest.raises(QscopeError, match="taken: exists and holds no language features"):
        features("--out", tmp_path / "taken")
