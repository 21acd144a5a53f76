import json

import pytest

from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.explain.feature_card import FeatureCard
from qscope_jax.features.explain.feature_labels import FeatureLabel, labelled, read_labels, write_labels

LABELS = [FeatureLabel(4, 17, "words for tea, 茶", 0.75, {"detection": 0.9, "fuzzing": 0.6}, "a model"), FeatureLabel(2, 3, "commas")]
CARD = FeatureCard(4, 17, 0.1, 0.2, 3.0, 2.0)


def test_labels_are_read_as_they_were_written(tmp_path):
    write_labels(tmp_path / "e.jsonl", LABELS)
    assert list(read_labels(tmp_path / "e.jsonl").values()) == LABELS
    rows = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {"layer": 2, "feature": 3, "explanation": "commas"} and "茶" in rows[0]["explanation"]


def test_a_table_that_people_made_will_do(tmp_path):
    (tmp_path / "e.csv").write_text("layer,feature,explanation,score\n4,17,tea,0.5\n4,18,sun,\n")
    assert list(read_labels(tmp_path / "e.csv").values()) == [FeatureLabel(4, 17, "tea", 0.5), FeatureLabel(4, 18, "sun")]


def test_a_card_takes_its_own_label():
    labels = {(4, 17): LABELS[0], (4, 18): FeatureLabel(4, 18, "sun", 0.5)}
    assert labelled(CARD, labels).scores == {"detection": 0.9, "fuzzing": 0.6} and labelled(CARD, {}) is CARD
    card = labelled(FeatureCard(4, 18, 0.1, 0.2, 3.0, 2.0), labels)
    assert (card.explanation, card.scores) == ("sun", {"score": 0.5})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"layer": -1, "feature": 0, "explanation": "x"}, "layer holds -1, expected a whole number from 0"),
        ({"layer": 1, "explanation": "x"}, "feature holds None"),
        ({"layer": 1, "feature": True, "explanation": "x"}, "feature holds True"),
        ({"layer": 1, "feature": 0}, "explanation holds NoneType"),
        ({"layer": 1, "feature": 0, "explanation": "x", "score": 1.5}, "score holds 1.5, expected a number from 0 to 1"),
        ({"layer": 1, "feature": 0, "explanation": "x", "scores": [1]}, "scores should be named numbers"),
        ({"layer": 0, "feature": 0, "explanation": "x"}, "again; keep one row"),
    ],
)
def test_rows_that_are_no_label_are_refused(tmp_path, row, said):
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, [{"layer": 0, "feature": 0, "explanation": "first"}, row])))
    with pytest.raises(InputError, match=f"e.jsonl line 2: .*{said}"):
        read_labels(tmp_path / "e.jsonl")


def test_a_file_that_is_not_there_or_not_writable_is_an_error_of_its_own(tmp_path):
    with pytest.raises(SourceError, match="no such file"):
        read_labels(tmp_path / "none.jsonl")
    with pytest.raises(SourceError, match="cannot be written"):
        write_labels("/proc/none/e.jsonl", LABELS)
