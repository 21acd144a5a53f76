import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.classify.labelled_data import label_data

TEXTS = [f"text {i}" for i in range(40)]
LABELS = ["rude", "polite"] * 20


def test_the_second_class_by_name_is_looked_for_unless_another_is_named():
    data = label_data(TEXTS, LABELS)
    assert (data.positive, data.negative) == ("rude", "polite")
    assert data.positive_B.tolist() == [int(text[5:]) % 2 == 0 for text in data.texts] == [LABELS[row] == "rude" for row in data.rows]
    other = label_data(TEXTS, LABELS, positive="polite")
    assert (other.positive, other.negative) == ("polite", "rude") and (other.positive_B == ~data.positive_B).all()


def test_one_of_several_classes_stands_against_the_rest():
    labels = ["a", "b", "c", "d"] * 10
    data = label_data(TEXTS, labels, positive="c")
    assert (data.positive, data.negative, data.positive_B.sum()) == ("c", "not c", 10)
    with pytest.raises(InputError, match="40 texts have 4 classes .*name the positive one"):
        label_data(TEXTS, labels)


def test_each_language_has_halves_of_its_own():
    languages = ["en" if i < 20 else "fr" for i in range(40)]
    data = label_data(TEXTS, LABELS, languages=languages)
    assert list(data.by_language) == ["en", "fr"]
    for name, halves in data.by_language.items():
        assert {data.languages[i] for i in (*halves.discovery, *halves.evaluation)} == {name}
        assert (len(halves.discovery), len(halves.evaluation), halves.positive_B[halves.evaluation].sum()) == (16, 4, 2)
    assert list(label_data(TEXTS, LABELS).by_language) == ["all"]


def test_classes_that_cannot_be_told_apart_are_refused():
    with pytest.raises(InputError, match=r"40 texts have 1 classes \('a'\)"):
        label_data(TEXTS, ["a"] * 40)
    with pytest.raises(InputError, match="positive class 'kind': texts are of 'polite', 'rude'"):
        label_data(TEXTS, LABELS, positive="kind")
