import json

import numpy as np
import pytest

from qscope_jax.data.files import plain
from qscope_jax.errors import InputError
from qscope_jax.features.classify.classification import RuleConfig
from qscope_jax.features.classify.classification_study import StudyConfig, example_texts, study
from qscope_jax.features.classify.labelled_data import label_data
from tests.features.classify.test_classification import table

CONFIG = StudyConfig(ks=(1, 2), rule=RuleConfig(k=2), shares=(0.5, 1.0), seeds=2, samples=50)


def labelled_streams():
    """Texts of two languages; at layer 3 a feature for each, and none at layer 5. Streams say the class in their first dimension."""
    texts = [f"{'rude' if i % 2 else 'kind'} words {i}" for i in range(80)]
    languages = ["en" if i < 40 else "fr" for i in range(80)]
    data = label_data(texts, ["rude" if i % 2 else "kind" for i in range(80)], languages=languages)
    activations = np.zeros((80, 6))
    for row, place in enumerate(data.rows):
        activations[row, 2 if place < 40 else 4] = data.positive_B[row] and place % 10 > 1
    streams = np.random.default_rng(0).standard_normal((80, 4)) + 3 * data.positive_B[:, None] * np.eye(4)[0]
    return data, {3: table(activations, 3), 5: table(np.zeros((80, 6)), 5)}, {3: streams, 5: np.zeros((80, 4))}


@pytest.fixture(scope="module")
def labelled():
    return labelled_streams()


@pytest.fixture(scope="module")
def found(labelled):
    data, tables, streams = labelled
    return study(tables, data, streams, CONFIG)


def test_a_study_scores_rules_and_baselines_of_each_language(found):
    assert list(found.languages) == ["en", "fr"]
    methods = {one.name: one for one in found.languages["en"].methods}
    assert next(iter(methods)) == "OR rule" and methods["OR rule"].layers == (3,) and methods["OR rule"].features == 1
    assert {"difference of means", "logistic regression", "bag of words"} <= set(methods)
    assert methods["logistic regression"].layers == (3,) and methods["bag of words"].scores.f1.value == 1
    assert found.transfer.f1.diagonal().min() > 0.7 > found.transfer.f1[0, 1] == 0
    assert found.plain()["languages"]["fr"]["features"] == ((4,), ())


def test_a_class_without_a_feature_leaves_baselines(labelled):
    data, tables, streams = labelled
    silent = study({5: tables[5]}, data, {5: streams[3]}, CONFIG).languages["en"]
    assert silent.rule is None and [one.name for one in silent.methods] == ["difference of means", "logistic regression", "bag of words"]


def test_where_no_feature_fires_more_often_thresholds_may_still_find_one(labelled):
    data, _, _ = labelled
    strength = table(np.where(data.positive_B, 5.0, 1.0)[:, None] * np.eye(3)[1])
    found = study({0: strength}, data, None, StudyConfig(ks=(1,), rule=RuleConfig(k=1), seeds=1, samples=0, baselines=False)).languages["en"]
    assert found.rule is None
    tuned = {one.name: one.scores.f1.value for one in found.methods}
    assert tuned == {"OR rule, thresholds for F1": 1, "OR rule, thresholds for balanced accuracy": 1}


def test_examples_are_evaluation_texts_of_each_kind(labelled, found):
    data, tables, _ = labelled
    halves = data.by_language["en"]
    picked = example_texts(found.languages["en"].rule, tables, halves, 2)
    assert set(sum(picked.values(), [])) <= set(halves.evaluation.tolist()) and picked["false alarm"] == []
    assert all(data.positive_B[row] for row in picked["found"] + picked["missed"])


def test_one_language_has_no_transfer_and_what_is_found_is_json(found, labelled):
    data, tables, _ = labelled
    alone = study({3: tables[3]}, label_data(list(data.texts), ["ab"[i] for i in data.positive_B.astype(int)]), None, CONFIG)
    assert list(alone.languages) == ["all"] and alone.transfer is None and "transfer" not in alone.plain() and "jaccard" in found.plain()
    back = json.loads(json.dumps(plain(found.plain())))
    assert back["transfer"]["languages"] == ["en", "fr"] and back["texts"]["discovery"] + back["texts"]["evaluation"] == 80


def test_shares_of_no_texts_are_refused_before_anything_is_computed():
    with pytest.raises(InputError):
        StudyConfig(shares=(0.0,))
