import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.classify.classification import RuleConfig
from qscope_jax.features.classify.fit_classifier import ClassifierConfig, classifier_from_tables
from qscope_jax.features.classify.labelled_data import label_data
from tests.features.classify.test_classification import table

CONFIG = ClassifierConfig(RuleConfig(k=1), samples=20)


@pytest.fixture
def labelled():
    """Feature 3 of layer 1 fires on the class among discovery texts and among half of the others; feature 5 on all of these alone."""
    texts = [f"text {i}" for i in range(40)]
    data = label_data(texts, ["yes" if i % 2 else "no" for i in range(40)], positive="yes")
    activations = np.zeros((2, 40, 24))
    held_out = data.halves.evaluation
    activations[1, :, 3] = 2.0 * data.positive_B
    activations[1, held_out[data.positive_B[held_out]][::2], 3] = 0
    activations[0, held_out, 5] = 9.0 * data.positive_B[held_out]
    return data, {layer: table(activations[layer], layer) for layer in range(2)}


def test_texts_of_discovery_choose_and_the_others_are_scored(labelled, saes):
    data, tables = labelled
    fitted = classifier_from_tables(tables, data, saes.__getitem__, config=CONFIG)
    assert [(term.layer, term.feature) for term in fitted.rule.terms] == [(1, 3)]
    assert fitted.facts["discovery"]["f1"]["value"] == 1 and fitted.facts["evaluation"]["recall"]["value"] == 0.5
    assert (fitted.facts["discovery_texts"], fitted.facts["evaluation_texts"]) == (32, 8)


def test_only_the_sae_of_a_chosen_layer_is_opened(labelled, saes):
    opened = []

    def sae_of(layer: int):
        opened.append(layer)
        return saes[layer]

    fitted = classifier_from_tables(labelled[1], labelled[0], sae_of, config=CONFIG, model_name="some model", sae_name="some SAEs")
    assert opened == [1] and (fitted.model, fitted.sae, fitted.positive, fitted.negative) == ("some model", "some SAEs", "yes", "no")


def test_thresholds_of_pre_activations_need_the_model(labelled, saes):
    with pytest.raises(InputError, match="tuned with the model; give it, or read features by top_k"):
        classifier_from_tables(labelled[1], labelled[0], saes.__getitem__, config=ClassifierConfig(RuleConfig(k=1), reading="pre_activation"))
