import json

import numpy as np
import pytest
from scipy.sparse import csr_array

from qscope_jax.data.files import plain
from qscope_jax.demo.chapters import tone
from qscope_jax.demo.corpus import LANGUAGES
from qscope_jax.demo.tone import tone_sentences
from qscope_jax.features.classify import text_reading
from qscope_jax.report.page import Page


@pytest.fixture(scope="module")
def chapter(with_saes):
    return tone.run(with_saes)


def test_the_checks_are_what_the_table_says(chapter, with_saes):
    f1, kept = chapter.checks
    assert f1.value == chapter.data["methods"][0]["f1"] and f1.met == (f1.value >= 0.9)
    assert kept.value == pytest.approx(chapter.data["f1_by_share"]["0.1"] / chapter.data["f1_by_share"]["1.0"])
    assert len(chapter.data["rule"]) <= 5
    assert with_saes.named["rude"] == (chapter.data["rule"][0]["layer"], chapter.data["rule"][0]["feature"])
    json.dumps(plain(chapter.data))


def test_the_rule_is_measured_beside_the_papers_rule_and_three_baselines(chapter):
    names = [row["method"] for row in chapter.data["methods"]]
    assert names[1:] == ["the best feature, fires or not", "difference of means", "logistic regression", "bag of words"]
    assert all(row["low"] <= row["f1"] <= row["high"] for row in chapter.data["methods"])


def test_transfer_and_overlap_are_between_all_six_languages(chapter):
    assert chapter.data["languages"] == list(LANGUAGES.values())
    assert np.shape(chapter.data["transfer"]) == np.shape(chapter.data["jaccard"]) == (6, 6)
    np.testing.assert_array_equal(np.diag(chapter.data["jaccard"]), 1)
    # English on English by all its data is the rule of the table.
    assert chapter.data["transfer"][0][0] == pytest.approx(chapter.data["methods"][0]["f1"]) == pytest.approx(chapter.data["f1_by_share"]["1.0"])


def test_held_out_sentences_choose_nothing(with_saes, chapter, monkeypatch):
    sentences = tone.tone_sentences

    def swapped(*arguments, **settings):
        other = {"rude": "polite", "polite": "rude"}
        found = sentences(*arguments, **settings)
        return [item if item.split == "train" else type(item)(item.text, other[item.tone], item.language, item.split) for item in found]

    monkeypatch.setattr(tone, "tone_sentences", swapped)
    again = tone.run(with_saes)
    for chosen in ("rule", "transfer_layers", "jaccard"):
        assert plain(again.data[chosen]) == plain(chapter.data[chosen]), chosen
    # Whatever was fitted to training sentences alone says of every held-out one what it said before, so that it is now wrong where it was right.
    for row, other in zip(chapter.data["methods"], again.data["methods"], strict=True):
        assert row["auc"] + other["auc"] == pytest.approx(1), row["method"]
        assert row["precision"] + other["precision"] == pytest.approx(1), row["method"]
    assert all(abs(row["auc"] - 0.5) > 0.05 for row in chapter.data["methods"][2:])


def test_features_that_know_the_answer_meet_both_checks(with_saes, monkeypatch):
    known = {item.text: item.tone == "rude" for item in tone_sentences(list(LANGUAGES), train=tone.TRAIN, held_out=tone.HELD_OUT)}

    def planted(model, saes, texts, config):
        readings = text_reading.read_texts(model, saes, texts, config)
        rude = np.array([known[text] for text in texts])
        for reading in readings.values():
            table = np.zeros((len(texts), with_saes.saes[0].num_features), np.float32)
            table[:, 7] = np.where(rude, 5, 0)
            object.__setattr__(reading.features, "maxima", csr_array(table))
        return readings

    monkeypatch.setattr(tone, "read_texts", planted)
    chapter = tone.run(with_saes)
    assert [check.value for check in chapter.checks] == [1, 1] and all(check.met for check in chapter.checks)
    page = Page("tour")
    chapter.draw(page)
    assert "bag of words" in page.html()
