import numpy as np
import pytest

from qscope_jax.features.classify.classification_study import study
from qscope_jax.features.classify.labelled_data import label_data
from qscope_jax.report.classification_page import Example, write_classification_page
from tests.features.classify.test_classification_study import CONFIG, labelled_streams


@pytest.fixture(scope="module")
def labelled():
    return labelled_streams()


@pytest.fixture(scope="module")
def found(labelled):
    data, tables, streams = labelled
    return study(tables, data, streams, CONFIG)


def test_the_page_shows_what_was_found(found, labelled, tmp_path):
    examples = {"en": [Example("found", ["ru", "de"], np.array([0.0, 2.0]), 3, 2)]}
    document = write_classification_page(tmp_path / "p.html", found, examples, subtitle="a model").read_text(encoding="utf-8")
    for said in ("Which texts are rude", "a model", "F1 by language", "OR rule", "bag of words", "found: layer 3, feature 2", "Between languages",
                 "Overlap of the best features, layer 3", "With fewer texts", "In hindsight"):  # fmt: skip
        assert said in document, said
    alone = study({5: labelled[1][5]}, label_data(list(labelled[0].texts), ["ab"[i] for i in labelled[0].positive_B.astype(int)]), None, CONFIG)
    document = write_classification_page(tmp_path / "q.html", alone).read_text(encoding="utf-8")
    assert "there is no rule of the kind" in document and "Between languages" not in document and ">Scores<" in document
