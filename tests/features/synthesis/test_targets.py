import json

import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.explain.feature_labels import FeatureLabel, write_labels
from qscope_jax.features.synthesis.targets import Target, alive_targets, check_targets, load_targets, save_targets
from qscope_jax.features.text_features import text_features


@pytest.fixture
def table(tmp_path):
    def write(*rows: dict, name: str = "targets.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def test_targets_are_the_features_whose_explanation_scores_tau_or_more(table):
    path = table(
        {"layer": 3, "feature": 7, "explanation": "rude words", "score": 0.5, "harmful": True, "other": 1},
        {"layer": 1, "feature": 9, "explanation": "commas", "score": 0.49},
        {"layer": 1, "feature": 8, "explanation": "not judged"},
        {"layer": 1, "feature": 2, "explanation": "the judge failed", "score": None},
    )
    assert load_targets(path) == [Target(1, 8, "not judged"), Target(3, 7, "rude words", 0.5, True)]
    assert [target.key for target in load_targets(path, tau=0.0)] == ["1/8", "1/9", "3/7"]
    assert [target.key for target in load_targets(path, layers=[3])] == ["3/7"]


def test_scores_of_explanations_are_not_taken_for_usefulness(tmp_path):
    write_labels(tmp_path / "e.jsonl", [FeatureLabel(0, 1, "tea", 0.3, {"detection": 0.3}, "m"), FeatureLabel(0, 2, "sun", 0.9, {"fuzzing": 0.9})])
    assert load_targets(tmp_path / "e.jsonl") == [Target(0, 1, "tea"), Target(0, 2, "sun")]


def test_a_target_whose_judge_failed_is_none_when_it_comes_back(tmp_path):
    save_targets(tmp_path / "t.jsonl", [Target(0, 1, "tea", 0.7), Target(0, 2, "sun")], failed=["0/2"])
    assert load_targets(tmp_path / "t.jsonl") == [Target(0, 1, "tea", 0.7)]
    assert load_targets(tmp_path / "t.jsonl", unjudged=True) == [Target(0, 1, "tea", 0.7), Target(0, 2, "sun")]


def test_a_list_of_features_is_an_inventory_too(tmp_path):
    (tmp_path / "list.csv").write_text("layer,feature,score,threshold\n2,5,,1.5\n0,1,,\n")
    with pytest.raises(InputError, match="none of its 2 features"):
        load_targets(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("layer,feature,threshold,harmful\n2,5,1.5,True\n0,1,,\n")
    assert load_targets(tmp_path / "list.csv") == [Target(0, 1), Target(2, 5, threshold=1.5, harmful=True)]


def test_targets_come_back_as_they_were_saved(tmp_path):
    targets = [Target(0, 1), Target(0, 2, "é", 0.75, False, 2.5), Target(4, 0, score=1.0)]
    save_targets(tmp_path / "t.jsonl", targets)
    assert load_targets(tmp_path / "t.jsonl") == targets


def test_features_that_fire_are_targets_with_a_threshold_of_their_own(readout_of):
    readout = readout_of([[9, 9, 9, 9], [4, 1, 0, 2]], [[0, 0, 0, 0], [3, 1, 0, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]], layer=2)
    tables = {2: text_features(readout)}
    assert [t.key for t in alive_targets(tables)] == ["2/0", "2/1", "2/3"]
    assert [t.key for t in alive_targets(tables, least=2)] == ["2/0", "2/1"]
    assert [t.key for t in alive_targets(tables, highest_rate=0.9)] == ["2/3"]
    # Of feature 0 the texts reach 4, 3 and 1, of which two exceed half of 4.
    assert alive_targets(tables, highest_rate=0.9, strength=0.5) == [Target(2, 0, threshold=2.0), Target(2, 3, threshold=1.0)]


def test_what_is_no_target_is_refused(table, readout_of):
    row = {"layer": 1, "feature": 2}
    cases = [
        (r"line 2: lists feature 2 of layer 1 again", lambda: load_targets(table(row, row))),
        ("line 1: feature holds None", lambda: load_targets(table({"layer": 1}))),
        ("line 1: layer holds True", lambda: load_targets(table({"layer": True, "feature": 1}))),
        ("line 1: feature holds -1", lambda: load_targets(table({"layer": 1, "feature": -1}))),
        ("line 1: score holds 1.5, expected a number from 0 to 1", lambda: load_targets(table(row | {"score": 1.5}))),
        ("line 1: score holds 'good'", lambda: load_targets(table(row | {"score": "good"}))),
        ("line 1: threshold holds -1, expected a number from 0$", lambda: load_targets(table(row | {"threshold": -1}))),
        ("line 1: harmful holds 'perhaps'", lambda: load_targets(table(row | {"harmful": "perhaps"}))),
        ("line 1: explanation holds list", lambda: load_targets(table(row | {"explanation": ["a"]}))),
        ("none of its 1 features is a target", lambda: load_targets(table(row), layers=[0])),
        ("tau is 2", lambda: load_targets(table(row), tau=2.0)),
        ("no targets given", lambda: check_targets([], {0: 4})),
        ("target 1/2: there is no layer 1 here; there are 0", lambda: check_targets([Target(1, 2)], {0: 4})),
        ("layer 0 has features 0 to 3", lambda: check_targets([Target(0, 4)], {0: 4})),
        ("least is 0", lambda: alive_targets({}, least=0)),
        ("no feature fires on at least 1 texts", lambda: alive_targets({0: text_features(readout_of(np.zeros((2, 3))))})),
    ]
    for line, call in cases:
        with pytest.raises(InputError, match=line):
            call()
