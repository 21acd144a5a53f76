import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.classify.classification import RuleConfig, firing_differences, top_features
from qscope_jax.features.classify.classification_report import data_efficiency, jaccard, multi_layer, score_rule, sweep, transfer
from qscope_jax.features.classify.labelled_data import LabelledHalves
from tests.features.classify.test_classification import f1, table

F = 12


def halves_of(count: int, held_out: int) -> LabelledHalves:
    return LabelledHalves(np.arange(count) % 2 == 0, np.arange(count - held_out), np.arange(count - held_out, count))


@pytest.fixture
def planted():
    """Layer 0: feature 3 on 80 % of positive texts. Layer 1: feature 5 on all of them in discovery, on few in evaluation."""
    rng = np.random.default_rng(0)
    halves = halves_of(120, 40)
    activations = (rng.random((2, 120, F)) < 0.1).astype(float)
    activations[:, :, [3, 5]] = 0
    activations[0, :, 3] = halves.positive_B & (rng.random(120) < 0.8)
    activations[1, :80, 5] = halves.positive_B[:80]
    activations[1, 80:90, 5] = halves.positive_B[80:90]
    return {layer: table(activations[layer], layer) for layer in range(2)}, halves, activations


def test_a_sweep_scores_every_layer_and_number_of_features_by_set_logic(planted):
    tables, halves, activations = planted
    found = sweep(tables, halves, (1, 2, 4))
    assert (found.layers, found.ks) == ((0, 1), (1, 2, 4))
    for m in range(2):
        delta = firing_differences(tables[m], halves.positive_B, halves.discovery)
        assert found.differences[m] == delta.max() and list(found.features[m]) == top_features(delta, 4).tolist()
        for j, k in enumerate((1, 2, 4)):
            called = activations[m][:, list(found.features[m][:k])].any(axis=1)
            assert found.discovery_f1[m, j] == f1(called[halves.discovery], halves.positive_B[halves.discovery])
            assert found.evaluation_f1[m, j] == f1(called[halves.evaluation], halves.positive_B[halves.evaluation])


def test_what_discovery_chooses_and_what_hindsight_would_are_told_apart(planted):
    found = sweep(planted[0], planted[1], (1, 2))
    assert found.by_difference == 1 and found.chosen("discovery") == (1, 1) and found.chosen("hindsight") == (0, 2)


def test_several_layers_call_positive_what_the_best_feature_of_any_of_them_does(planted):
    tables, halves, activations = planted
    found = multi_layer(tables, halves, samples=0)
    both = (activations[1][:, 5] + activations[0][:, 3]) > 0
    assert list(found) == [1, 2]
    assert found[1].f1.value == f1(activations[1][halves.evaluation, 5] > 0, halves.positive_B[halves.evaluation])
    assert found[2].f1.value == f1(both[halves.evaluation], halves.positive_B[halves.evaluation])


@pytest.fixture
def languages():
    """Feature 0 is of the class in en and fr, features 1 and 2 in en alone, 3 in fr alone, 4 in zh alone; half of each language is held out."""
    positive = np.arange(60) % 2 == 0
    names = np.array(["en"] * 20 + ["fr"] * 20 + ["zh"] * 20)
    activations = np.zeros((60, F))
    for feature, where in ((0, ("en", "fr")), (1, ("en",)), (2, ("en",)), (3, ("fr",)), (4, ("zh",))):
        activations[:, feature] = positive & np.isin(names, where)
    activations[4, 0] = activations[2, 1] = activations[2, 2] = 0
    discovery = np.flatnonzero(np.arange(60) % 20 < 10)
    whole = LabelledHalves(positive, discovery, np.setdiff1d(np.arange(60), discovery))
    return {2: table(activations, 2)}, {name: whole.of(names == name) for name in ("en", "fr", "zh")}


def test_jaccard_equals_sets(languages):
    tables, halves = languages
    sets = {"en": {0, 1, 2}, "fr": {0, 3}, "zh": {4}}
    expected = [[len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for b in sets] for a in sets]
    assert jaccard(tables, halves, 10)[2].tolist() == expected
    assert jaccard(tables, halves, 1)[2].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_a_rule_of_one_language_is_scored_on_all(languages):
    tables, halves = languages
    found = transfer(tables, halves, RuleConfig(k=1))
    assert found.languages == ("en", "fr", "zh") and found.layers == (2, 2, 2)
    # The feature of en and fr is at home in both; that of zh nowhere else.
    assert found.f1.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    silent = {2: table(np.zeros((60, F)), 2)}
    assert np.isnan(transfer(silent, halves, RuleConfig(k=1)).f1).all()


def test_little_data_is_drawn_from_discovery_in_equal_classes(planted):
    tables, halves, _ = planted
    found = data_efficiency(tables, {"en": halves}, RuleConfig(k=1), shares=(0.1, 1.0), seeds=3)
    assert found.budgets == (4, 40) and found.chosen.shape == (2, 3)
    whole = sweep(tables, halves, (1,))
    # With all texts nothing is left to chance, and the layer is that of the largest difference, or the best in hindsight.
    assert set(found.chosen[1]) == {whole.evaluation_f1[1, 0]} and set(found.hindsight[1]) == {whole.evaluation_f1.max()}
    assert found.kept(1) == 1 and found.kept(0, "hindsight") == pytest.approx(found.hindsight[0].mean() / found.hindsight[1].mean())


def test_evaluation_texts_have_no_part_in_what_little_data_chooses(planted):
    tables, halves, activations = planted
    activations[:, 80:] = 0
    other = {layer: table(activations[layer], layer) for layer in range(2)}
    assert (data_efficiency(other, {"en": halves}, RuleConfig(k=1), shares=(0.1, 1.0), seeds=2).chosen == 0).all()
    assert sweep(other, halves).features == sweep(tables, halves).features


def test_a_rule_is_scored_on_the_evaluation_half(planted):
    from qscope_jax.features.classify.classification import fit_rule

    tables, halves, _ = planted
    rule = fit_rule(tables, halves.positive_B, RuleConfig(k=1), rows=halves.discovery)
    found = score_rule(rule, tables, halves, samples=200)
    assert (found.texts, found.positives) == (40, 20) and found.recall.value == 0.25 and found.recall.low < 0.25 < found.recall.high


def test_shares_must_ascend_to_all(planted):
    for wrong in ((), (0.5, 0.1, 1.0), (0.1, 0.5), (0.0, 1.0)):
        with pytest.raises(InputError, match="shares that ascend"):
            data_efficiency(planted[0], {"en": planted[1]}, shares=wrong)
